"""The whole sampling loop as one ONNX graph: the network and the step, as many times as there are rows of weights.

    inputs    x, x0 [B, n]; memory, base where a solver keeps them                n = C·H·W
              table [E, 1 or B, columns]                                          skipstep.loops.loop_table
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
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from skipstep.export.graph_writer import Dims, GraphWriter, floats, rename_graph, renamed_nodes, renamed_value
from skipstep.export.onnx_step import write_step
from skipstep.loops.loop_table import LoopFeatures
from skipstep.networks.graphs import Binding, Partition
from skipstep.networks.spec import NetworkSpec

INDEX_NAMES = {Binding.PLAN: "plan_index", Binding.CALL: "call_index", Binding.PROMPT: "prompt_index"}


@dataclass(frozen=True, slots=True)
class StepNetwork:
    """The step network as nodes of a larger graph, under the names that it has there.

    `conditions` are the values that it reads beside the state, and when each is known. Of those that differ from stage
    to stage, `rows` says in which value of the graph around they are. `prefix` starts all names that stages share.
    """

    prefix: str
    nodes: Sequence[NodeProto]
    weights: Sequence[TensorProto]
    sample: ValueInfoProto
    output: ValueInfoProto
    conditions: Mapping[str, Binding]
    rows: Mapping[str, str]

    @classmethod
    def of(cls, step: GraphProto, parts: Partition, *, prefix: str = "") -> StepNetwork:
        """The network of `parts`; `prefix` starts all its names, in `step` too."""
        sample = next(each for each in step.input if each.name == "sample")
        times = {name: _time(name, parts) for name in (each.name for each in step.input) if name != "sample"}
        if prefix:
            rename_graph(step, lambda name: prefix + name)
        conditions = {prefix + name: time for name, time in times.items()}
        rows = {name: f"{name}/rows" for name, time in conditions.items() if time != Binding.PROMPT}
        return cls(prefix, step.node, step.initializer, sample, step.output[0], conditions, rows)

    def at_stage(self, prefix: str) -> StepNetwork:
        """The same under names of one stage, but for the weights and what is the same at every stage."""
        shared = {each.name for each in self.weights} | (self.conditions.keys() - self.rows.keys())

        def rename(name: str) -> str:
            return name if name in shared else prefix + name

        return StepNetwork(
            self.prefix,
            renamed_nodes(self.nodes, rename),
            (),
            renamed_value(self.sample, rename),
            renamed_value(self.output, rename),
            {rename(name): time for name, time in self.conditions.items()},
            {rename(name): rows for name, rows in self.rows.items()},
        )


def _time(condition: str, parts: Partition) -> Binding:
    """When a value that the step reads beside the state is known."""
    for time, names in parts.crossing.items():
        if condition in names:
            return time
    # Inputs of the whole network that its step reads as they are.
    return Binding.PLAN if condition == "timestep" else Binding.PROMPT


def build_loop(parts: Partition, network: NetworkSpec, features: LoopFeatures) -> bytes:
    """Serialise the loop around the step network of `parts`."""
    return bytes(loop_model(parts, network, features).SerializeToString())


def loop_model(parts: Partition, network: NetworkSpec, features: LoopFeatures) -> ModelProto:
    model = onnx.load_from_string(parts.graphs.step)
    step = StepNetwork.of(model.graph, parts)
    outer = GraphWriter("loop")
    for value, time in step.conditions.items():
        if time == Binding.PROMPT:  # The same at every stage.
            outer.add("Gather", f"{value}/rows", INDEX_NAMES[time], to=value)
    if features.guided:
        batch = outer.add("Shape", "x", to="batch_size", start=0, end=1)
        outer.add("Neg", batch, to="minus_batch_size")
    trips = outer.add("Squeeze", outer.add("Shape", "table", start=0, end=1))
    carried = ("x0", *features.carried)
    shape: Dims = ["samples", network.num_elements]
    body = loop_body(step, network, features, shape=shape, carried=carried)
    outputs = [f"{name}_next" for name in carried]
    outer.nodes.append(helper.make_node("Loop", [trips, "", *carried], outputs, name="loop", body=body))
    graph = helper.make_graph(
        outer.nodes,
        "sampling_loop",
        _inputs(model.graph, step, network, features),
        [floats(name, shape) for name in outputs],
        outer.constants,
    )
    result = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    onnx.checker.check_model(result)
    return result


def _inputs(graph: GraphProto, step: StepNetwork, network: NetworkSpec, features: LoopFeatures) -> list[ValueInfoProto]:
    shape: Dims = ["samples", network.num_elements]
    inputs = [
        *(floats(name, shape) for name in ("x0", *features.carried)),
        floats("table", ["stages", "plans", len(features.columns)]),
    ]
    for each in graph.input:
        if each.name in step.conditions:
            tensor = each.type.tensor_type
            dims = [dim.dim_value for dim in tensor.shape.dim[1:]]
            inputs.append(helper.make_tensor_value_info(f"{each.name}/rows", tensor.elem_type, [None, *dims]))
    for time in dict.fromkeys(step.conditions.values()):
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


def loop_body(
    step: StepNetwork,
    network: NetworkSpec,
    features: LoopFeatures,
    *,
    shape: Dims,
    carried: Sequence[str],
    kept: Sequence[str] = (),
    noise: str = "noise",
) -> GraphProto:
    """One evaluation and its step as the body of a Loop over states of `shape` `[B, n]`.

    What is `carried` goes from one to the next, x among it; what is `kept`, x0 or x, is collected from all. The graph
    around has table, the index and rows of each condition, `noise` `[E or 1, B, n]` and what guidance reads, under the
    names of the inputs above.
    """
    writer = GraphWriter("body")
    drawn = None
    if features.noise:
        last = writer.add("Sub", writer.add("Shape", noise, start=0, end=1), writer.constant([1]))
        # A plan without noise is given one row of zeros for all stages.
        drawn = writer.add("Gather", noise, writer.add("Squeeze", writer.add("Min", "stage", last)), axis=0)
    columns = writer.split(writer.add("Gather", "table", "stage", axis=0), len(features.columns), axis=1)
    after = write_evaluation(
        writer,
        step,
        "stage",
        {name: f"{name}_now" for name in carried},
        network,
        features,
        row=dict(zip(features.columns, columns, strict=True)),
        noise=drawn,
    )
    writer.add("Identity", "go_on", to="still_go_on")
    # A value may leave the body but once.
    results = [after[name] for name in carried] + [writer.add("Identity", after[name]) for name in kept]
    return helper.make_graph(
        writer.nodes,
        "evaluation",
        [
            helper.make_tensor_value_info("stage", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            *(floats(f"{name}_now", shape) for name in carried),
        ],
        [
            helper.make_tensor_value_info("still_go_on", TensorProto.BOOL, []),
            *(floats(name, shape) for name in results),
        ],
        [*step.weights, *writer.constants],
    )


def write_evaluation(
    writer: GraphWriter,
    step: StepNetwork,
    stage: str,
    state: Mapping[str, str],
    network: NetworkSpec,
    features: LoopFeatures,
    *,
    row: Mapping[int, str],
    noise: str | None,
) -> dict[str, str]:
    """The network on the state at `stage`, a scalar, and the step that follows; returns what write_step does."""
    _write_network_input(writer, state["x"], step, network, features)
    rows: dict[Binding, str] = {
        time: writer.add("Gather", INDEX_NAMES[time], stage, axis=0)
        for time in dict.fromkeys(step.conditions.values())
        if time != Binding.PROMPT
    }
    for value, found in step.rows.items():
        writer.add("Gather", found, rows[step.conditions[value]], to=value)
    writer.nodes.extend(step.nodes)
    return write_step(writer, state, network, features, output=step.output, row=row, noise=noise)


def _write_network_input(
    writer: GraphWriter, x: str, step: StepNetwork, network: NetworkSpec, features: LoopFeatures
) -> None:
    """The state as the network reads it: as an image, twice where it is guided, in the network's dtype."""
    dtype = step.sample.type.tensor_type.elem_type
    if features.guided:
        x = writer.add("Tile", x, "copies")
    if dtype != TensorProto.FLOAT:
        x = writer.cast(x, dtype)
    writer.add("Reshape", x, writer.constant([-1, *network.sample_shape]), to=step.sample.name)
