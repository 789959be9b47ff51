"""Half precision in graphs made by hand: constants, timesteps, branches, loops and unknown operators."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from precision_cases import ONNX, TOLERANCE, both, error, inspected
from tolerances import BFLOAT16_NETWORK, FLOAT16_NETWORK

from skipstep.errors import ExportError
from skipstep.export.precision import lower_precision


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
