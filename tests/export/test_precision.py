"""Half-precision networks: as near to the float32 one as their dtype allows, also where half precision alone is not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from precision_cases import NUMPY, ONNX, TOLERANCE, both, error, inputs_of, inspected
from step_networks import unet_step
from tolerances import FLOAT16_NETWORK
from torch import Tensor, nn

from skipstep.export.precision import lower_precision

ATTENTION = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
DELICATE = ("InstanceNormalization", "Softmax", "ReduceMean", "Sqrt")


@pytest.fixture(scope="module", params=["convolutions", pytest.param("attention", marks=pytest.mark.slow)])
def unet(request) -> bytes:
    return unet_step(**(ATTENTION if request.param == "attention" else {}))


def traced(module: nn.Module, *inputs: Tensor) -> bytes:
    """Of one input `x`, its batch fixed, opset 20."""
    program = torch.onnx.export(
        module.eval(), inputs, dynamo=True, opset_version=20, verbose=False, input_names=["x"], output_names=["y"]
    )
    return bytes(program.model_proto.SerializeToString())


def everything_in_half(graph: bytes, dtype: str) -> bytes:
    """What a conversion that knows no exceptions makes of it."""
    naive = onnx.load_from_string(graph)
    for each in (*naive.graph.input, *naive.graph.output, *naive.graph.value_info):
        if each.type.tensor_type.elem_type == TensorProto.FLOAT:
            each.type.tensor_type.elem_type = ONNX[dtype]
    constants = [attribute.t for node in naive.graph.node for attribute in node.attribute if attribute.name == "value"]
    for tensor in (*naive.graph.initializer, *constants):
        if tensor.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(NUMPY[dtype])
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    return bytes(naive.SerializeToString())


@both
def test_a_unet_is_as_accurate_as_its_dtype(unet, dtype):
    assert error(unet, lower_precision(unet, dtype), dtype) < TOLERANCE[dtype]


@both
def test_what_has_which_dtype(unet, dtype):
    lowered = lower_precision(unet, dtype)
    onnx.checker.check_model(onnx.load_from_string(lowered), full_check=True)
    graph, dtypes = inspected(lowered)
    before = onnx.load_from_string(unet).graph
    for now, was in ((graph.input, before.input), (graph.output, before.output)):
        assert [each.name for each in now] == [each.name for each in was]
        assert {each.type.tensor_type.elem_type for each in now} == {ONNX[dtype]}
    kinds = {node.op_type for node in graph.node}
    assert {"Conv", "MatMul", "InstanceNormalization", "Softmax", "Resize"} <= kinds
    for node in graph.node:
        floats = {dtypes[name] for name in (*node.input, *node.output) if name} & {TensorProto.FLOAT, ONNX[dtype]}
        if node.op_type in ("Conv", "MatMul"):
            assert floats == {ONNX[dtype]}
        elif node.op_type in DELICATE:
            assert floats == {TensorProto.FLOAT}
        elif node.op_type == "Resize":
            assert dtypes[node.input[2]] == TensorProto.FLOAT
        elif node.op_type != "Cast":
            assert len(floats) <= 1
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for tensor in before.initializer:
        if tensor.name.endswith(("conv1.weight", "conv1.bias")):
            assert weights[tensor.name] == ONNX[dtype]
        if tensor.data_type == TensorProto.INT64:
            assert weights[tensor.name] == TensorProto.INT64


@both
def test_no_value_is_cast_twice_and_no_cast_is_undone(unet, dtype):
    graph, _ = inspected(lower_precision(unet, dtype))
    casts = [node for node in graph.node if node.op_type == "Cast"]
    made = {node.output[0] for node in casts}
    assert not made & {node.input[0] for node in casts}
    assert len({node.input[0] for node in casts}) == len(casts)
    # Into each normalisation and softmax, and out of it. Two normalisations may share a way in.
    islands = sum(node.op_type in ("InstanceNormalization", "Softmax") for node in graph.node)
    assert len(casts) < 3 * islands


def test_onnx_runtime_agrees(unet):
    onnxruntime = pytest.importorskip("onnxruntime")
    inputs = inputs_of(unet, "float16")
    (expected,) = onnxruntime.InferenceSession(unet).run(
        None, {name: value.astype(np.float32) for name, value in inputs.items()}
    )
    (got,) = onnxruntime.InferenceSession(lower_precision(unet, "float16")).run(None, inputs)
    assert np.abs(got.astype(np.float32) - expected).max() < FLOAT16_NETWORK * np.abs(expected).max()


class FarFromZero(nn.Module):
    """Activations that a normalisation sees at 300 ± 1, as after a time embedding's share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8)
        self.out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.conv(x) + 300.1)))


class LargeLogits(nn.Module):
    """Attention whose logits carry a bias of a few hundred, which softmax takes out again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return torch.softmax(query @ key.transpose(-1, -2) + 400.3, dim=-1) @ value


class OwnVariance(nn.Module):
    """A normalisation written out, of values whose squares are beyond float16."""

    def forward(self, x: Tensor) -> Tensor:
        large = 300 * x
        centred = large - large.mean(-1, keepdim=True)
        return centred / ((centred * centred).mean(-1, keepdim=True) + 1e-5).sqrt()


DELICATE_NETWORKS = {
    "a mean far from zero": (FarFromZero(), torch.zeros(2, 4, 8, 8)),
    "large logits": (LargeLogits(), torch.zeros(2, 16, 4)),
    "a variance written out": (OwnVariance(), torch.zeros(2, 64)),
}


@both
@pytest.mark.parametrize("case", DELICATE_NETWORKS)
def test_float32_where_it_matters(case, dtype):
    module, x = DELICATE_NETWORKS[case]
    graph = traced(module, x)
    ours = error(graph, lower_precision(graph, dtype), dtype)
    naive = error(graph, everything_in_half(graph, dtype), dtype)
    assert ours < TOLERANCE[dtype]
    # bfloat16 has the range for the squares, and nothing to spare for the rest.
    assert not naive < (1 if case == "a variance written out" and dtype == "bfloat16" else 5) * ours


@both
def test_tensorrt_builds_it(unet, dtype):
    pytest.importorskip("tensorrt_rtx")
    from skipstep.export.tensorrt_engine import build_engine

    built = build_engine(
        lower_precision(unet, dtype), library="tensorrt_rtx", compute_capability=89, batch_sizes=(1, 2)
    )
    assert {each.dtype for each in (*built.inputs, *built.outputs)} == {dtype}
