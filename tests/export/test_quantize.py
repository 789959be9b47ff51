"""Step networks with layers in 8 bits: what is inserted, in what types, and that layers are chosen by measurement."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from skipstep.backends.onnxruntime import make_session, run_session
from skipstep.errors import ExportError
from skipstep.export.quantize import find_layers, measure_ranges, quantize
from skipstep.export.sensitivity import BOUND, ROUNDS, PixelError, choose_layers

CHANNELS, SIZE = 8, 6


def step_network(half: bool = False, opset: int = 20) -> bytes:
    """Four convolutions and a matrix product, in float32 or float16."""
    rng = np.random.default_rng(0)
    dtype = np.float16 if half else np.float32
    elem = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    shapes = [(CHANNELS, 1, 3, 3), (CHANNELS, CHANNELS, 3, 3), (CHANNELS, CHANNELS, 3, 3), (1, CHANNELS, 3, 3)]
    weights = [rng.standard_normal(shape) / 8 for shape in shapes] + [rng.standard_normal((SIZE, SIZE)) / 3]
    constants = [numpy_helper.from_array(each.astype(dtype), f"w{i}") for i, each in enumerate(weights)]
    nodes, value = [], "sample"
    for i in range(3):
        nodes += [
            helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}"),
        ]
        value = f"r{i}"
    nodes += [
        helper.make_node("MatMul", [value, "w4"], ["m"], name="product"),
        helper.make_node("Conv", ["m", "w3"], ["out_sample"], name="conv3", pads=[1, 1, 1, 1]),
    ]
    shape = ["batch", 1, SIZE, SIZE]
    ends = [helper.make_tensor_value_info(name, elem, shape) for name in ("sample", "out_sample")]
    graph = helper.make_graph(nodes, "step", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


STEP = step_network()
INPUTS = [{"sample": np.random.default_rng(i).standard_normal((4, 1, SIZE, SIZE), np.float32)} for i in range(3)]


def ranges():
    return measure_ranges(STEP, find_layers(STEP), INPUTS)


def predict(graph: bytes, inputs=INPUTS[0]) -> np.ndarray:
    return run_session(make_session(graph, as_it_stands=True), ["out_sample"], inputs)["out_sample"]


def relative_error(graph: bytes) -> float:
    exact = predict(STEP)
    return float(np.abs(predict(graph) - exact).max() / np.abs(exact).max())


def test_first_and_last_convolution_are_left_out():
    assert list(find_layers(STEP)) == ["conv1", "conv2", "product"]


@pytest.mark.parametrize("results", [False, True])
@pytest.mark.parametrize(("kind", "symmetric"), [("int8", True), ("int8", False), ("fp8", True)])
def test_rounded_network_is_close_and_not_the_same(kind, symmetric, results):
    graph = quantize(STEP, ranges(), kind, symmetric=symmetric, results=results)
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    assert 1e-4 < relative_error(graph) < (0.05 if kind == "int8" else 0.15)


@pytest.mark.parametrize(("kind", "dtype"), [("int8", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)])
def test_weights_have_a_scale_for_each_channel_and_activations_one(kind, dtype):
    model = onnx.load_from_string(quantize(STEP, ranges(), kind))
    constants = {each.name: each for each in model.graph.initializer}
    value = "r0/centred" if kind == "int8" else "r0"
    assert constants["w1/" + kind].data_type == dtype
    assert list(constants["w1/scale"].dims) == [CHANNELS]
    assert list(constants["w4/scale"].dims) == [SIZE]
    assert list(constants[f"{value}/scale"].dims) == []
    assert "w1" not in constants
    assert constants["w0"].data_type == TensorProto.FLOAT
    largest = np.abs(numpy_helper.to_array(constants["w1/" + kind]).astype(np.float32)).max(axis=(1, 2, 3))
    np.testing.assert_allclose(largest, 127 if kind == "int8" else 448)


def test_a_convolution_of_what_is_never_negative_reads_it_around_its_centre():
    """As close as with zero points, at the border, too; a matrix product, whose values lie around zero, as it was."""
    only = {"conv1": ranges()["conv1"]}
    graphs = [quantize(STEP, only, "int8", symmetric=symmetric) for symmetric in (True, False)]
    assert 0.5 < relative_error(graphs[0]) / relative_error(graphs[1]) < 1.5
    constants = {each.name: each for each in onnx.load_from_string(graphs[0]).graph.initializer}
    assert list(constants["c1/centre"].dims) == [1, CHANNELS, SIZE, SIZE]
    assert "m/centre" not in constants


def test_symmetric_pairs_have_no_zero_point_and_others_use_the_whole_range():
    zeros = {}
    for symmetric in (True, False):
        model = onnx.load_from_string(quantize(STEP, ranges(), "int8", symmetric=symmetric))
        constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        zeros[symmetric] = int(constants["r0/centred/zero" if symmetric else "r0/zero"])
    assert zeros == {True: 0, False: -128}  # What a Relu gives is never negative.


def test_pairs_in_half_precision_have_scales_in_half_precision():
    model = onnx.load_from_string(quantize(step_network(half=True), ranges(), "int8"))
    onnx.checker.check_model(model, full_check=True)
    scales = [each for each in model.graph.initializer if each.name.endswith("/scale")]
    assert len(scales) == 6
    assert {each.data_type for each in scales} == {TensorProto.FLOAT16}


def test_ranges_cut_an_outlier_and_keep_the_rest():
    inputs = [{"sample": each["sample"].copy()} for each in INPUTS]
    inputs[0]["sample"] = np.random.default_rng(9).standard_normal((4000, 1, SIZE, SIZE), np.float32)
    calm = measure_ranges(STEP, find_layers(STEP), inputs)["conv1"][0]
    inputs[0]["sample"][0, 0, 0, 0] = 60.0
    cut = measure_ranges(STEP, find_layers(STEP), inputs)["conv1"][0]
    session_largest = run_session(make_session(_with_output("r0")), ["r0"], inputs[0])["r0"].max()
    assert cut[1] < session_largest / 2
    assert 0.5 * calm[1] < cut[1] < 2.5 * calm[1]


def _with_output(name: str) -> bytes:
    model = onnx.load_from_string(STEP)
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return model.SerializeToString()


def choose(errors: dict[str, float], surprising: str | None = None):
    """Choose among layers of which each adds a given error, independent of the others; that of a surprising one is a
    hundred times as large in samples that do not calibrate."""
    drawn = []

    def draw(graph: bytes, plan: str, number: int) -> np.ndarray:
        rng, total = np.random.default_rng(number), np.zeros(256, np.float32)
        for name in graph.decode().split(",") if graph != STEP else []:
            total += errors[name] * (100 if number and name == surprising else 1) * rng.standard_normal(256)
        drawn.append(number)
        return total

    return choose_layers(STEP, list(errors), lambda layers: ",".join(layers).encode(), draw, ["a", "b"]), drawn


def test_a_sensitive_layer_stays_in_float():
    choice, drawn = choose({"conv1": 0.001, "conv2": 0.5, "product": 0.001})
    assert set(choice.layers) == {"conv1", "product"}
    assert choice.errors.keys() == {"a", "b"}
    assert choice.samples == 256 * ROUNDS
    assert set(drawn) == set(range(ROUNDS + 1))
    assert choice.facts()["layers"] == 2
    assert 0.3 < choice.share < 0.6


def test_a_layer_that_changes_new_samples_is_left_out_and_the_rest_tried_on_others():
    choice, drawn = choose({"conv1": 0.0004, "product": 0.0004, "conv2": 0.0005}, surprising="conv2")
    assert "conv2" not in choice.layers
    assert all(each.within(BOUND) for each in choice.errors.values())
    assert len(choice.tried) >= 1
    assert "of the operations: 0.1" in choice.tried[0]
    assert max(drawn) == ROUNDS * (len(choice.tried) + 1)


def test_errors_add_up_and_not_all_fit():
    assert len(choose({"conv1": 0.0014, "conv2": 0.0014, "product": 0.0014})[0].layers) == 1


@pytest.mark.parametrize(
    ("errors", "surprising", "said"),
    [
        ({"conv1": 0.5, "conv2": 0.5}, None, "among 2 layers.*1 layers, .*: [12]"),
        ({"conv1": 0.001}, "conv1", "1 layers, .* of the operations: 0.[23]"),
    ],
)
def test_no_choice_that_holds_is_an_error_with_what_was_tried(errors, surprising, said):
    with pytest.raises(ExportError, match=said):
        choose(errors, surprising)


def test_error_of_latents_is_in_parts_of_half_the_largest():
    for largest, unit in ((1.5, 1), (10.0, 5)):
        exact = np.array([largest, -1.0], np.float32)
        assert PixelError.between(exact + 1, exact) == PixelError(pytest.approx(1 / unit), pytest.approx(1 / unit))
