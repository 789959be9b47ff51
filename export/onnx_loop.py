"""One evaluation and its step in ONNX, and the body of a Loop that repeats them.

    body inputs     stage, the condition to go on, x `[B, n]`, and the history slots that stages write (n elements)
    read from the graph around
                    table [E, 1 or B, NUM_COLUMNS]                              skipstep.export.onnx_table
                    NAME or NAME/rows for each step input; plan_index and call_index [E, N] say which row each stage and
                    sample reads                                                skipstep.export.onnx_prologue
                    noise/flat [E, B, n], or seeds, if the plan adds noise
                    guidance [B, 1], batch_size and copies with guidance

N is the network's batch: 2B with guidance, else B. The network's weights are initializers of the loop's body: ONNX
Runtime would not prepack them if they were outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from skipstep.export.graph_writer import Dims, GraphWriter, floats, rename_graph, renamed_nodes, renamed_value
from skipstep.export.onnx_noise import write_normals
from skipstep.export.onnx_step import write_step
from skipstep.export.onnx_table import loop_columns
from skipstep.kernels.layout import StepFlags, Stream
from skipstep.kernels.statistics import Thresholding
from skipstep.networks.graphs import Binding, Partition
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

INDEX_NAMES = {Binding.PLAN: "plan_index", Binding.CALL: "call_index"}


@dataclass(frozen=True, slots=True)
class StepNetwork:
    """The step network as nodes of a larger graph, under the names that it has there.

    `conditions` are its step inputs and their binding times. `rows` names, for each of them that differs from stage to
    stage, the value of the graph around that holds its rows. `prefix` starts all names that stages share.
    """

    prefix: str
    nodes: Sequence[NodeProto]
    weights: Sequence[TensorProto]
    sample: ValueInfoProto
    output: ValueInfoProto
    conditions: Mapping[str, Binding]
    rows: Mapping[str, str]

    @classmethod
    def of(cls, step: GraphProto, parts: Partition, *, prefix: str) -> StepNetwork:
        """The network of `parts`; `prefix` starts all its names, in `step` too."""
        sample = next(each for each in step.input if each.name == "sample")
        times = {name: _time(name, parts) for name in (each.name for each in step.input) if name != "sample"}
        rename_graph(step, lambda name: prefix + name)
        conditions = {prefix + name: time for name, time in times.items()}
        rows = {name: f"{name}/rows" for name, time in conditions.items() if time != Binding.PROMPT}
        return cls(prefix, step.node, step.initializer, sample, step.output[0], conditions, rows)

    def at_stage(self, prefix: str) -> StepNetwork:
        """The same under names of one stage; weights and step inputs that all stages share keep their names."""
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
    """The binding time of a step input."""
    for time, names in parts.crossing.items():
        if condition in names:
            return time
    # Inputs of the whole network that its step reads as they are.
    return Binding.PLAN if condition == "timestep" else Binding.PROMPT


def carried_states(flags: StepFlags) -> tuple[str, ...]:
    """What one evaluation passes on to the next, the state first."""
    return ("x", *(f"h{slot}" for slot in flags.written_slots))


def loop_body(
    step: StepNetwork,
    network: NetworkSpec,
    stages: Stages,
    flags: StepFlags,
    *,
    shape: Dims,
    kept: Sequence[str] = (),
    seeds: bool = False,
    first_stage: str | None = None,
) -> GraphProto:
    """One evaluation and its step as the body of a Loop over states of `shape` `[B, n]`.

    `flags` are the union of the stages' flags. The values named by `kept`, x0 or x, are collected over all stages. The
    loop starts at the stage that `first_stage` names a value of, or at 0.
    """
    writer = GraphWriter("body")
    if first_stage is not None:
        writer.add("Add", "iteration", first_stage, to="stage")
    noise = None
    if flags.add_noise and seeds:
        place = writer.add("Reshape", "stage", writer.constant([1]))
        noise = write_normals(writer, "seeds", place, network.num_elements, Stream.STEP)
        noise = writer.add("Reshape", noise, writer.constant([-1, network.num_elements]))
    elif flags.add_noise:
        noise = writer.add("Gather", "noise/flat", "stage", axis=0)
    carried = carried_states(flags)
    weights, axis = writer.add("Gather", "table", "stage", axis=0), writer.constant([1])

    def column(number: int) -> str:
        # A Split would have more outputs than one kernel of WebGPU can write.
        return writer.add("Slice", weights, writer.constant([number]), writer.constant([number + 1]), axis)

    after = write_evaluation(
        writer,
        step,
        "stage",
        {name: f"{name}_now" for name in carried},
        network,
        flags,
        row={number: column(number) for number in loop_columns(stages)},
        noise=noise,
        thresholding=stages.thresholding,
    )
    writer.add("Identity", "go_on", to="still_go_on")
    # A value may leave the body only once.
    results = [after[name] for name in carried] + [writer.add("Identity", after[name]) for name in kept]
    return helper.make_graph(
        writer.nodes,
        "evaluation",
        [
            helper.make_tensor_value_info("stage" if first_stage is None else "iteration", TensorProto.INT64, []),
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
    flags: StepFlags,
    *,
    row: Mapping[int, str],
    noise: str | None,
    thresholding: Thresholding | None,
) -> dict[str, str]:
    """The network on the state at `stage`, a scalar, and the step that follows; returns what write_step does."""
    _write_network_input(writer, state["x"], step, network, guided=flags.guided)
    rows: dict[Binding, str] = {
        time: writer.add("Gather", INDEX_NAMES[time], stage, axis=0)
        for time in dict.fromkeys(step.conditions.values())
        if time != Binding.PROMPT
    }
    for value, table in step.rows.items():
        writer.add("Gather", table, rows[step.conditions[value]], to=value)
    writer.nodes.extend(step.nodes)
    return write_step(
        writer, state, network, flags, output=step.output, row=row, noise=noise, thresholding=thresholding
    )


def _write_network_input(writer: GraphWriter, x: str, step: StepNetwork, network: NetworkSpec, *, guided: bool) -> None:
    """The state as the network reads it: in its shape, twice with guidance, in the network's dtype."""
    dtype = step.sample.type.tensor_type.elem_type
    if guided:
        x = writer.add("Tile", x, "copies")
    if dtype != TensorProto.FLOAT:
        x = writer.cast(x, dtype)
    writer.add("Reshape", x, writer.constant([-1, *network.sample_shape]), to=step.sample.name)
