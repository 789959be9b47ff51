"""TensorRT engines behind device loops: against a library that computes from addresses, and the real one's names."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fake_tensorrt
import pytest
import step_networks
import torch
from conftest import HAS_GPU
from fake_tensorrt import PRETENCES, DataType, TensorFormat, TensorLocation
from step_networks import SPEC, assert_close, assert_predicts

from skipstep.backends import tensorrt
from skipstep.backends.denoiser import Target
from skipstep.backends.device_step import HostInputs, StepTensor, check_step_tensors
from skipstep.backends.tensorrt import TensorRtDenoiser, denoisers
from skipstep.bundle_source import BundleSource
from skipstep.errors import (
    CaptureError,
    DeviceUnavailableError,
    ExportError,
    InputError,
    MissingDependencyError,
)
from skipstep.networks.spec import NetworkSpec

CPU = torch.device("cpu")
ALIGNED = fake_tensorrt.ALIGNMENT
has_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")


class Cuda:
    """What is used of torch.cuda, in host memory: streams are numbers, and what is launched runs at once."""

    def __init__(self) -> None:
        self.current, self.made, self.waits, self.capturing = 0, 100, 0, False

    def Stream(self, device):
        self.made += 1
        return SimpleNamespace(cuda_stream=self.made)

    def current_stream(self, device):
        return SimpleNamespace(cuda_stream=self.current)

    @contextlib.contextmanager
    def stream(self, stream) -> Iterator[None]:
        before, self.current = self.current, stream.cuda_stream
        yield
        self.current = before

    def synchronize(self, device):
        self.waits += 1

    def is_current_stream_capturing(self):
        return self.capturing

    def device(self, device):
        return contextlib.nullcontext()


@pytest.fixture
def cuda(monkeypatch) -> Iterator[Cuda]:
    """A machine with a device and both libraries."""
    cuda = Cuda()
    for name in ("Stream", "current_stream", "stream", "synchronize", "is_current_stream_capturing", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, fake_tensorrt.library(name))
    monkeypatch.setattr(tensorrt, "cuda_device", lambda **options: (90, "a GPU"))
    yield cuda
    PRETENCES.clear()


def denoiser(batch_size=3, *, library="tensorrt_rtx", spec=SPEC, engine=None, precision="float32"):
    engine = engine or fake_tensorrt.engine_of(step_networks.source().step_graph(precision), batch_size)
    early = step_networks.early_graphs()
    return TensorRtDenoiser(engine, early, spec, library=library, batch_size=batch_size, device=CPU)


def tables(network, given, **options):
    return step_networks.tables(network.compute(*given[:2]), network.step_inputs, **options)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("counted", [False, True], ids=["stage of the host", "stage of the device"])
@pytest.mark.parametrize("pitch", [1, ALIGNED], ids=["rows without gaps", "aligned rows"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_predicts_what_the_cpu_backend_predicts(batch_size, pitch, counted, library):
    network, given = denoiser(batch_size, library=library), step_networks.call(4, batch_size)
    assert_predicts(network, given, counted=counted, looked_up=tables(network, given, pitch=pitch))


@pytest.mark.usefixtures("cuda")
def test_half_precision():
    network = denoiser(precision="float16")
    assert network.input.dtype == network.output.dtype == torch.float16
    assert_predicts(network, step_networks.call(3, 3), dtype=torch.float16)


@pytest.mark.usefixtures("cuda")
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


@pytest.mark.usefixtures("cuda")
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


@pytest.mark.usefixtures("cuda")
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
    assert len(network.engine._contexts) == 2


def test_launches_go_to_the_current_stream(cuda):
    network = denoiser()
    enqueue = network.new_context()
    waits, cuda.current = cuda.waits, 7
    assert_predicts(network, step_networks.call(2, 3), enqueue=enqueue)
    assert [stream for stream, _ in enqueue.context._launches[1:]] == [7, 7]
    assert cuda.waits == waits


@pytest.mark.usefixtures("cuda")
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


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("pretence", "message"),
    [
        ("no contexts", "makes no execution context: out of memory"),
        ("no addresses", "has no place for sample"),
        ("no launch", "does not launch"),
    ],
)
def test_an_engine_that_does_not_run_here(pretence, message):
    PRETENCES[pretence] = True
    with pytest.raises(ExportError, match=message):
        denoiser()


@pytest.mark.usefixtures("cuda")
def test_bytes_that_the_library_does_not_take():
    with pytest.raises(ExportError, match=r"tensorrt_rtx 1.7.0.0 does not take: cannot deserialize.*skipstep build"):
        denoiser(engine=b"of another version")


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("tensor", "fact", "pretended", "message"),
    [
        ("sample", "shape", (2, 2, 4, 4), r"sample torch.float32 \[2, 2, 4, 4\]; expected .* \[3, 2, 4, 4\]"),
        ("sample", "shape", (-1, 2, 4, 4), r"\[-1, 2, 4, 4\].*fixed shape.*single batch size"),
        ("sample", "dtype", DataType.INT64, "sample of torch.int64"),
        ("sample", "dtype", DataType.FP8, "sample is FP8"),
        ("sample", "format", TensorFormat.HWC8, "HWC8 on DEVICE; expected plain tensors"),
        ("out_sample", "location", TensorLocation.HOST, "LINEAR on HOST; expected plain tensors"),
        ("out_sample", "dtype", DataType.HALF, "out_sample torch.float16 .*; expected torch.float32"),
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


@pytest.mark.usefixtures("cuda")
def test_an_engine_of_another_size_or_spec():
    engine = fake_tensorrt.engine_of(step_networks.parts().graphs.step, 2)
    with pytest.raises(ExportError, match="for batch size 3"):
        denoiser(3, engine=engine)
    with pytest.raises(ExportError, match=r"\[2, 2, 4, 4\]; expected .*\[2, 2, 8, 8\]"):
        denoiser(2, engine=engine, spec=NetworkSpec((2, 8, 8), 5, 5, prompt_shape=(3, 6)))


@pytest.mark.usefixtures("cuda")
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


def test_without_a_device_the_library_is_left_alone(monkeypatch):
    def crash(*_):
        raise AssertionError("native code without a device")

    library = fake_tensorrt.library()
    library.Runtime = crash
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)

    def no_device(*, remedy):
        raise DeviceUnavailableError(got="none", expected="a CUDA device", remedy=remedy)

    monkeypatch.setattr(tensorrt, "cuda_device", no_device)
    with pytest.raises(DeviceUnavailableError, match="machine with an NVIDIA GPU"):
        denoiser()


@pytest.mark.parametrize(("library", "extra"), [("tensorrt", "gpu"), ("tensorrt_rtx", "rtx")])
def test_a_library_that_is_missing(cuda, monkeypatch, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=rf"{library} that cannot be used.*skipstep\[{extra}\]"):
        denoiser(library=library)


@pytest.mark.usefixtures("cuda")
def test_which_library_is_taken(monkeypatch):
    assert tensorrt.find_library() == "tensorrt"
    monkeypatch.delitem(sys.modules, "tensorrt")
    if importlib.util.find_spec("tensorrt") is None:
        assert tensorrt.find_library() == "tensorrt_rtx"


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_from_a_network(monkeypatch, precision):
    asked = []

    def build(step, target, size):
        asked.append((str(target), size, step))
        return fake_tensorrt.engine_of(step, size), {}

    monkeypatch.setattr("skipstep.export.engines.build_engine_cached", build)
    make = denoisers(step_networks.source(), Target("cpu", precision), library="tensorrt_rtx")
    found = {size: make(size) for size in (1, 2)}
    assert [each[:2] for each in asked] == [("rtx", 1), ("rtx", 2)]
    assert (asked[0][2] == step_networks.parts().graphs.step) == (precision == "float32")
    for size, network in found.items():
        assert_predicts(network, step_networks.call(2, size), dtype=getattr(torch, precision))


@pytest.mark.usefixtures("cuda")
def test_from_a_bundle(monkeypatch):
    step = step_networks.parts().graphs.step
    asked = []

    def facts(size, capability=90):
        shape = [size, *SPEC.sample_shape]
        version = fake_tensorrt.library().__version__
        return {
            "library": "tensorrt",
            "library_version": version,
            "compute_capability": capability,
            "inputs": [{"shape": shape}],
        }

    def read(name):
        asked.append(name)
        return fake_tensorrt.engine_of(step, int(name))

    entries = tuple(SimpleNamespace(file=str(size), facts=facts(size)) for size in (1, 2))
    others = (SimpleNamespace(file="another device's", facts=facts(4, 86)),)
    bundle = SimpleNamespace(manifest=SimpleNamespace(engines=entries + others, network=SPEC), read=read)
    monkeypatch.setattr("skipstep.bundle_source.cuda_device", lambda: (90, "NVIDIA H200"))
    monkeypatch.setattr(BundleSource, "before_loop", lambda self: step_networks.source().before_loop())
    make = denoisers(BundleSource(bundle), Target("cpu", "float32"))
    found = {size: make(size) for size in (1, 2)}
    assert asked == ["1", "2"]
    assert_predicts(found[2], step_networks.call(2, 2))
    with pytest.raises(DeviceUnavailableError, match="sm_90 at batch 4; expected"):
        make(4)


@has_rtx
def test_the_fake_has_no_name_that_the_real_bindings_lack():
    import tensorrt_rtx

    for name, fake in vars(fake_tensorrt.library()).items():
        real = getattr(tensorrt_rtx, name)
        if not isinstance(fake, type) or not hasattr(fake, "__members__"):
            for each, value in vars(fake).items() if isinstance(fake, type) else ():
                if not each.startswith("_"):
                    assert hasattr(real, each), f"{name}.{each}"
                    if inspect.isfunction(value):
                        assert_same_arguments(value, getattr(real, each))
        else:
            assert fake.__members__.keys() <= real.__members__.keys(), name


def assert_same_arguments(fake, real):
    """The real signatures stand in the docstrings, in lines of their own."""
    signatures = re.findall(rf"^(?:\d+\. )?{real.__name__}\((.*)\) -> ", real.__doc__, re.MULTILINE)
    arguments = [re.findall(r"(?:^|, )(\w+)(?=: )", signature) for signature in signatures]
    # Bindings that were never given names of their own for the arguments call them arg0, arg1, ….
    assert list(inspect.signature(fake).parameters) in arguments, (real.__name__, arguments)


@has_rtx
def test_the_real_library_has_what_the_denoiser_is_typed_with():
    import tensorrt_rtx

    for name in tensorrt._TensorRt.__annotations__:
        assert hasattr(tensorrt_rtx, name)
    assert tensorrt._DTYPES.keys() <= tensorrt_rtx.DataType.__members__.keys()
    assert tensorrt_rtx.Dims((2, 3, 4))[:] == (2, 3, 4)
    log = tensorrt._error_log(tensorrt_rtx)
    tensorrt_rtx.Runtime(log)
    log.log(tensorrt_rtx.ILogger.Severity.INFO, "nothing to worry about")
    assert log.summary() == "it does not say why"
    for number in range(5):
        log.log(tensorrt_rtx.ILogger.Severity.ERROR, f"error {number}")
    assert log.summary() == "error 2; error 3; error 4"


@has_rtx
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_real_engines_are_built_for_recording(precision):
    from skipstep.export.engines import build_engine_cached
    from skipstep.export.tensorrt_engine import EngineTarget

    step = step_networks.source().step_graph(precision)
    _, facts = build_engine_cached(step, EngineTarget("tensorrt_rtx", 86), 2)
    assert "REQUIRE_USER_ALLOCATION" in facts["flags"]
    inputs, outputs = (
        {each["name"]: StepTensor(tuple(each["shape"]), getattr(torch, each["dtype"])) for each in facts[role]}
        for role in ("inputs", "outputs")
    )
    check_step_tensors(inputs, outputs, SPEC, batch_size=2, of="an engine")
    del inputs["sample"]
    values = HostInputs(step_networks.early_graphs(), SPEC, inputs, batch_size=2)
    given = step_networks.call(3, 2)
    computed = values.compute(*given[:2])
    for name, each in values.step_inputs.items():
        stages = (3,) if each.per_stage else ()
        assert (computed.expanded(name).shape, each.dtype) == ((*stages, *inputs[name].shape), precision)


@has_rtx
@pytest.mark.skipif(HAS_GPU, reason="asks what happens without a CUDA device")
def test_the_real_library_without_a_device():
    with pytest.raises(DeviceUnavailableError, match="run TensorRT engines on a machine with an NVIDIA GPU"):
        denoiser()


@pytest.mark.slow
@has_rtx
def test_the_type_checker_knows_the_bindings(tmp_path):
    """From stubs of the installed library: what is called as the denoiser calls it passes, a wrong name does not."""
    pytest.importorskip("mypy")
    script = Path(__file__).parents[2] / ".ci" / "tensorrt_stubs.py"
    stubs, code = tmp_path / "stubs", tmp_path / "code.py"
    subprocess.run([sys.executable, script, stubs], check=True, timeout=120)
    code.write_text(
        "import tensorrt_rtx as trt\n"
        "def run(context: trt.IExecutionContext) -> bool:\n"
        "    return context.set_tensor_address('sample', 0) and context.execute_async_v3(0)\n"
        "def wrong(context: trt.IExecutionContext) -> bool:\n"
        "    return bool(context.execute_async_v4(0)) or context.set_tensor_address(0, 'sample')\n"
    )
    config = tmp_path / "mypy.ini"
    config.write_text(
        f"[mypy]\nstrict = True\nmypy_path = {stubs}\n"
        "[mypy-tensorrt_rtx.*]\nignore_errors = True\n[mypy-tensorrt_rtx_bindings.*]\nignore_errors = True\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", tmp_path / "cache", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    errors = re.findall(r"code.py:(\d+): error: .*\[(.*)\]", result.stdout)
    assert sorted(errors) == [("5", "arg-type"), ("5", "arg-type"), ("5", "attr-defined")], result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_on_the_device(library, precision):
    """Stepwise and recorded, with the stage on the host and on the device: the same bits, and those of the network."""
    pytest.importorskip(library)
    device = torch.device("cuda", 0)
    network = denoisers(step_networks.source(), Target("cuda:0", precision), library=library)(3)
    given = step_networks.call(4, 3)
    assert network.capture_refusal is None
    looked_up = {name: value.to(device) for name, value in tables(network, given).items()}
    states = torch.from_numpy(given[2]).to(device, network.input.dtype)
    results = torch.zeros(4, *network.output.shape, dtype=network.output.dtype, device=device)

    def loop(enqueue, counter=None):
        for stage in range(4):
            network.input.copy_(states[stage])
            enqueue(looked_up, stage if counter is None else counter)
            results[stage].copy_(network.output)
            if counter is not None:
                counter.add_(1)

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        loop(network.new_context())
    stream.synchronize()
    stepwise = results.clone()
    assert stepwise.dtype == getattr(torch, precision)
    assert_close(stepwise.float().cpu().numpy(), given, stepwise.dtype)
    for counter in (None, torch.zeros(1, dtype=torch.int32, device=device)):
        enqueue, graph = network.new_context(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            loop(enqueue, counter)
        for _ in range(2):
            results.zero_()
            if counter is not None:
                counter.zero_()
            graph.replay()
            torch.cuda.synchronize(device)
            assert torch.equal(results, stepwise)
