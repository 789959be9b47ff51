"""What TensorRT's builder refuses, and its process: crashes, kills, interrupts and missing libraries."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import HAS_GPU
from engine_builds import RELU, build, model
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from skipstep.errors import DeviceUnavailableError, ExportError, InputError, MissingDependencyError, SkipstepError
from skipstep.export.tensorrt_engine import build_engine
from skipstep.export.tensorrt_graph import batch_profiles, checked_graph

no_gpu = pytest.mark.skipif(HAS_GPU, reason="asks what happens without a CUDA device")


@pytest.fixture
def no_builder(shadow):
    """A library that crashes as soon as it is asked for anything."""
    shadow("tensorrt_rtx", "import os\ndef Builder(*_):\n    os.abort()")


def children() -> set[int]:
    """Processes that this one has started and not yet waited for."""
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        found |= set(map(int, (thread / "children").read_text().split()))
    return found


def external(tensor: TensorProto) -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def constant(value: TensorProto, output: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [output], name="stored", value=value)


def inside_a_branch(node: onnx.NodeProto, result: str) -> onnx.NodeProto:
    branch = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info(result, TensorProto.FLOAT, (4,))])
    return helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)


ONES, TRUE = numpy_helper.from_array(np.ones(4, np.float32), "w"), numpy_helper.from_array(np.array(True), "c")


OUTSIDE = external(numpy_helper.from_array(np.ones(4, np.float32), "w"))


ADD = helper.make_node("Add", ["x", "w"], ["y"], name="sum")


REFUSED = {
    "no bytes": (b"", "invalid graph"),
    "no protobuf": (b"\xff" * 64, "no ONNX model"),
    "truncated": (RELU[:-5], "no ONNX model"),
    "an input from nowhere": (model(helper.make_node("Relu", ["z"], ["y"])), "invalid graph"),
    "a cycle": (model(helper.make_node("Relu", ["y"], ["y"])), "invalid graph"),
    "an operator that is none": (model(helper.make_node("Nothing", ["x"], ["y"])), "invalid graph"),
    "weights outside": (model(ADD, weights=[OUTSIDE]), "'w' stored in a file"),
    "a constant outside": (model(constant(OUTSIDE, "w"), ADD), "'w' stored in a file"),
    "outside in a branch": (model(inside_a_branch(constant(OUTSIDE, "z"), "z"), weights=[TRUE]), "stored in a file"),
    "float64": (model(helper.make_node("Exp", ["x"], ["y"]), dtype=TensorProto.DOUBLE), "'x' of dtype DOUBLE"),
    "float64 inside": (
        model(
            helper.make_node("Cast", ["x"], ["d"], name="widen", to=TensorProto.DOUBLE),
            helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
        ),
        "'widen' of dtype DOUBLE",
    ),
    "strings": (model(helper.make_node("Identity", ["x"], ["y"]), dtype=TensorProto.STRING), "'x' of dtype STRING"),
    "another open dimension": (model(helper.make_node("Relu", ["x"], ["y"]), shape=("batch", "width")), "input 'x'"),
}


@pytest.mark.usefixtures("no_builder")
@pytest.mark.parametrize("case", REFUSED)
def test_graphs_that_never_reach_the_builder(case):
    graph, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        build(graph, batch_sizes=(1, 4))


@pytest.mark.usefixtures("no_builder")
def test_an_architecture_that_the_library_does_not_know():
    with pytest.raises(InputError, match=r"sm_87; .*sm_75, sm_80, sm_86, sm_89, sm_120, sm_121"):
        build(RELU, 87, batch_sizes=(1,))


@pytest.mark.usefixtures("no_builder")
@pytest.mark.parametrize(
    "options",
    [
        {"batch_sizes": ()},
        {"batch_sizes": (0, 1)},
        {"batch_sizes": (2**31,)},
        {"batch_sizes": (1.5,)},
        {"batch_sizes": (True,)},
        {"batch_sizes": (1,), "library": "openvino"},
        {"batch_sizes": (1,), "library": "tensorrt", "compute_capability": 86},
    ],
)
def test_arguments_that_cannot_be(options, shadow):
    shadow("tensorrt", "")
    with pytest.raises(InputError):
        build_engine(RELU, **{"library": "tensorrt_rtx", "compute_capability": 86, **options})


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (helper.make_node("Det", ["x"], ["y"], name="the_det"), r"Det \(node 'the_det'\)"),
        (helper.make_node("Odd", ["x"], ["y"], name="mine", domain="odd"), r"Odd \(node 'mine'\)"),
    ],
)
def test_an_unsupported_operator_is_named(node, name):
    with pytest.raises(ExportError, match=name):
        build(model(node, shape=("batch", 4, 4), output_shape=("batch",)), batch_sizes=(1,))


def test_a_missing_library_names_its_extra():
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    with pytest.raises(MissingDependencyError, match=r"skipstep\[gpu\]"):
        build_engine(RELU, library="tensorrt", batch_sizes=(1,))


def test_a_library_that_cannot_be_loaded(shadow):
    shadow("tensorrt_rtx", "raise OSError('libnvinfer.so.11: cannot open shared object file')")
    with pytest.raises(MissingDependencyError, match=r"libnvinfer.*skipstep\[rtx\]"):
        build(RELU, batch_sizes=(1,))


def test_a_library_without_strongly_typed_networks(shadow):
    shadow("tensorrt", "__version__ = '8.6.1'")
    with pytest.raises(MissingDependencyError, match=r"version 8\.6\.1"):
        build_engine(RELU, library="tensorrt", batch_sizes=(1,))


@no_gpu
@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_no_device_is_said_before_a_builder_is_made(shadow, library):
    shadow(library, "import os\n__version__ = '10.13.0'\ndef Builder(*_):\n    os.abort()")
    with pytest.raises(DeviceUnavailableError, match="build on the machine that will run the engine"):
        build_engine(RELU, library=library, batch_sizes=(1,))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os\ndef Builder(*_):\n    os.abort()", "rtx:sm86 killed by SIGABRT"),
        ("import ctypes\ndef Builder(*_):\n    ctypes.string_at(0)", "rtx:sm86 killed by SIGSEGV"),
        ("def Builder(*_):\n    raise TypeError('an odd library')", "status 1 .*TypeError: an odd library"),
    ],
)
def test_a_crash_of_the_library_is_an_error(shadow, code, message):
    shadow("tensorrt_rtx", code)
    with pytest.raises(ExportError, match=message):
        build(RELU, batch_sizes=(1,))


# The second while the engine is on its way: it is larger than a pipe, and nobody reads during a report.
@pytest.mark.slow
@pytest.mark.parametrize("moment", [("Building engine", 0), ("build", 1)])
def test_a_builder_killed_half_way(step_graph, moment):
    before = children()

    def kill(phase: str, done: int, of: int) -> None:
        if (phase, done) == moment:
            time.sleep(0.3)
            for builder in children() - before:
                os.kill(builder, signal.SIGKILL)

    with pytest.raises(ExportError, match=r"rtx:sm86 killed by SIGKILL; .*free memory"):
        build(step_graph, batch_sizes=(1, 4), progress=kill)
    assert build(step_graph, batch_sizes=(1, 4)).engine


def test_an_interrupt_ends_the_builder(shadow):
    shadow("tensorrt_rtx", "import time\ndef Builder(*_):\n    time.sleep(60)")
    before, started = children(), time.monotonic()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(RELU, batch_sizes=(1, 4), progress=interrupt)
    assert children() == before
    assert time.monotonic() - started < 30


def test_a_builder_does_not_outlive_its_caller(tmp_path):
    started = tmp_path / "started"
    slow = f"import os, pathlib, time\npathlib.Path({str(started)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    (tmp_path / "tensorrt_rtx.py").write_text(slow)
    (tmp_path / "graph.onnx").write_bytes(RELU)
    program = f"""
import pathlib, sys
sys.path.insert(0, {str(tmp_path)!r})
from skipstep.export.tensorrt_engine import build_engine
graph = pathlib.Path({str(tmp_path / "graph.onnx")!r}).read_bytes()
build_engine(graph, library="tensorrt_rtx", compute_capability=86, batch_sizes=(1,))
"""
    caller = subprocess.Popen([sys.executable, "-c", program])
    wait_until(lambda: started.exists() and started.read_text())
    builder = int(started.read_text())
    assert alive(builder)
    caller.kill()
    caller.wait()
    wait_until(lambda: not alive(builder))


def alive(process: int) -> bool:
    try:
        # The state follows the name in parentheses; Z has ended and waits for nobody.
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_give_typed_errors(data):
    for graph in (data, RELU[: len(data)] + data, RELU[: -len(data) or None] + data):
        try:
            batch_profiles(checked_graph(graph), (1, 4))
        except SkipstepError:
            continue
