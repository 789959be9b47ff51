"""Engines built for real by TensorRT-RTX, without a GPU; and what must never reach the builder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import HAS_GPU
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from step_networks import unet_step

from skipstep.errors import DeviceUnavailableError, ExportError, InputError, MissingDependencyError, SkipstepError
from skipstep.export.tensorrt_engine import EngineTarget, build_engine, parse_targets
from skipstep.export.tensorrt_graph import batch_profile, checked_graph

pytest.importorskip("tensorrt_rtx")

no_gpu = pytest.mark.skipif(HAS_GPU, reason="asks what happens without a CUDA device")


def build(graph: bytes, sm: int | None = 86, **options):
    return build_engine(graph, library="tensorrt_rtx", compute_capability=sm, **options)


def model(*nodes, dtype=TensorProto.FLOAT, shape=("batch", 4), weights=(), output_shape=None) -> bytes:
    """A graph from x to y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, shape if output_shape is None else output_shape)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("odd", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


RELU = model(helper.make_node("Relu", ["x"], ["y"], name="act"))


def matmul(dtype: type[np.floating]) -> bytes:
    weight = numpy_helper.from_array(np.eye(4, dtype=dtype), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    return model(node, dtype=weight.data_type, weights=[weight])


@pytest.fixture(scope="module")
def step_graph() -> bytes:
    return unet_step()


@pytest.fixture
def shadow(tmp_path, monkeypatch):
    """Puts another module in front of a library; it runs in the builder's process alone."""

    def write(library: str, code: str) -> None:
        (tmp_path / f"{library}.py").write_text(
            "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
            + textwrap.dedent(code)
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    return write


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


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("tensorrt", [("tensorrt", None)]),
        ("rtx", [("tensorrt_rtx", None)]),
        ("rtx:sm86", [("tensorrt_rtx", 86)]),
        ("rtx:sm_120,sm89,sm120", [("tensorrt_rtx", 120), ("tensorrt_rtx", 89)]),
    ],
)
def test_targets(text, targets):
    assert [(each.library, each.compute_capability) for each in parse_targets(text)] == targets


@pytest.mark.parametrize(
    "text",
    ["", "rtx:", "rtx:86", "rtx:sm86,", "rtx:sm86;sm89", "rtx:smx", "tensorrt:sm86", "RTX:sm86", "rtx:sm8６", "cpu"],
)
def test_what_is_no_target(text):
    with pytest.raises(InputError, match="rtx:sm86"):
        parse_targets(text)


@given(st.lists(st.integers(10, 999), min_size=1, unique=True))
def test_a_target_reads_back_as_it_is_written(numbers):
    targets = tuple(EngineTarget("tensorrt_rtx", number) for number in numbers)
    assert parse_targets("rtx:" + ",".join(f"sm{number}" for number in numbers)) == targets
    assert sum((parse_targets(str(target)) for target in targets), ()) == targets


@pytest.mark.parametrize("sm", [86, *(pytest.param(sm, marks=pytest.mark.slow) for sm in (89, 120))])
def test_a_step_network_for_each_architecture(step_graph, sm):
    phases = []
    built = build(step_graph, sm, batch_sizes=(2, 1, 4), progress=lambda *report: phases.append(report))
    graph = onnx.load_from_string(step_graph).graph
    assert {each.name for each in built.inputs} == {each.name for each in graph.input}
    sample = next(each for each in built.inputs if each.name == "sample")
    assert (sample.dtype, sample.shape) == ("float32", ("batch", 1, 8, 8))
    assert [(each.name, each.dtype, each.shape) for each in built.outputs] == [
        ("out_sample", "float32", ("batch", 1, 8, 8))
    ]
    assert built.profile == (1, 2, 4)
    assert (built.compute_capability, built.device, built.timing_cache) == (sm, None, None)
    # float32 stays float32, and the engine can be captured in a graph of its caller's.
    assert built.flags == ("REQUIRE_USER_ALLOCATION",)
    assert built.onnx_sha256 == hashlib.sha256(step_graph).hexdigest()
    facts = json.loads(json.dumps(built.describe()))
    assert facts["sha256"] == hashlib.sha256(built.engine).hexdigest()
    assert facts["bytes"] == len(built.engine) > len(step_graph)
    assert facts["inputs"][0].keys() == {"name", "dtype", "shape"}
    # The library's own phases, and what is done of each.
    assert {"check the graph", "build", "Building engine"} <= {phase for phase, _, _ in phases}
    assert all(0 <= done <= of for _, done, of in phases)
    assert phases[-1] == ("build", 1, 1)


def test_one_batch_size_builds_the_same_bytes_each_time(step_graph):
    first, second = (build(step_graph, batch_sizes=(2,)) for _ in range(2))
    assert first.engine == second.engine
    assert first.profile is None
    assert first.inputs[0].shape[0] == first.outputs[0].shape[0] == 2
    assert build(step_graph, batch_sizes=(3,)).engine != first.engine


def test_fixed_shapes_need_no_batch_size():
    fixed = model(helper.make_node("Relu", ["x"], ["y"], name="act"), shape=(2, 4))
    assert build(fixed).engine == build(fixed, batch_sizes=(2,)).engine == build(RELU, batch_sizes=(2,)).engine
    with pytest.raises(InputError, match=r"fixed at \[2\]"):
        build(fixed, batch_sizes=(1, 2))


def test_flags_are_asked_for():
    assert build(RELU, batch_sizes=(1,), for_capture=False, tf32=True, workspace_bytes=2**20).flags == ("TF32",)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_precision_is_the_graphs(dtype, torch_dtype):
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 8, 3, padding=1)
            self.norm = torch.nn.GroupNorm(2, 8)

        def forward(self, x):
            return self.norm(torch.nn.functional.silu(self.conv(x)))

    program = torch.onnx.export(
        Half().to(torch_dtype).eval(),
        (torch.zeros(2, 1, 8, 8, dtype=torch_dtype),),
        dynamo=True,
        verbose=False,
        input_names=["x"],
    )
    built = build(program.model_proto.SerializeToString(), 89)
    assert [each.dtype for each in (*built.inputs, *built.outputs)] == [dtype, dtype]


def test_turing_multiplies_in_float16_alone():
    assert build(matmul(np.float16), 75, batch_sizes=(1,)).compute_capability == 75
    with pytest.raises(ExportError, match=r"sm_75: .*product.*FP32 GEMM is not supported"):
        build(matmul(np.float32), 75, batch_sizes=(1,))


def test_a_library_whose_networks_are_always_strongly_typed(shadow):
    """As from TensorRT 11 on: no creation flag; and no monitor or capture flag, as in early versions of 10."""
    shadow(
        "tensorrt_rtx",
        """
        del IProgressMonitor
        class NetworkDefinitionCreationFlag:
            pass
        """,
    )
    phases = []
    built = build(matmul(np.float16), batch_sizes=(1, 4), progress=lambda *report: phases.append(report))
    assert [each.dtype for each in (*built.inputs, *built.outputs)] == ["float16", "float16"]
    assert [phase for phase, done, _ in phases if done] == ["check the graph", "build"]


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
        {"batch_sizes": (1,), "workspace_bytes": 0},
        {"batch_sizes": (1,), "timing_cache": b""},
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


def test_tensorrt_builds_for_the_device_that_it_finds_and_keeps_its_timings(shadow):
    """TensorRT-RTX in TensorRT's place: the same interface, here with the driver's answer written down."""
    shadow(
        "tensorrt",
        """
        import __main__, tensorrt_rtx_bindings as rtx
        __version__ = "10.13.0"
        __main__.cuda_device = lambda **_: (86, "a GPU")
        class Builder(rtx.Builder):
            def create_builder_config(self):
                config = rtx.Builder.create_builder_config(self)
                config.num_compute_capabilities = 1
                config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
                return config
        """,
    )
    built = build_engine(RELU, library="tensorrt", batch_sizes=(1,))
    assert (built.compute_capability, built.device, built.library_version) == (86, "a GPU", "10.13.0")
    assert built.timing_cache
    again = build_engine(RELU, library="tensorrt", batch_sizes=(1,), timing_cache=built.timing_cache)
    assert again.engine == built.engine


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
            batch_profile(checked_graph(graph), (1, 4))
        except SkipstepError:
            continue
