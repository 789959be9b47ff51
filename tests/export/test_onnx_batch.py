"""Frozen batches, one rule at a time: the freed graph gives each row of any batch what the frozen one gave it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxscript import optimizer

from skipstep.backends.onnxruntime import make_session
from skipstep.export.onnx_batch import free_batch, free_timestep, infer_at, infer_batched, settled
from skipstep.networks.graphs import BATCH

ROWS = np.arange(2 * 3 * 4, dtype=np.float32).reshape(1, 2, 3, 4).repeat(2, 0)


def constant(name, value, dtype=np.int64):
    return numpy_helper.from_array(np.asarray(value, dtype), name)


# Nodes from x [2, 2, 3, 4] to y at a batch of 2, with their constants.
FROZEN = {
    "reshape": ([("Reshape", ["x", "s"], "y", {})], [constant("s", [2, 6, 4])]),
    "reshape that merges": (
        [("Reshape", ["x", "s"], "a", {}), ("Softmax", ["a"], "b", {}), ("Reshape", ["b", "t"], "y", {})],
        [constant("s", [4, 3, 4]), constant("t", [2, 2, -1])],
    ),
    "expand": (
        [("ReduceMean", ["x", "axes"], "a", {}), ("Expand", ["a", "s"], "y", {})],
        [constant("axes", [2, 3]), constant("s", [2, 2, 3, 4])],
    ),
    "resize": (
        [("Resize", ["x", "", "", "s"], "y", {"mode": "nearest"})],
        [constant("s", [2, 2, 6, 8])],
    ),
    "equal rows": ([("Add", ["x", "c"], "y", {})], [constant("c", ROWS, np.float32)]),
    "equal rows beside others": ([("Concat", ["x", "c"], "y", {"axis": 1})], [constant("c", ROWS, np.float32)]),
    "a shape that is computed": (
        [
            ("Shape", ["x"], "a", {}),
            ("Gather", ["a", "zero"], "n", {}),
            ("Concat", ["n", "six", "four"], "s", {"axis": 0}),
            ("Reshape", ["x", "s"], "y", {}),
        ],
        [constant("zero", [0]), constant("six", [6]), constant("four", [4])],
    ),
}


def model_of(nodes, constants, *, inputs=None):
    inputs = inputs or {"x": (TensorProto.FLOAT, [2, 2, 3, 4])}
    graph = helper.make_graph(
        [helper.make_node(op, read, [made], name=made, **attributes) for op, read, made, attributes in nodes],
        "net",
        [helper.make_tensor_value_info(name, *each) for name, each in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(model, **given):
    return make_session(model.SerializeToString(), as_it_stands=True).run(None, given)[0]


@pytest.mark.parametrize("rule", FROZEN)
def test_each_rule(rule):
    frozen = model_of(*FROZEN[rule])
    freed = onnx.ModelProto.FromString(frozen.SerializeToString())
    free_batch(freed, 2, ["x"])
    freed.graph.input[0].type.tensor_type.shape.dim[0].dim_param = BATCH
    shape = infer_batched(freed)["y"]
    assert shape[0] == BATCH
    assert None not in shape
    x = np.random.default_rng(0).standard_normal((4, 2, 3, 4), dtype=np.float32)
    expected = np.concatenate([run(frozen, x=x[:2]), run(frozen, x=x[2:])])
    np.testing.assert_array_equal(run(freed, x=x), expected)
    np.testing.assert_array_equal(run(freed, x=x[:1]), expected[:1])


def test_rows_that_differ_are_no_constant_of_the_batch():
    rows = ROWS + np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1)
    model = model_of([("Add", ["x", "c"], "y", {})], [constant("c", rows, np.float32)])
    free_batch(model, 2, ["x"])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = BATCH
    with pytest.raises(onnx.shape_inference.InferenceError):
        infer_batched(model)


def test_arithmetic_on_shapes_that_inference_does_not_see_through():
    """Half of the height, by a division."""
    nodes = [
        ("Shape", ["x"], "a", {"start": 2, "end": 3}),
        ("Div", ["a", "two"], "h", {}),
        ("Concat", ["zero", "all", "h", "four"], "s", {"axis": 0}),
        ("Reshape", ["x", "s"], "y", {}),
    ]
    constants = [constant(name, [n]) for name, n in (("two", 2), ("zero", 0), ("all", -1), ("four", 4))]
    model = model_of(nodes, constants, inputs={"x": (TensorProto.FLOAT, [BATCH, 2, 4, 4])})
    assert None in infer_batched(model)["y"]
    simplified, shapes = settled(model, optimizer.optimize)
    assert shapes["y"] == [BATCH, 4, 2, 4]
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 4), dtype=np.float32)
    np.testing.assert_array_equal(run(simplified, x=x), run(model, x=x))


@pytest.mark.parametrize(("op", "refused"), [("Unsqueeze", None), ("Range", "Range")])
def test_one_timestep_becomes_one_for_each_sample(op, refused):
    nodes = [("Mul", ["t", "half"], "a", {})]
    if op == "Unsqueeze":
        nodes += [("Unsqueeze", ["a", "axes"], "b", {}), ("Add", ["b", "rows"], "y", {})]
    else:
        nodes += [("Range", ["zero", "a", "half"], "y", {})]
    constants = [
        constant("half", 0.5, np.float32),
        constant("zero", 0.0, np.float32),
        constant("axes", [0]),
        constant("rows", [0.0], np.float32),
    ]
    model = model_of(nodes, constants, inputs={"t": (TensorProto.FLOAT, [])})
    assert run(model, t=np.array(3.0, np.float32)).shape[0] >= 1
    ranks = {name: len(dims) for name, dims in infer_at(model).items()}
    assert free_timestep(model, "t", ranks) == refused
    if refused is None:
        model.graph.input[0].type.tensor_type.shape.dim.add().dim_param = BATCH
        np.testing.assert_array_equal(run(model, t=np.array([3.0, 5.0], np.float32)), [1.5, 2.5])
