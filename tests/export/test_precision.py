"""Half-precision networks: as near to the float32 one as their dtype allows, also where half precision alone is not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from step_networks import unet_step
from tolerances import BFLOAT16_NETWORK, FLOAT16_NETWORK
from torch import Tensor, nn

from skipstep.errors import ExportError
from skipstep.export.precision import lower_precision

ATTENTION = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
NUMPY = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ONNX = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
TOLERANCE = {"float16": FLOAT16_NETWORK, "bfloat16": BFLOAT16_NETWORK}
DELICATE = ("InstanceNormalization", "Softmax", "ReduceMean", "Sqrt")
both = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@pytest.fixture(scope="module", params=["convolutions", pytest.param("attention", marks=pytest.mark.slow)])
def unet(request) -> bytes:
    return unet_step(**(ATTENTION if request.param == "attention" else {}))


def traced(module: nn.Module, *inputs: Tensor) -> bytes:
    """Of one input `x`, its batch fixed, opset 20."""
    program = torch.onnx.export(
        module.eval(), inputs, dynamo=True, opset_version=20, verbose=False, input_names=["x"], output_names=["y"]
    )
    return bytes(program.model_proto.SerializeToString())


def model(*nodes: onnx.NodeProto, weights=(), x=(2, 4), y=(2, 4)) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(made.SerializeToString())


def inputs_of(graph: bytes, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Values that `dtype` holds exactly, so that only what the network does differs."""
    random = np.random.default_rng(seed)
    return {
        each.name: random.standard_normal([d.dim_value or 2 for d in each.type.tensor_type.shape.dim]).astype(
            NUMPY[dtype]
        )
        for each in onnx.load_from_string(graph).graph.input
    }


def error(graph: bytes, lowered: bytes, dtype: str) -> float:
    """The largest error relative to the largest output. The evaluator computes each node in the dtype that it has."""
    inputs = inputs_of(graph, dtype)
    exact = {name: value.astype(np.float32) for name, value in inputs.items()}
    (expected,) = ReferenceEvaluator(onnx.load_from_string(graph)).run(None, exact)
    with np.errstate(over="ignore", invalid="ignore"):
        (got,) = ReferenceEvaluator(onnx.load_from_string(lowered)).run(None, inputs)
        assert got.dtype == NUMPY[dtype]
        assert got.shape == expected.shape
        return float(np.abs(got.astype(np.float32) - expected).max() / np.abs(expected).max())


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


def types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element types by name, those of inner graphs too."""
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    found |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= types(attribute.g)
    return found


def inspected(lowered: bytes) -> tuple[onnx.GraphProto, dict[str, int]]:
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(lowered), strict_mode=True).graph
    return graph, types(graph)


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


def test_a_weight_beyond_the_range_is_named():
    weight = np.eye(4, dtype=np.float32)
    weight[1, 2] = -7e4
    graph = model(helper.make_node("MatMul", ["x", "big"], ["y"], name="product"), weights=[("big", weight)])
    with pytest.raises(ExportError, match=r"'big', read by MatMul 'product', with values up to 7e\+04; .*float16"):
        lower_precision(graph, "float16")
    assert error(graph, lower_precision(graph, "bfloat16"), "bfloat16") < BFLOAT16_NETWORK
    weight[1, 2] = 3.4e38  # Rounds to infinity in bfloat16.
    graph = model(helper.make_node("MatMul", ["x", "big"], ["y"], name="product"), weights=[("big", weight)])
    with pytest.raises(ExportError, match="'big'"):
        lower_precision(graph, "bfloat16")


def test_a_weight_that_would_vanish_is_named():
    vanishing = np.full((4, 4), 1e-9, np.float32)
    graph = model(helper.make_node("MatMul", ["x", "small"], ["y"]), weights=[("small", vanishing)])
    with pytest.raises(ExportError, match="'small'"):
        lower_precision(graph, "float16")
    # A single one that does is rounding, as everywhere.
    vanishing[0, 0] = 1
    graph = model(helper.make_node("MatMul", ["x", "small"], ["y"]), weights=[("small", vanishing)])
    assert error(graph, lower_precision(graph, "float16"), "float16") < FLOAT16_NETWORK


@both
@pytest.mark.parametrize(("bound", "number"), [("Max", 1e-12), ("Min", 1e6), ("Max", np.finfo(np.float32).min)])
def test_arithmetic_with_a_constant_that_does_not_fit_is_float32(bound, number, dtype):
    """As in guards against division by zero, and in masks."""
    graph = model(
        helper.make_node("Abs", ["x"], ["size"]),
        helper.make_node(bound, ["size", "number"], ["guarded"]),
        helper.make_node("Div", ["x", "guarded"], ["y"]),
        weights=[("number", np.float32(number))],
    )
    assert error(graph, lower_precision(graph, dtype), dtype) < TOLERANCE[dtype]


@both
def test_a_timestep_stays_accurate_until_a_product(dtype):
    """999 times a frequency has no meaning in half precision once a sine is taken of it."""
    graph = model(
        helper.make_node("Constant", [], ["step"], value=numpy_helper.from_array(np.array([997, 998]))),
        helper.make_node("Cast", ["step"], ["time"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["time", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "frequencies"], ["phase"]),
        helper.make_node("Sin", ["phase"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "weight"], ["projected"]),
        helper.make_node("Add", ["x", "projected"], ["y"]),
        weights=[
            ("axis", np.array([1])),
            ("frequencies", np.float32([1.0, 0.31, 0.1, 0.031])),
            ("weight", np.eye(4, dtype=np.float32)),
        ],
    )
    lowered = lower_precision(graph, dtype)
    assert error(graph, lowered, dtype) < TOLERANCE[dtype]
    _, dtypes = inspected(lowered)
    assert dtypes["phase"] == TensorProto.FLOAT
    assert dtypes["projected"] == ONNX[dtype]


@both
def test_an_output_of_a_float32_node_keeps_its_name(dtype):
    graph = model(
        helper.make_node("Softmax", ["x"], ["y"]),
        helper.make_node("Exp", ["y"], ["unused"]),
    )
    lowered = lower_precision(graph, dtype)
    assert onnx.load_from_string(lowered).graph.output[0].name == "y"
    assert error(graph, lowered, dtype) < TOLERANCE[dtype]


@both
def test_filled_shapes_and_constants_serve_both_dtypes(dtype):
    fill = numpy_helper.from_array(np.float32([0.5]), "fill")
    graph = model(
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["half"], value=fill),
        helper.make_node("ConstantOfShape", ["shape"], ["none"]),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "half"], ["raised"]),
        helper.make_node("Add", ["raised", "none"], ["same"]),
        helper.make_node("Softmax", ["same"], ["share"]),
        helper.make_node("Mul", ["share", "half"], ["halved"]),
        helper.make_node("Mul", ["halved", "row"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "w"], ["again"]),
        helper.make_node("Add", ["again", "row"], ["moved"]),
        helper.make_node("Add", ["moved", "half"], ["y"]),
        weights=[("w", np.eye(4, dtype=np.float32)), ("row", np.float32([1.1, -2.2, 3.3, 4.4]))],
    )
    lowered = lower_precision(graph, dtype)
    assert error(graph, lowered, dtype) < TOLERANCE[dtype]
    _, dtypes = inspected(lowered)
    assert dtypes["half"] == dtypes[f"row/{dtype}"] == ONNX[dtype]
    assert dtypes["row"] == dtypes["scaled"] == TensorProto.FLOAT


def branch(name: str, *nodes: onnx.NodeProto, weights=()) -> onnx.GraphProto:
    result = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, (2, 4))
    tensors = [numpy_helper.from_array(value, name) for name, value in weights]
    return helper.make_graph(list(nodes), name, [], [result], tensors)


@both
@pytest.mark.parametrize("condition", [True, False])
def test_branches(dtype, condition):
    weight = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    product = branch("product", helper.make_node("MatMul", ["hidden", "inner"], ["p"]), weights=[("inner", weight)])
    outer = branch("outer", helper.make_node("Add", ["hidden", "w"], ["s"]))
    graph = model(
        helper.make_node("MatMul", ["x", "square"], ["hidden"]),
        helper.make_node("If", ["condition"], ["chosen"], then_branch=product, else_branch=outer),
        helper.make_node("MatMul", ["chosen", "square"], ["y"]),
        weights=[("condition", np.array(condition)), ("w", weight[:2]), ("square", weight)],
    )
    lowered = lower_precision(graph, dtype)
    assert error(graph, lowered, dtype) < TOLERANCE[dtype]
    _, dtypes = inspected(lowered)
    assert dtypes["inner"] == dtypes["square"] == ONNX[dtype]


@both
def test_a_loop_carries_float32(dtype):
    """A thousand small steps would be lost in a sum that is rounded at each."""
    weight = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["change"]),
            helper.make_node("Mul", ["change", "rate"], ["small"]),
            helper.make_node("Add", ["state", "small"], ["next"]),
            helper.make_node("Identity", ["go"], ["going"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, (2, 4)),
        ],
        [
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, (2, 4)),
        ],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(1e-3), "rate")],
    )
    graph = model(
        helper.make_node("Loop", ["trips", "", "x"], ["last"], body=body),
        helper.make_node("MatMul", ["last", "square"], ["y"]),
        weights=[("trips", np.array(1000)), ("square", weight)],
    )
    lowered = lower_precision(graph, dtype)
    assert error(graph, lowered, dtype) < TOLERANCE[dtype]
    _, dtypes = inspected(lowered)
    assert dtypes["next"] == TensorProto.FLOAT
    assert dtypes["w"] == dtypes["change"] == ONNX[dtype]


def with_odd_operator() -> onnx.ModelProto:
    nodes = helper.make_node("Odd", ["x"], ["z"], name="mine", domain="odd"), helper.make_node("Tanh", ["z"], ["y"])
    graph = onnx.load_from_string(model(*nodes))
    graph.opset_import.add(domain="odd", version=1)
    return graph


@both
def test_an_unknown_operator_gets_float32(dtype):
    graph = with_odd_operator()
    graph.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (2, 4)))
    lowered = onnx.load_from_string(lower_precision(graph.SerializeToString(), dtype)).graph
    assert [node.op_type for node in lowered.node] == ["Cast", "Odd", "Tanh", "Cast"]
    assert [node.attribute[0].i for node in lowered.node[::3]] == [TensorProto.FLOAT, ONNX[dtype]]


@both
def test_a_value_of_unknown_type_is_named(dtype):
    with pytest.raises(ExportError, match="'z' from Odd 'mine'"):
        lower_precision(with_odd_operator().SerializeToString(), dtype)


@both
def test_tensorrt_builds_it(unet, dtype):
    pytest.importorskip("tensorrt_rtx")
    from skipstep.export.tensorrt_engine import build_engine

    built = build_engine(
        lower_precision(unet, dtype), library="tensorrt_rtx", compute_capability=89, batch_sizes=(1, 2)
    )
    assert {each.dtype for each in (*built.inputs, *built.outputs)} == {dtype}
