"""Nothing is lost on disk: the same bits come out, and the runtime holds the weights as it would have."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from skipstep.export.weight_storage import compress_weights, expand_weights

EXACT = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16).astype(np.float32)
INEXACT = EXACT + np.float32(2**-20)


def tensor(name: str, value: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(value, name)


def floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(nodes, weights, *, outputs=("y",)) -> bytes:
    graph = helper.make_graph(nodes, "g", [floats("x", 2, 64)], [floats(name, 2, 64) for name in outputs], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(made.SerializeToString())


def looped() -> bytes:
    """Three products in a loop, each with the same weight and with one of the branch that it takes."""
    branches = {
        f"{side}_branch": helper.make_graph(
            [helper.make_node("MatMul", ["product", side], [f"{side}_out"])],
            side,
            [],
            [floats(f"{side}_out", 2, 64)],
            [tensor(side, weight)],
        )
        for side, weight in (("then", EXACT[::-1]), ("else", INEXACT))
    }
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["product"]),
            helper.make_node("If", ["go"], ["chosen"], **branches),
            helper.make_node("Tanh", ["chosen"], ["next"]),
            helper.make_node("Identity", ["go"], ["going"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            floats("state", 2, 64),
        ],
        [helper.make_tensor_value_info("going", TensorProto.BOOL, []), floats("next", 2, 64)],
        [tensor("w", EXACT)],
    )
    loop = helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body)
    return model([loop], [tensor("trips", np.array(3, np.int64))])


PLAIN = model(
    [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
    [tensor("w", EXACT), tensor("b", EXACT[0])],
)


def run(graph: bytes) -> bytes:
    session = onnxruntime.InferenceSession(graph)
    return b"".join(result.tobytes() for result in session.run(None, {"x": EXACT[:2]}))


def graphs(graph: onnx.GraphProto):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


@pytest.mark.parametrize(("graph", "stored"), [(PLAIN, 2), (looped(), 2)], ids=["plain", "in a loop"])
def test_half_the_bytes_and_the_same_bits(graph, stored):
    compressed = compress_weights(graph)
    loaded = onnx.load_from_string(compressed)
    onnx.checker.check_model(loaded, full_check=True)
    halves = [t for g in graphs(loaded.graph) for t in g.initializer if t.data_type == TensorProto.FLOAT16]
    assert len(halves) == stored
    saved = sum(2 * int(np.prod(each.dims)) for each in halves)
    assert saved - 150 * stored < len(graph) - len(compressed) < saved
    assert run(compressed) == run(graph)
    assert compress_weights(compressed) == compressed
    assert expand_weights(compressed) == graph == expand_weights(graph)


@pytest.mark.parametrize("graph", [PLAIN, looped()], ids=["plain", "in a loop"])
def test_the_runtime_undoes_it_when_it_loads_the_model(graph, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(compress_weights(graph), options)
    optimised = list(graphs(onnx.load(tmp_path / "optimised.onnx").graph))
    assert not [node for each in optimised for node in each.node if node.op_type == "Cast"]
    assert not [t for each in optimised for t in each.initializer if t.data_type == TensorProto.FLOAT16]


def test_casts_stand_beside_the_weight_and_before_its_first_reader():
    body = next(each for each in graphs(onnx.load_from_string(compress_weights(looped())).graph) if each.name == "body")
    assert [node.op_type for node in body.node] == ["Cast", "MatMul", "If", "Tanh", "Identity"]
    assert body.node[0].output[0] == body.node[1].input[1] == "w"
    assert body.node[0].input[0] == body.initializer[0].name != "w"


@pytest.mark.parametrize(
    "weight",
    [
        INEXACT,
        EXACT.astype(np.float64),
        np.arange(4096),
        np.full((64, 64), 1e5, np.float32),
        np.float32([[1.0]]),  # The cast would take more than it saves.
    ],
    ids=["inexact", "float64", "int64", "beyond float16", "tiny"],
)
def test_what_is_left_alone(weight):
    unread = model([helper.make_node("Tanh", ["x"], ["y"])], [tensor("w", weight)])
    assert compress_weights(unread) == unread


def test_what_others_see_is_left_alone():
    """An output that is a weight, an input with a default, and a weight in another file."""
    as_output = model([helper.make_node("Tanh", ["x"], ["y"])], [tensor("w", EXACT[:2])], outputs=("y", "w"))
    assert compress_weights(as_output) == as_output
    with_default = onnx.load_from_string(PLAIN)
    with_default.graph.input.append(floats("w", 64, 64))
    compressed = onnx.load_from_string(compress_weights(with_default.SerializeToString()))
    assert compressed.graph.initializer[0] == with_default.graph.initializer[0]
    outside = onnx.load_from_string(PLAIN)
    for weight in outside.graph.initializer:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="weights.bin")
    assert compress_weights(outside.SerializeToString()) == outside.SerializeToString()


def test_names_that_are_taken():
    clash = model(
        [helper.make_node("MatMul", ["x", "w"], ["w/stored"]), helper.make_node("Add", ["w/stored", "x"], ["y"])],
        [tensor("w", EXACT)],
    )
    assert run(compress_weights(clash)) == run(clash)


@given(arrays.arrays(np.float16, 128, elements=st.floats(width=16, allow_nan=True, allow_infinity=True)))
def test_every_bit_of_what_float16_holds(half):
    exact = half.astype(np.float32)
    graph = model([helper.make_node("Tanh", ["x"], ["y"])], [tensor("w", exact)])
    (stored,) = onnx.load_from_string(compress_weights(graph)).graph.initializer
    assert numpy_helper.to_array(stored).astype(np.float32).tobytes() == exact.tobytes()
