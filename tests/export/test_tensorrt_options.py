"""Options of TensorRT's builder: what each does to a real engine, where it is refused, and that it is remembered."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import HAS_GPU
from engine_builds import RELU, build, model
from engines import labelled_engine
from onnx import helper, numpy_helper

from skipstep import Engine, TensorRTOptions
from skipstep.backends.tensorrt_options import read_timings
from skipstep.commands.main import main
from skipstep.demo import SHIPPED_MODEL
from skipstep.errors import DeviceUnavailableError, ExportError, InputError, MissingDependencyError, StorageError
from skipstep.export.tensorrt_engine import build_engine

pytest.importorskip("tensorrt_rtx")

WEIGHTS = [numpy_helper.from_array(np.eye(64, dtype=np.float16) + i, f"w{i}") for i in range(2)]
# Two products that do not need each other.
PRODUCTS = model(
    *(helper.make_node("MatMul", ["x", f"w{i}"], [f"p{i}"], name=f"p{i}") for i in range(2)),
    helper.make_node("Softmax", ["p1"], ["s"], name="soft"),
    helper.make_node("Add", ["p0", "s"], ["y"], name="sum"),
    dtype=WEIGHTS[0].data_type,
    shape=("batch", 64),
    weights=WEIGHTS,
)
CONVOLUTION = model(
    helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1]),
    shape=("batch", 16, 8, 8),
    weights=[numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "w")],
)
# A library with one architecture, in which all that was set is printed into an error.
SEEN = """
import __main__, tensorrt_rtx_bindings as rtx
from skipstep.cuda.probe import DeviceFacts
__main__.cuda_device = lambda **_: DeviceFacts("a GPU", 86, 84, 24 << 30, 13000)
__version__ = "10.13.0"
class Builder(rtx.Builder):
    def build_serialized_network(self, network, config):
        flags = sorted(name for name, flag in BuilderFlag.__members__.items() if config.get_flag(flag))
        limit = config.get_memory_pool_limit(MemoryPoolType.WORKSPACE)
        raise RuntimeError(f"{config.builder_optimization_level} {config.max_aux_streams} {limit} {flags}")
"""


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, r"3 0 \d+ \[\]"),
        ({"optimization_level": 0, "aux_streams": 2, "workspace_bytes": 2**21}, r"0 2 2097152 \[\]"),
        ({"refit": True, "strip": True}, r"3 0 \d+ \['REFIT', 'STRIP_PLAN'\]"),
        ({"weight_streaming": True}, r"3 0 \d+ \['WEIGHT_STREAMING'\]"),
    ],
)
def test_full_tensorrt_is_told_every_option(shadow, options, seen):
    shadow("tensorrt", SEEN)
    with pytest.raises(ExportError, match=seen):
        build_engine(RELU, library="tensorrt", batch_sizes=(1,), options=TensorRTOptions(**options))


def test_too_small_a_workspace_is_said_by_the_library():
    with pytest.raises(ExportError, match="workspace"):
        build(CONVOLUTION, batch_sizes=(2,), options=TensorRTOptions(workspace_bytes=1024))


@pytest.mark.parametrize("refused", [{"optimization_level": 0}, {"aux_streams": 1}, {"timing_cache": "timings"}])
def test_what_rtx_lacks_is_refused_by_name(refused):
    with pytest.raises(InputError, match=f"{next(iter(refused))}.*tensorrt_rtx"):
        build(RELU, batch_sizes=(1,), options=TensorRTOptions(**refused))


def test_what_is_refused_of_rtx_would_have_changed_nothing(shadow):
    """The library itself, whose builder is told an optimisation level and streams beside the caller's."""
    plain = build(PRODUCTS, batch_sizes=(2,)).engine
    shadow(
        "tensorrt_rtx",
        """
        import tensorrt_rtx_bindings as rtx
        class Builder(rtx.Builder):
            def build_serialized_network(self, network, config):
                config.builder_optimization_level, config.max_aux_streams = 5, 2
                return rtx.Builder.build_serialized_network(self, network, config)
        """,
    )
    assert build(PRODUCTS, batch_sizes=(2,)).engine == plain


@pytest.mark.skipif(HAS_GPU, reason="asks what happens without a CUDA device")
@pytest.mark.parametrize("name", ["refit", "strip"])
def test_rtx_compiles_engines_without_fixed_weights_on_a_gpu_alone(name):
    with pytest.raises(DeviceUnavailableError, match="leave refit and strip out"):
        build(RELU, batch_sizes=(1,), options=TensorRTOptions(**{name: True}))


def test_a_release_without_a_flag_is_named(shadow):
    shadow(
        "tensorrt",
        SEEN.replace(
            "__version__ =", "class BuilderFlag:\n    __members__ = {}\n    TF32 = rtx.BuilderFlag.TF32\n__version__ ="
        ),
    )
    with pytest.raises(MissingDependencyError, match=r"tensorrt 10\.13\.0.*WEIGHT_STREAMING"):
        build_engine(RELU, library="tensorrt", batch_sizes=(1,), options=TensorRTOptions(weight_streaming=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimization_level": 6},
        {"optimization_level": True},
        {"aux_streams": -1},
        {"aux_streams": None},
        {"workspace_bytes": 0},
        {"refit": "yes"},
        {"timing_cache": 3},
        {"timing_cache": "/"},
    ],
)
def test_wrong_values(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        TensorRTOptions(**wrong)


def test_timings_that_cannot_be_kept_are_refused_before_a_build(tmp_path):
    with pytest.raises(StorageError, match="missing"):
        read_timings(TensorRTOptions(timing_cache=tmp_path / "missing" / "timings"))
    options = TensorRTOptions(timing_cache=tmp_path / "timings")
    assert read_timings(options) is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path, given: Engine.build(SHIPPED_MODEL, plans=[2], device="cpu", tensorrt=given), "on the CPU"),
        (lambda path, given: Engine.build(SHIPPED_MODEL, plans=[2], device="cpu", tensorrt=3), "TensorRTOptions"),
        (lambda path, given: labelled_engine().save(path, license="MIT", tensorrt=given), "skipstep build"),
        (
            lambda path, given: labelled_engine().save(path, license="MIT", targets=["rtx:sm86"], tensorrt=given),
            "level",
        ),
    ],
)
def test_options_that_cannot_be_meant_are_refused_by_the_engine(tmp_path, call, said):
    with pytest.raises(InputError, match=said):
        call(tmp_path / "bundle", TensorRTOptions(optimization_level=4))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--precision", "int8"], "pass calibration="),
        (["--precision", "fp8", "--calibration", "nowhere"], "neither a picture nor"),
        (["--calibration", "0"], "leave calibration out"),
        (["--precision", "fp8", "--calibration", "0", "x"], "seeds, or one folder"),
        (["--precision", "fp8", "--calibration", "0"], "a target that computes in it"),
        (["--precision", "fp8", "--calibration", "0", "--target", "rtx:sm86"], "from sm_89 on"),
        (["--target", "rtx:sm89", "--timing-cache", "file"], "tensorrt_rtx, which measures nothing"),
        (["--target", "rtx:sm89", "--workspace", "0"], "workspace_bytes"),
        (["--refit"], "skipstep build"),
    ],
)
def test_commands_refuse_before_anything_is_read(tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.setattr("skipstep.engine.Engine.build", lambda *given, **options: pytest.fail("a model was opened"))
    assert main(["export", "--license", "MIT", "--out", str(tmp_path / "bundle"), *options]) == 2
    assert said in capsys.readouterr().err


def test_export_passes_on_what_was_said(tmp_path, monkeypatch):
    saved = {}
    built = SimpleNamespace(save=lambda out, **given: saved.update(given))
    monkeypatch.setattr("skipstep.engine.Engine.build", lambda *given, **options: built)
    monkeypatch.setattr("skipstep.commands.inspect.describe_bundle", str)
    said = ["--precision", "int8", "--calibration", "3", "4", "--workspace", "64", "--weight-streaming"]
    arguments = ["export", "--license", "MIT", "--out", str(tmp_path / "bundle"), "--target", "rtx:sm89", *said]
    assert main(arguments) == 0
    assert (saved["precision"], saved["calibration"]) == ("int8", [3, 4])
    assert saved["tensorrt"] == TensorRTOptions(workspace_bytes=64 << 20, weight_streaming=True)
