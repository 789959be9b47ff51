"""Engines built for real by TensorRT-RTX, without a GPU; and what must never reach the builder."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from engine_builds import RELU, build, model
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from skipstep.backends.tensorrt_options import TensorRTOptions
from skipstep.errors import ExportError, InputError
from skipstep.export.tensorrt_engine import EngineTarget, build_engine, parse_targets

pytest.importorskip("tensorrt_rtx")


def matmul(dtype: type[np.floating]) -> bytes:
    weight = numpy_helper.from_array(np.eye(4, dtype=dtype), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    return model(node, dtype=weight.data_type, weights=[weight])


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
    assert built.profiles == (1, 2, 4)
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


@pytest.mark.slow
def test_batch_sizes_build_the_same_bytes_each_time(step_graph):
    first, second = (build(step_graph, batch_sizes=(2,)) for _ in range(2))
    assert first.engine == second.engine
    assert first.profiles is None
    assert first.inputs[0].shape[0] == first.outputs[0].shape[0] == 2
    assert build(step_graph, batch_sizes=(3,)).engine != first.engine
    several = [build(step_graph, batch_sizes=sizes) for sizes in ((3, 2), (2, 3))]
    assert several[0].engine == several[1].engine
    assert several[0].profiles == (2, 3)


def test_fixed_shapes_need_no_batch_size():
    fixed = model(helper.make_node("Relu", ["x"], ["y"], name="act"), shape=(2, 4))
    assert build(fixed).engine == build(fixed, batch_sizes=(2,)).engine == build(RELU, batch_sizes=(2,)).engine
    with pytest.raises(InputError, match=r"fixed at \[2\]"):
        build(fixed, batch_sizes=(1, 2))


def test_flags_are_asked_for():
    """While it streams weights, the library takes memory that it cannot be given."""
    streamed = build(RELU, batch_sizes=(1,), tf32=True, options=TensorRTOptions(weight_streaming=True))
    assert streamed.flags == ("TF32", "WEIGHT_STREAMING")


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


def test_tensorrt_builds_for_the_device_that_it_finds_and_keeps_its_timings(shadow, monkeypatch):
    """TensorRT-RTX in TensorRT's place: the same interface, here with the driver's answer written down."""
    shadow(
        "tensorrt",
        """
        import __main__, os, tensorrt_rtx_bindings as rtx
        from skipstep.cuda.probe import DeviceFacts
        __version__ = "10." + os.environ.get("CUDA_VISIBLE_DEVICES", "13.0")
        __main__.cuda_device = lambda **_: DeviceFacts("a GPU", 86, 84, 24 << 30, 13000)
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
    assert built.num_multiprocessors == 84
    assert built.timing_cache
    again = build_engine(RELU, library="tensorrt", batch_sizes=(1,), timing_cache=built.timing_cache)
    assert again.engine == built.engine
    # Timings of another release are no error: the build makes new ones.
    other = build_engine(RELU, library="tensorrt", batch_sizes=(1,), timing_cache=b"of another release")
    assert other.timing_cache
    # The builder sees the device that was asked for, as its first, and among those that this process sees.
    assert build_engine(RELU, library="tensorrt", batch_sizes=(1,), device=1).library_version == "10.1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5, 7")
    assert build_engine(RELU, library="tensorrt", batch_sizes=(1,), device=1).library_version == "10.7"
    assert build_engine(RELU, library="tensorrt", batch_sizes=(1,)).library_version == "10.GPU-5"
