"""The OpenVINO backend, with the library itself: what it draws, in which precision, and what it keeps."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import step_networks
from engines import build
from step_networks import assert_close, call
from tiny_networks import tiny_unet
from tolerances import BACKENDS_AGREE, BFLOAT16_NETWORK, BFLOAT16_PIXEL, FLOAT32_NETWORK

import skipstep
from skipstep.backends import openvino_library
from skipstep.backends.denoiser import Target
from skipstep.bundles.cache import ArtefactCache
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import DeviceUnavailableError, ExportError, InputError
from skipstep.loops import agreement

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="no package openvino")


def has_bfloat16() -> bool:
    try:
        openvino_library.check_precision("bfloat16")
    except DeviceUnavailableError:
        return False
    return True


@pytest.fixture
def bfloat16() -> None:
    if not has_bfloat16():
        pytest.skip("OpenVINO reports no bfloat16 on this processor")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> ArtefactCache:
    """An empty one."""
    monkeypatch.setenv("SKIPSTEP_CACHE", str(tmp_path / "cache"))
    return ArtefactCache()


def load(**options):
    return skipstep.load(SHIPPED_BUNDLE, allow_hard_links=True, **{"backend": "openvino", **options})


def denoiser(batch_size: int, **target):
    from skipstep.backends.openvino import denoisers

    return denoisers(step_networks.source(), Target(**target))(batch_size)


def predictions(network, given) -> np.ndarray:
    values, enqueue, found = network.compute(*given[:2]), network.new_context(), []
    for stage, state in enumerate(given[2]):
        network.input[...] = state
        enqueue(values, stage)
        found.append(network.output.copy())
    return np.stack(found)


def test_every_binding_time_is_computed_as_onnx_runtime_does():
    given = call(num_stages=3, batch_size=4)
    assert_close(predictions(denoiser(4), given), given, step_networks.torch.float32)


def test_bfloat16_rounds_the_network_alone(bfloat16):
    given = call(num_stages=3, batch_size=4)
    exact, rounded = predictions(denoiser(4), given), predictions(denoiser(4, precision="bfloat16"), given)
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert FLOAT32_NETWORK < error < BFLOAT16_NETWORK
    assert rounded.dtype == np.float32


def test_a_run_copies_nothing_in_or_out():
    network = denoiser(2)
    arrays = {"sample": network.input, **network._buffers}
    request = network._request
    tensors = {each.get_node().get_friendly_name(): request.get_tensor(each) for each in request.model_inputs}
    assert {name: tensor.data.ctypes.data for name, tensor in tensors.items()} == {
        name: array.ctypes.data for name, array in arrays.items()
    }
    assert request.get_output_tensor(0).data.ctypes.data == network.output.ctypes.data
    network.new_context()(network.compute(*call(1, 2)[:2]), 0)
    assert request.get_output_tensor(0).data.ctypes.data == network.output.ctypes.data


@pytest.mark.slow
def test_an_engine_draws_what_torch_draws():
    options = {"plans": [4], "num_classes": 3, "null_label": 3, "sample_shape": (1, 8, 8), "fractional_timesteps": True}
    network = tiny_unet(num_class_embeds=4)
    arguments = {"steps": 4, "seeds": [1, 2, 3], "class_labels": [0, 1, 2], "guidance_scale": 2.0}
    with build(network, **options) as expected, build(network, backend="openvino", **options) as found:
        np.testing.assert_allclose(found.sample(**arguments), expected.sample(**arguments), rtol=0, atol=BACKENDS_AGREE)
        assert (found.backend, found.precision) == ("openvino", "float32")
        assert "OpenVINO" in found.describe()
        assert found.identity().library.startswith("openvino 20")


def test_a_bundle_runs_in_both_precisions(bfloat16):
    arguments = {"steps": 10, "seeds": [1, 2], "class_labels": [3, 7], "guidance_scale": 2.0}
    with load(backend="onnxruntime") as runtime, load() as exact, load(precision="bfloat16") as rounded:
        expected, found = runtime.sample(**arguments), rounded.sample(**arguments)
        np.testing.assert_allclose(exact.sample(**arguments), expected, rtol=0, atol=BACKENDS_AGREE)
        assert (runtime.precision, exact.precision, rounded.precision) == ("float32", "float32", "bfloat16")
        assert "precision   bfloat16; OpenVINO" in rounded.describe()
        assert rounded.identity().differences(exact.identity()) == ["precision bfloat16 instead of float32"]
    assert 0 < np.abs(found - expected).max() < BFLOAT16_PIXEL


def test_a_processor_without_bfloat16_is_told(monkeypatch, cache):
    """There the library sets the hint aside: here it is given another one, and what it reports is read as there."""
    real = openvino_library.settings

    def as_without(precision, num_threads):
        return {**real(precision, num_threads), "INFERENCE_PRECISION_HINT": "f32"}

    monkeypatch.setattr(openvino_library, "settings", as_without)
    with pytest.raises(DeviceUnavailableError, match=r"reports to run in f32.*pass precision='float32'"):
        load(precision="bfloat16")
    with load(precision="float32") as engine:
        assert engine.sample(steps=10, seeds=1, class_labels=0).shape == (1, 1, 28, 28)


def test_what_was_compiled_is_kept_and_read_again(cache, monkeypatch):
    arguments = {"steps": 10, "seeds": 1, "class_labels": 0}
    with load() as engine:
        first = engine.sample(**arguments)
    kept = cache.entries()
    assert [each.description for each in kept] == ["OpenVINO model in float32, batch size 1"]
    read = []
    real = openvino_library.read_model
    monkeypatch.setattr(
        "skipstep.backends.openvino.read_model", lambda graph, *size: read.append(size) or real(graph, *size)
    )
    with load() as engine:
        np.testing.assert_array_equal(engine.sample(**arguments), first)
    assert (1,) not in read, "compiled again"
    # Damage is a miss.
    entry = next(cache.folder.glob("*.entry"))
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)
    with load() as engine:
        np.testing.assert_array_equal(engine.sample(**arguments), first)
    assert (1,) in read


def test_kept_bytes_that_the_library_does_not_take_are_compiled_anew():
    kept = {}

    class Slot:
        def __init__(self, description, parts):
            kept.setdefault("data", b"something else")

        def get(self):
            return kept["data"]

        def put(self, data):
            kept["data"] = data

    given = call(num_stages=2, batch_size=2)
    found = predictions(denoiser(2, keep=Slot), given)
    assert_close(found, given, step_networks.torch.float32)
    assert len(kept["data"]) > 1000
    np.testing.assert_array_equal(predictions(denoiser(2, keep=Slot), given), found)


def test_a_network_that_is_off_is_neither_used_nor_kept(cache, monkeypatch):
    monkeypatch.setattr(agreement, "TOLERANCES", {"float32": 0.0})
    with load() as engine, pytest.raises(ExportError, match="that openvino computes in float32 at batch size 1"):
        engine.sample(steps=10, seeds=1, class_labels=0)
    assert cache.entries() == []


@pytest.mark.slow
def test_each_batch_size_is_compared_before_the_engine_exists(monkeypatch):
    seen = []
    real = agreement.NetworkProbe.check
    monkeypatch.setattr(
        agreement.NetworkProbe,
        "check",
        lambda probe, each, **given: seen.append(each.batch_size) or real(probe, each, **given),
    )
    options = {"plans": [2], "sample_shape": (1, 8, 8), "fractional_timesteps": True, "batch_sizes": [1, 3]}
    with build(tiny_unet(layers_per_block=2), backend="openvino", **options):
        assert seen == [1, 3]


def test_calls_side_by_side_draw_what_they_draw_alone():
    with load(num_threads=2) as engine:
        calls = [{"steps": 10, "seeds": seed, "class_labels": seed} for seed in range(6)]
        alone = [engine.sample(**each) for each in calls]
        with ThreadPoolExecutor(3) as pool:
            beside = list(pool.map(lambda each: engine.sample(**each), calls))
        np.testing.assert_array_equal(beside, alone)


def test_a_model_lives_as_long_as_a_denoiser_of_its_size():
    from skipstep.backends.openvino import denoisers

    make = denoisers(step_networks.source(), Target())
    one, other = make(2), make(2)
    assert one._compiled is other._compiled
    model = weakref.ref(one._compiled)
    del one, other
    assert model() is None


def test_a_graph_that_is_none_is_refused():
    for graph in (b"not a graph", step_networks.parts().graphs.step[:1000]):
        with pytest.raises(ExportError, match="does not take"):
            openvino_library.read_model(graph, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnxruntime", "precision": "bfloat16"}, "pass backend='openvino'"),
        ({"precision": "float16"}, r"precision='float16' on the CPU with backend='openvino'.*see device="),
        ({"precision": "int4"}, "precision='int4'"),
        ({"backend": "torch"}, "backend='torch'"),
        ({"backend": "tensorrt"}, "pass device='cuda'"),
    ],
)
def test_what_a_bundle_cannot_run_in_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        load(**options)


def test_auto_finds_the_backend_that_has_the_precision(bfloat16):
    with load(backend="auto", precision="bfloat16") as rounded, load(backend="auto") as exact:
        assert (rounded.backend, exact.backend) == ("openvino", "onnxruntime")


@pytest.mark.slow
def test_an_engine_in_bfloat16_is_not_saved(bfloat16, tmp_path):
    options = {"plans": [2], "sample_shape": (1, 8, 8), "fractional_timesteps": True}
    with build(tiny_unet(), precision="bfloat16", backend="openvino", **options) as engine:
        with pytest.raises(InputError, match=r"precision='bfloat16', backend='openvino'"):
            engine.save(tmp_path / "bundle", license="none")
        assert not (tmp_path / "bundle").exists()


def test_it_runs_without_onnx_runtime_and_torch_and_sends_nothing(tmp_path):
    """Nothing of the telemetry is imported, and its file of the client's number is not written."""
    code = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "onnxruntime" else real(name, *package)
sys.modules["onnxruntime"] = sys.modules["torch"] = None
import skipstep
engine = skipstep.load({str(SHIPPED_BUNDLE)!r}, allow_hard_links=True)
assert engine.backend == "openvino", engine.backend
assert engine.sample(steps=10, seeds=1, class_labels=0).shape == (1, 1, 28, 28)
import openvino
assert callable(openvino.convert_model)
print([name for name in sys.modules if "openvino_telemetry" in name])
"""
    environment = {"HOME": str(tmp_path), "SKIPSTEP_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    assert [each.name for each in tmp_path.iterdir()] == ["cache"]
