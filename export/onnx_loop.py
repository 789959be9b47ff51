"""The whole sampling loop as one ONNX graph: the network and the step, as many times as there are rows of weights.

    inputs    x, x0 [B, n]; memory, base where a solver keeps them                n = C·H·W
              table [E, 1 or B, columns]                                          skipstep.loop_table
              NAME/rows for each value that the network reads beside the state; plan_index, call_index [E, N] and
              prompt_index [N] say which row each stage and sample has            skipstep.backends.onnxruntime
              copies [2], guidance, rescale [B, 1]; noise [E or 1, B, n]          where the features have them
    outputs   x_next, x0_next (the last predicted image), memory_next, base_next

Nothing of a plan is in the graph, nor the number of stages, nor the batch size: one graph, loaded once, runs any part
of any plan at any batch size, whole or in pieces. With guidance the network's batch N is 2B (copies is 2, 1);
without, N is B, and what guidance scales is the difference of a prediction and itself.

The network's weights are initializers of the loop's body: from outside it ONNX Runtime would not prepack them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from skipstep.export.partition import Binding, Partition
from skipstep.kernels.layout import Column
from skipstep.kernels.statistics import Thresholding, rank
from skipstep.loop_table import WRITE_BASE, LoopFeatures
from skipstep.network import NetworkSpec

INDEX_NAMES = {Binding.PLAN: "plan_index", Binding.CALL: "call_index", Binding.PROMPT: "prompt_index"}
_LAST = np.iinfo(np.int64).max
Dims = list[int | str | None]


class GraphWriter:
    """Nodes and constants of one graph, by the names of what they give."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._count = 0
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def name(self) -> str:
        self._count += 1
        return f"{self._prefix}/{self._count}"

    def add(self, op_type: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        output = to or self.name()
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def cast(self, value: str, elem_type: int) -> str:
        output = self.name()
        self.nodes.append(helper.make_node("Cast", [value], [output], name=output, to=elem_type))
        return output

    def split(self, value: str, num_outputs: int, *, axis: int) -> list[str]:
        outputs = [self.name() for _ in range(num_outputs)]
        self.nodes.append(
            helper.make_node("Split", [value], outputs, name=outputs[0], axis=axis, num_outputs=num_outputs)
        )
        return outputs

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"{self._prefix}/constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name


def build_loop(parts: Partition, network: NetworkSpec, features: LoopFeatures) -> bytes:
    """Serialise the loop around the step network of `parts`."""
    return bytes(loop_model(parts, network, features).SerializeToString())


def loop_model(parts: Partition, network: NetworkSpec, features: LoopFeatures) -> ModelProto:
    step = onnx.load_from_string(parts.graphs.step)
    conditions = condition_times(step.graph, parts)
    outer = GraphWriter("loop")
    for value, time in conditions.items():
        if time == Binding.PROMPT:  # The same at every stage.
            outer.add("Gather", f"{value}/rows", INDEX_NAMES[time], to=value)
    if features.guided:
        batch = outer.add("Shape", "x", to="batch_size", start=0, end=1)
        outer.add("Neg", batch, to="minus_batch_size")
    trips = outer.add("Squeeze", outer.add("Shape", "table", start=0, end=1))
    carried = ("x0", *features.carried)
    body = _body(step.graph, network, features, conditions)
    outputs = [f"{name}_next" for name in carried]
    outer.nodes.append(helper.make_node("Loop", [trips, "", *carried], outputs, name="loop", body=body))
    shape: Dims = ["samples", network.num_elements]
    graph = helper.make_graph(
        outer.nodes,
        "sampling_loop",
        _inputs(step.graph, network, features, conditions),
        [floats(name, shape) for name in outputs],
        outer.constants,
    )
    model = helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version)
    onnx.checker.check_model(model)
    return model


def condition_times(step: GraphProto, parts: Partition) -> dict[str, Binding]:
    """When each value that the step reads beside the state is known."""
    times = {name: time for time, names in parts.crossing.items() for name in names}
    # Inputs of the whole network that its step reads as they are.
    times["timestep"] = Binding.PLAN
    return {each.name: times.get(each.name, Binding.PROMPT) for each in step.input if each.name != "sample"}


def _inputs(
    step: GraphProto, network: NetworkSpec, features: LoopFeatures, conditions: dict[str, Binding]
) -> list[ValueInfoProto]:
    shape: Dims = ["samples", network.num_elements]
    inputs = [
        *(floats(name, shape) for name in ("x0", *features.carried)),
        floats("table", ["stages", "plans", len(features.columns)]),
    ]
    for each in step.input:
        if each.name in conditions:
            tensor = each.type.tensor_type
            dims = [dim.dim_value for dim in tensor.shape.dim[1:]]
            inputs.append(helper.make_tensor_value_info(f"{each.name}/rows", tensor.elem_type, [None, *dims]))
    for time in dict.fromkeys(conditions.values()):
        dims = ["network_batch"] if time == Binding.PROMPT else ["stages", "network_batch"]
        inputs.append(helper.make_tensor_value_info(INDEX_NAMES[time], TensorProto.INT64, dims))
    if features.guided:
        inputs.append(helper.make_tensor_value_info("copies", TensorProto.INT64, [2]))
        inputs.append(floats("guidance", ["samples", 1]))
    if features.rescale:
        inputs.append(floats("rescale", ["samples", 1]))
    if features.noise:
        inputs.append(floats("noise", ["noise_stages", *shape]))
    return inputs


def _body(step: GraphProto, network: NetworkSpec, features: LoopFeatures, conditions: dict[str, Binding]) -> GraphProto:
    writer = GraphWriter("body")
    state = [f"{name}_now" for name in features.carried]
    read_network_input(writer, "x_now", step, network, features)
    rows = {
        time: writer.add("Gather", INDEX_NAMES[time], "stage", axis=0)
        for time in dict.fromkeys(conditions.values())
        if time != Binding.PROMPT
    }
    for value, time in conditions.items():
        if time in rows:
            writer.add("Gather", f"{value}/rows", rows[time], to=value)
    writer.nodes.extend(step.node)

    noise = None
    if features.noise:
        last = writer.add("Sub", writer.add("Shape", "noise", start=0, end=1), writer.constant([1]))
        # A plan without noise is given one row of zeros for all stages.
        place = writer.add("Squeeze", writer.add("Min", "stage", last))
        noise = writer.add("Gather", "noise", place, axis=0)
    columns = writer.split(writer.add("Gather", "table", "stage", axis=0), len(features.columns), axis=1)
    image, results = write_step(
        writer,
        state,
        network,
        features,
        output=step.output[0],
        row=dict(zip(features.columns, columns, strict=True)),
        noise=noise,
    )
    writer.add("Identity", "go_on", to="still_go_on")
    shape: Dims = ["samples", network.num_elements]
    return helper.make_graph(
        writer.nodes,
        "evaluation",
        [
            helper.make_tensor_value_info("stage", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            *(floats(name, shape) for name in ("x0_now", *state)),
        ],
        [
            helper.make_tensor_value_info("still_go_on", TensorProto.BOOL, []),
            *(floats(name, shape) for name in (image, *results)),
        ],
        [*step.initializer, *writer.constants],
    )


def read_network_input(
    writer: GraphWriter, x: str, step: GraphProto, network: NetworkSpec, features: LoopFeatures
) -> None:
    """The state as the network reads it: as an image, twice where it is guided, in the network's dtype."""
    network_type = next(each.type.tensor_type.elem_type for each in step.input if each.name == "sample")
    if features.guided:
        x = writer.add("Tile", x, "copies")
    if network_type != TensorProto.FLOAT:
        x = writer.cast(x, network_type)
    writer.add("Reshape", x, writer.constant([-1, *network.sample_shape]), to="sample")


def write_step(
    writer: GraphWriter,
    state: Sequence[str],
    network: NetworkSpec,
    features: LoopFeatures,
    *,
    output: ValueInfoProto,
    row: Mapping[int, str],
    noise: str | None,
) -> tuple[str, list[str]]:
    """One step from what the network gave: the predicted image, and what `state` becomes (kernels.step_numpy)."""
    values = dict(zip(features.carried, state, strict=True))
    x = values["x"]
    out, variance = _predictions(writer, output, network, features)

    def weighted(column: int, value: str) -> str:
        return writer.add("Mul", value, row[column])

    def combined(*terms: tuple[int, str]) -> str:
        products = [weighted(column, value) for column, value in terms]
        return reduce(lambda total, product: writer.add("Add", total, product), products)

    image = combined((Column.X0_X, x), (Column.X0_OUT, out))
    if features.clip:
        # Min and Max keep NaN, where Clip need not.
        image = writer.add("Max", writer.add("Min", image, row[Column.CLIP]), writer.add("Neg", row[Column.CLIP]))
    if features.thresholding is not None:
        image = _threshold(writer, image, features.thresholding, network.num_elements)
    eps = out
    if features.converts or features.rederive:
        eps = combined((Column.EPS_X, x), (Column.EPS_OUT, out))
    if features.rederive:
        eps = writer.add("Add", combined((Column.RE_X, x), (Column.RE_X0, image)), eps)

    terms = [(Column.C_X0, image), (Column.C_EPS, eps)]
    if features.state:
        terms.append((Column.C_X, x))
    if features.base:
        terms.append((Column.C_BASE, values["base"]))
    if features.memory:
        terms.append((Column.C_MEMORY, values["memory"]))
    if noise is not None:
        if variance is not None:
            scaled = writer.add("Add", weighted(Column.LOG_SIGMA_OUT, variance), row[Column.LOG_SIGMA])
            noise = writer.add("Mul", noise, writer.add("Exp", scaled))
        terms.append((Column.SIGMA, noise))
    results = [combined(*terms)]
    if features.memory:
        results.append(
            combined((Column.M_X, x), (Column.M_X0, image), (Column.M_EPS, eps), (Column.M_MEMORY, values["memory"]))
        )
    if features.base:
        written = writer.add("Equal", row[WRITE_BASE], writer.constant(1.0, np.float32))
        results.append(writer.add("Where", written, x, values["base"]))
    return image, results


def _predictions(
    writer: GraphWriter, output: ValueInfoProto, network: NetworkSpec, features: LoopFeatures
) -> tuple[str, str | None]:
    """What the network predicts `[B, n]`, guidance included, and what it says of the variance."""
    out, variance = output.name, None
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        out = writer.cast(out, TensorProto.FLOAT)
    flat = writer.constant([-1, network.num_elements])
    if network.learns_variance:
        out, wide = writer.split(out, 2, axis=1)
        if features.learned_variance:
            variance = writer.add("Reshape", wide, flat)
    out = writer.add("Reshape", out, flat)
    if features.guided:
        out, conditional = _guide(writer, out)
        variance = None if variance is None else _first_half(writer, variance)
        if features.rescale:
            out = _rescale(writer, out, conditional)
    return out, variance


def _first_half(writer: GraphWriter, value: str) -> str:
    return writer.add("Slice", value, writer.constant([0]), "batch_size", writer.constant([0]))


def _guide(writer: GraphWriter, out: str) -> tuple[str, str]:
    """u + guidance·(c - u), and c."""
    conditional = _first_half(writer, out)
    unconditional = writer.add("Slice", out, "minus_batch_size", writer.constant([_LAST]), writer.constant([0]))
    difference = writer.add("Sub", conditional, unconditional)
    return writer.add("Add", unconditional, writer.add("Mul", "guidance", difference)), conditional


def _rescale(writer: GraphWriter, guided: str, conditional: str) -> str:
    """guided·(phi·std(conditional)/std(guided) + 1 - phi), where a prediction without spread counts as unchanged."""
    axis = writer.constant([1])

    def spread(value: str) -> str:
        value = writer.cast(value, TensorProto.DOUBLE)
        centred = writer.add("Sub", value, writer.add("ReduceMean", value, axis))
        return writer.add("Sqrt", writer.add("ReduceMean", writer.add("Mul", centred, centred), axis))

    of_guided = spread(guided)
    one = writer.constant(1.0, np.float64)
    constant = writer.add("Equal", of_guided, writer.constant(0.0, np.float64))
    ratio = writer.add("Where", constant, one, writer.add("Div", spread(conditional), of_guided))
    strength = writer.cast("rescale", TensorProto.DOUBLE)
    factor = writer.add("Add", writer.add("Mul", strength, ratio), writer.add("Sub", one, strength))
    return writer.add("Mul", guided, writer.cast(factor, TensorProto.FLOAT))


def _threshold(writer: GraphWriter, image: str, parameters: Thresholding, num_elements: int) -> str:
    """clamp(image, ±s)/s with each sample's own bound s (skipstep.kernels.statistics)."""
    low, weight = rank(num_elements, parameters.quantile)
    largest, places = writer.name(), writer.name()
    count = writer.constant([num_elements - low])
    writer.nodes.append(
        helper.make_node("TopK", [writer.add("Abs", image), count], [largest, places], name=largest, axis=1)
    )

    def from_end(place: int) -> str:
        end = writer.constant([_LAST if place == 1 else 1 - place])
        return writer.add("Slice", largest, writer.constant([-place]), end, writer.constant([1]))

    bound = from_end(1)
    if weight:
        step = writer.add("Sub", from_end(2), bound)
        bound = writer.add("Add", bound, writer.add("Mul", writer.constant(weight, np.float32), step))
    bound = writer.add("Max", bound, writer.constant(1.0, np.float32))
    bound = writer.add("Min", bound, writer.constant(parameters.maximum, np.float32))
    image = writer.add("Max", writer.add("Min", image, bound), writer.add("Neg", bound))
    return writer.add("Div", image, bound)


def floats(name: str, shape: Dims) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
