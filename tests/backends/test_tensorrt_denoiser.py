"""TensorRT engines behind device loops: against a library that computes from addresses, and the real one's names."""

from __future__ import annotations

import sysconfig
from types import SimpleNamespace

import fake_refit
import fake_tensorrt
import pytest
import step_networks
import torch
from engine_builds import RELU
from fake_tensorrt import PRETENCES, DataType, TensorFormat, TensorLocation
from step_networks import SPEC, assert_predicts
from tensorrt_cases import GPU, denoiser, tables

from skipstep.backends.denoiser import Target
from skipstep.backends.tensorrt import denoisers
from skipstep.backends.tensorrt_options import TensorRTOptions
from skipstep.bundle_source import BundleSource
from skipstep.errors import (
    CaptureError,
    DeviceUnavailableError,
    ExportError,
    InputError,
)
from skipstep.networks.spec import NetworkSpec

ALIGNED = fake_tensorrt.ALIGNMENT
pytestmark = pytest.mark.usefixtures("cuda")


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("counted", [False, True], ids=["stage of the host", "stage of the device"])
@pytest.mark.parametrize("pitch", [1, ALIGNED], ids=["rows without gaps", "aligned rows"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_predicts_what_the_cpu_backend_predicts(batch_size, pitch, counted, library):
    network, given = denoiser(batch_size, library=library), step_networks.call(4, batch_size)
    assert_predicts(network, given, counted=counted, looked_up=tables(network, given, pitch=pitch))


def test_half_precision():
    network = denoiser(precision="float16")
    assert network.input.dtype == network.output.dtype == torch.float16
    assert_predicts(network, step_networks.call(3, 3), dtype=torch.float16)


def test_images_in_channels_last_order():
    PRETENCES["tensors"] = {(name, "format"): TensorFormat.HWC for name in ("sample", "out_sample")}
    network = denoiser()
    for image in (network.input, network.output):
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert not image.is_contiguous()
    assert_predicts(network, step_networks.call(3, 3))


def test_aligned_rows_are_read_where_they_stand():
    network, given = denoiser(), step_networks.call(4, 3)
    per_stage = {name for name, each in network.step_inputs.items() if each.per_stage}
    assert network.rows.keys() == per_stage
    for row in network.rows.values():
        row.fill_(torch.nan)
    enqueue, looked_up = network.new_context(), tables(network, given, pitch=ALIGNED)
    assert_predicts(network, given, enqueue=enqueue, looked_up=looked_up)
    for stage, (_, addresses) in enumerate(enqueue.context._launches[-4:]):
        for name, table in looked_up.items():
            assert addresses[name] == (table[stage] if name in per_stage else table).data_ptr()
        assert (addresses["sample"], addresses["out_sample"]) == (network.input.data_ptr(), network.output.data_ptr())


def test_contexts_keep_apart_what_they_look_up():
    """As graphs do that are launched in turns: a context goes on with its own memory."""
    network = denoiser()
    calls = [step_networks.call(3, 3, seed) for seed in (1, 2)]
    contexts = [network.new_context() for _ in calls]
    assert contexts[0].context is not contexts[1].context
    assert contexts[0].context._memory == contexts[1].context._memory
    held = [tables(network, given, pitch=pitch) for given, pitch in zip(calls, (1, ALIGNED), strict=True)]
    for _ in range(2):
        for given, enqueue, looked_up in zip(calls, contexts, held, strict=True):
            assert_predicts(network, given, enqueue=enqueue, looked_up=looked_up)
    # What is looked up may change where it stands: a plan of equal structure, or another prompt.
    for name, table in held[0].items():
        table.copy_(held[1][name])
    assert_predicts(network, calls[1], enqueue=contexts[0], looked_up=held[0])


def test_one_context_with_the_memory_of_several_calls():
    """As a loop that is not recorded may give it."""
    network = denoiser()
    enqueue = network.new_context()
    for seed, pitch in ((1, 1), (2, ALIGNED), (1, ALIGNED)):
        given = step_networks.call(3, 3, seed)
        assert_predicts(network, given, enqueue=enqueue, looked_up=tables(network, given, pitch=pitch))


def test_a_context_has_run_before_anything_is_recorded(cuda):
    """On a stream that can be recorded, and apart from whatever else uses the same memory."""
    network = denoiser()
    waits = cuda.waits
    first, second = network.new_context(), network.new_context()
    assert (waits, cuda.waits) == (2, 4)
    for each in (first, second):
        ((stream, _),) = each.context._launches
        assert stream not in (0, cuda.current)
    # And no more than that: contexts take memory, and TensorRT-RTX compiles for each.
    assert len(network.loaded.engine._contexts) == 2


def test_launches_go_to_the_current_stream(cuda):
    network = denoiser()
    enqueue = network.new_context()
    waits, cuda.current = cuda.waits, 7
    assert_predicts(network, step_networks.call(2, 3), enqueue=enqueue)
    assert [stream for stream, _ in enqueue.context._launches[1:]] == [7, 7]
    assert cuda.waits == waits


def test_engines_that_take_memory_while_they_run_are_not_recorded():
    assert denoiser().capture_refusal is None
    PRETENCES["takes memory"] = True
    assert "build it for capture" in denoiser().capture_refusal


def test_full_tensorrt_is_asked_nothing_that_it_does_not_know(cuda, monkeypatch):
    monkeypatch.delattr(fake_tensorrt.IExecutionContext, "is_stream_capturable")
    monkeypatch.delattr(fake_tensorrt.ICudaEngine, "create_runtime_config")
    network = denoiser(library="tensorrt")
    assert (network.name, network.capture_refusal) == ("tensorrt", None)
    assert_predicts(network, step_networks.call(2, 3))


@pytest.mark.parametrize("capturing", [False, True])
def test_a_launch_that_fails(cuda, capturing):
    network = denoiser()
    enqueue = network.new_context()
    PRETENCES["no launch"], cuda.capturing = True, capturing
    with pytest.raises(CaptureError if capturing else ExportError, match="does not launch: no launch today"):
        assert_predicts(network, step_networks.call(1, 3), enqueue=enqueue)


@pytest.mark.parametrize(
    ("pretence", "message"),
    [
        ("no contexts", "makes no execution context: out of memory"),
        ("no addresses", "has no place for sample"),
        ("no launch", "does not launch"),
        ("no profiles", "has no profile 1"),
        ("no shapes", "does not take batch size 3"),
    ],
)
def test_an_engine_that_does_not_run_here(pretence, message):
    PRETENCES[pretence] = True
    engine = fake_tensorrt.engine_of(step_networks.parts().graphs.step, 2, 3)
    with pytest.raises(ExportError, match=message):
        denoiser(engine=engine)


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_one_engine_for_all_batch_sizes(monkeypatch, library):
    """Built and loaded once; what is evaluated in turn at its sizes is what each predicts alone."""
    asked = []

    def build(step, target, sizes, **options):
        asked.append(sizes)
        return fake_tensorrt.engine_of(step, *sizes), {}

    monkeypatch.setattr("skipstep.export.engines.build_engine_cached", build)
    make = denoisers(step_networks.source(), Target("cpu", library=library, batch_sizes=(1, 2, 4)))
    found = {size: make(size) for size in (2, 1, 4)}
    assert asked == [(2, 1, 4)]
    assert len({id(network.loaded) for network in found.values()}) == 1
    assert found[1].loaded.profiles == {1: 0, 2: 1, 4: 2}
    contexts = {size: network.new_context() for size, network in found.items()}
    for _ in range(2):
        for size, network in found.items():
            assert_predicts(network, step_networks.call(2, size), enqueue=contexts[size])
    make(8)
    assert asked == [(2, 1, 4), (8, 1, 2, 4)], "a size that was not foreseen"


def test_bytes_that_the_library_does_not_take():
    with pytest.raises(ExportError, match=r"tensorrt_rtx 1.7.0.0 does not take: cannot deserialize.*skipstep build"):
        denoiser(engine=b"of another version")


@pytest.mark.parametrize(
    ("tensor", "fact", "pretended", "message"),
    [
        ("sample", "shape", (2, 2, 4, 4), r"sample float32 \[2, 2, 4, 4\]; expected .* \[3, 2, 4, 4\]"),
        ("sample", "shape", (-1, 2, 4, 4), r"\[-1, 2, 4, 4\].*of batch size 3.*3 among the batch sizes"),
        ("sample", "dtype", DataType.INT64, "sample of int64"),
        ("sample", "dtype", DataType.FP8, "sample is FP8"),
        ("sample", "format", TensorFormat.HWC8, "HWC8 on DEVICE; expected plain tensors"),
        ("out_sample", "location", TensorLocation.HOST, "LINEAR on HOST; expected plain tensors"),
        ("out_sample", "dtype", DataType.HALF, "out_sample float16 .*; expected float32"),
        ("encoder", "shape", (1, 16), r"\[1, 16\]; expected a row for each of 3 samples"),
        ("encoder", "shape", (3, 17), "a step input of the network; expected"),
    ],
)
def test_engines_of_another_network(tensor, fact, pretended, message):
    if tensor == "encoder":
        (tensor,) = step_networks.parts().crossing[2]
    PRETENCES["tensors"] = {(tensor, fact): pretended}
    with pytest.raises(ExportError, match=message):
        denoiser()


def test_an_engine_of_another_size_or_spec():
    engine = fake_tensorrt.engine_of(step_networks.parts().graphs.step, 2)
    with pytest.raises(ExportError, match="for batch size 3"):
        denoiser(3, engine=engine)
    with pytest.raises(ExportError, match=r"\[2, 2, 4, 4\]; expected .*\[2, 2, 8, 8\]"):
        denoiser(2, engine=engine, spec=NetworkSpec((2, 8, 8), 5, 5, prompt_shape=(3, 6)))


@pytest.mark.parametrize("change", ["dtype", "batch", "gaps", "address"])
def test_step_inputs_that_no_loop_should_give(change):
    network, given = denoiser(), step_networks.call(2, 3)
    looked_up = tables(network, given)
    name = next(name for name, each in network.step_inputs.items() if not each.per_stage)
    value = looked_up[name]
    looked_up[name] = {
        "dtype": value.double(),
        "batch": value[:2],
        "gaps": torch.stack([value, value], dim=-1)[..., 0],
        "address": torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape),
    }[change]
    with pytest.raises(InputError, match=name):
        assert_predicts(network, given, looked_up=looked_up)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_from_a_network(monkeypatch, precision):
    asked = []

    def build(step, target, sizes, *, device, options, tf32, channels_last, again):
        assert (device, options, tf32, channels_last, again) == (0, TensorRTOptions(refit=True), False, True, False)
        asked.append((str(target), sizes, step))
        return fake_tensorrt.engine_of(step, *sizes), {}

    monkeypatch.setattr("skipstep.export.engines.build_engine_cached", build)
    source = step_networks.source()
    source.tensorrt = TensorRTOptions(refit=True)
    make = denoisers(source, Target("cpu", precision, library="tensorrt_rtx"))
    found = {size: make(size) for size in (1, 2)}
    assert [each[:2] for each in asked] == [("rtx", (1,)), ("rtx", (2,))]
    assert (asked[0][2] == step_networks.parts().graphs.step) == (precision == "float32")
    for size, network in found.items():
        assert_predicts(network, step_networks.call(2, size), dtype=getattr(torch, precision))


def test_an_engine_without_weights_is_given_those_of_its_network(monkeypatch):
    def build(step, target, sizes, **options):
        return fake_refit.stripped(fake_tensorrt.engine_of(step, *sizes)), {}

    monkeypatch.setattr("skipstep.export.engines.build_engine_cached", build)
    assert_predicts(denoisers(step_networks.source(), Target("cpu"))(2), step_networks.call(2, 2))
    monkeypatch.setattr(step_networks.ModelSource, "engine_graph", lambda self, precision: RELU)
    with pytest.raises(ExportError, match="does not take the weights"):
        denoisers(step_networks.source(), Target("cpu"))(2)
    # As skipstep.edge loads one.
    with pytest.raises(ExportError, match="without strip"):
        denoiser(engine=build(step_networks.parts().graphs.step, None, (3,))[0])


def test_streamed_weights_have_memory_among_the_activations(monkeypatch):
    monkeypatch.setitem(PRETENCES, "streamable", 4000)
    network = denoiser()
    assert network.loaded.engine.weight_streaming_budget_v2 == 1000
    assert network.loaded.activation_bytes == fake_tensorrt.WORKSPACE_BYTES + 3000
    assert_predicts(network, step_networks.call(2, 3))


def test_from_a_bundle(monkeypatch):
    step = step_networks.parts().graphs.step
    asked = []

    def facts(size, **other):
        return {
            "library": "tensorrt",
            "library_version": fake_tensorrt.library().__version__,
            "platform": sysconfig.get_platform(),
            "compute_capability": GPU.compute_capability,
            "device": GPU.name,
            "num_multiprocessors": GPU.num_multiprocessors,
            "inputs": [{"shape": [size, *SPEC.sample_shape]}],
            **other,
        }

    def profiles(*sizes):
        return {"profiles": list(sizes), "inputs": [{"shape": ["batch", *SPEC.sample_shape]}]}

    def read(name):
        asked.append(name)
        return fake_tensorrt.engine_of(step, *map(int, name.split()))

    entries = (
        *(SimpleNamespace(file=str(size), facts=facts(size)) for size in (1, 2)),
        SimpleNamespace(file="3 6", facts=facts(0, **profiles(3, 6))),
    )
    others = tuple(
        SimpleNamespace(file="another device's", facts=facts(4, **other))
        for other in (
            {"compute_capability": 86},
            {"device": "another GPU"},
            # Two modules of one name and one architecture; and an engine from before that was recorded.
            {"num_multiprocessors": 8},
            {"num_multiprocessors": None},
            {"platform": "linux-aarch64"},
            {"library": "tensorrt_rtx", "device": None, "num_multiprocessors": None},
        )
    )
    bundle = SimpleNamespace(manifest=SimpleNamespace(engines=entries + others, network=SPEC), read=read)
    monkeypatch.setattr("skipstep.bundle_source.cuda_device", lambda index: GPU)
    monkeypatch.setattr(BundleSource, "before_loop", lambda self: step_networks.source().before_loop())
    make = denoisers(BundleSource(bundle), Target("cpu", "float32"))
    found = {size: make(size) for size in (1, 2, 6, 3)}
    assert asked == ["1", "2", "3 6"]
    for size, network in found.items():
        assert_predicts(network, step_networks.call(2, size))
    with pytest.raises(
        DeviceUnavailableError, match=r"sm_90 \(a GPU, 132 multiprocessors\) at batch 4 on .*; expected"
    ):
        make(4)
    assert BundleSource(bundle).engine_libraries == ("tensorrt", "tensorrt_rtx")


def test_a_kept_engine_that_the_library_refuses_is_built_again(monkeypatch):
    asked = []

    def build(step, target, sizes, *, again, **options):
        asked.append(again)
        return (fake_tensorrt.engine_of(step, *sizes) if again else b"of an older release"), {}

    monkeypatch.setattr("skipstep.export.engines.build_engine_cached", build)
    assert denoisers(step_networks.source(), Target("cpu"))(2).batch_size == 2
    assert asked == [False, True]
    monkeypatch.setattr("skipstep.export.engines.build_engine_cached", lambda *_, **__: (b"damaged", {}))
    with pytest.raises(ExportError, match=r"does not take: cannot deserialize.*skipstep build"):
        denoisers(step_networks.source(), Target("cpu"))(2)
