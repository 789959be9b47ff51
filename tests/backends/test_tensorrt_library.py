"""Which TensorRT library is taken, what it and its fake have in common, and engines that the real one builds."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_tensorrt
import pytest
import step_networks
import torch
from conftest import HAS_GPU
from step_networks import SPEC, assert_close
from tensorrt_cases import denoiser, tables

from skipstep.backends import tensorrt_engine, tensorrt_library
from skipstep.backends.denoiser import Target
from skipstep.backends.device_step import HostInputs, StepTensor, check_step_tensors
from skipstep.backends.tensorrt import denoisers
from skipstep.backends.tensorrt_library import choose_library
from skipstep.errors import (
    DeviceUnavailableError,
    MissingDependencyError,
)

has_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")


def test_without_a_device_the_library_is_left_alone(monkeypatch):
    def crash(*_):
        raise AssertionError("native code without a device")

    library = fake_tensorrt.library()
    library.Runtime = crash
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)

    def no_device(index, *, remedy):
        raise DeviceUnavailableError(got="none", expected="a CUDA device", remedy=remedy)

    monkeypatch.setattr(tensorrt_library, "cuda_device", no_device)
    with pytest.raises(DeviceUnavailableError, match="machine with an NVIDIA GPU"):
        denoiser()


@pytest.mark.parametrize(("library", "extra"), [("tensorrt", "gpu"), ("tensorrt_rtx", "rtx")])
def test_a_library_that_is_missing(cuda, monkeypatch, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=rf"{library} that cannot be used.*skipstep\[{extra}\]"):
        denoiser(library=library)


@pytest.mark.usefixtures("cuda")
def test_two_releases_of_cuda_in_one_process(monkeypatch):
    packages = [SimpleNamespace(metadata={"Name": name}) for name in ("tensorrt_rtx_cu12", "tensorrt-rtx-cu12-libs")]
    monkeypatch.setattr(tensorrt_library.metadata, "distributions", lambda: packages)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(MissingDependencyError, match=r"tensorrt_rtx for CUDA 12 .* 13.*pip install tensorrt-rtx-cu13"):
        denoiser()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert denoiser().batch_size == 3


@pytest.mark.usefixtures("cuda")
def test_which_library_is_taken(monkeypatch):
    both = ("tensorrt", "tensorrt_rtx")
    assert choose_library(both, None) == "tensorrt"
    # A bundle has engines of one; and the caller may know better.
    assert choose_library(("tensorrt_rtx",), None) == "tensorrt_rtx"
    assert choose_library(both, "tensorrt_rtx") == "tensorrt_rtx"
    monkeypatch.delitem(sys.modules, "tensorrt")
    if importlib.util.find_spec("tensorrt") is None:
        assert choose_library(both, None) == "tensorrt_rtx"
        # What is missing is named by load_library.
        assert choose_library(("tensorrt",), None) == "tensorrt"


class Drawer:
    """Where kernels are kept, without a disk."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.puts = 0

    def __call__(self, description, parts):
        key, drawer = repr(sorted(parts.items())), self

        class Slot:
            def get(self):
                return drawer.held.get(key)

            def put(self, data):
                drawer.held[key] = data
                drawer.puts += 1

        return Slot()


@pytest.mark.usefixtures("cuda")
def test_kernels_that_were_compiled_are_kept_for_the_next_process():
    keep = Drawer()
    denoiser(keep=keep)
    assert list(keep.held.values()) == [b"kernelscompiled"]
    denoiser(2, keep=keep)
    assert keep.puts == 1
    # Another process: the library is given what was kept, and nothing new is written.
    tensorrt_library.RuntimeCache._of_device.clear()
    network = denoiser(keep=keep)
    assert network.loaded.kernels.saved_bytes == len(b"kernelscompiled")
    assert keep.puts == 1
    # What the library refuses, after an update of the driver, is replaced.
    tensorrt_library.RuntimeCache._of_device.clear()
    keep.held = dict.fromkeys(keep.held, b"of another driver")
    denoiser(keep=keep)
    assert (list(keep.held.values()), keep.puts) == ([b"kernelscompiled"], 2)


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

    for name in tensorrt_library.TensorRt.__annotations__:
        assert hasattr(tensorrt_rtx, name)
    assert tensorrt_engine._DTYPES.keys() <= tensorrt_rtx.DataType.__members__.keys()
    assert tensorrt_rtx.Dims((2, 3, 4))[:] == (2, 3, 4)
    log = tensorrt_library.error_log(tensorrt_rtx)
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
    _, facts = build_engine_cached(step, EngineTarget("tensorrt_rtx", 86), [2])
    assert "REQUIRE_USER_ALLOCATION" in facts["flags"]
    inputs, outputs = (
        {each["name"]: StepTensor(tuple(each["shape"]), each["dtype"]) for each in facts[role]}
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
    network = denoisers(step_networks.source(), Target("cuda:0", precision, library=library))(3)
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
