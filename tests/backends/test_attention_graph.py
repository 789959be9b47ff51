"""Attention as one operator of ONNX Runtime: where it is taken, where it is left, and that the function stays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from skipstep.backends.onnxruntime import make_session
from skipstep.backends.onnxruntime_graph import with_attention
from skipstep.demo import SHIPPED_BUNDLE

LAYERS = 4


@pytest.fixture
def model() -> onnx.ModelProto:
    """The shipped step network: four layers of self-attention."""
    return onnx.load(next(SHIPPED_BUNDLE.rglob("step.onnx")))


def outputs(model: bytes, batch_size: int) -> np.ndarray:
    session, numbers = make_session(model, num_threads=1), np.random.default_rng(0)
    given = {
        each.name: numbers.standard_normal((batch_size, *each.shape[1:])).astype(np.float32)
        for each in session.get_inputs()
    }
    return session.run(None, given)[0]


def sharper(model: onnx.ModelProto) -> None:
    """Scores times nine, so that a wrong scale shows."""
    scale = next(each for each in model.graph.initializer if each.name == "val_261")
    scale.CopyFrom(numpy_helper.from_array(3 * numpy_helper.to_array(scale), scale.name))


@pytest.mark.parametrize("change", [lambda model: None, sharper])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_layer_is_one_node_and_the_function_stays(model, change, batch_size):
    change(model)
    whole = model.SerializeToString()
    fused = with_attention(whole)
    onnx.checker.check_model(onnx.load_from_string(fused))
    count = Counter(node.op_type for node in onnx.load_from_string(fused).graph.node)
    assert (count["Attention"], count["Softmax"], count["MatMul"]) == (LAYERS, 0, LAYERS)
    np.testing.assert_allclose(outputs(fused, batch_size), outputs(whole, batch_size), rtol=0, atol=5e-6)


def without_biases(softmax: onnx.NodeProto, model: onnx.ModelProto) -> None:
    names = {}
    for node in [each for each in model.graph.node if each.input[-1].endswith(("to_q.bias", "to_k.bias", "to_v.bias"))]:
        names[node.output[0]] = node.input[0]
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def other_axis(softmax: onnx.NodeProto, model: onnx.ModelProto) -> None:
    softmax.attribute[0].i = 2


def other_order(softmax: onnx.NodeProto, model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Transpose" and list(node.attribute[0].ints) == [0, 2, 1, 3]:
            node.attribute[0].ints[:] = [0, 3, 1, 2]


def read_elsewhere(softmax: onnx.NodeProto, model: onnx.ModelProto) -> None:
    for node in [each for each in model.graph.node if each.op_type == "Softmax"]:
        model.graph.node.append(helper.make_node("Identity", [node.output[0]], [f"{node.output[0]}/seen"]))


def weights_given(softmax: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """The first product of each layer reads what a call gives."""
    model.graph.input.append(helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, [128, 128]))
    for node in [each for each in model.graph.node if each.op_type == "MatMul" and "transpose" in each.input[0]]:
        node.input[1] = "given" if node.input[0].startswith("transpose") else node.input[1]


@pytest.mark.parametrize("change", [without_biases, other_axis, other_order, read_elsewhere, weights_given])
def test_what_is_something_else_is_left_as_it_is(model, change):
    layers = [node for node in model.graph.node if node.op_type == "Softmax"]
    for softmax in layers:
        change(softmax, model)
    whole = model.SerializeToString()
    assert with_attention(whole) == whole


@pytest.mark.parametrize("broken", [b"\xff\xff", b"no model", b""])
def test_bytes_that_are_no_model_are_refused(broken):
    with pytest.raises(ValueError, match=r"field|number|unpack"):
        with_attention(broken)
