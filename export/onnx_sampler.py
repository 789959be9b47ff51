"""One plan as one self-contained ONNX graph, for any ONNX runtime, with nothing of skipstep around it.

    inputs    x_T [B, *sample_shape]
              noise [E, B, *sample_shape]                 if the plan adds noise: standard normals for each evaluation
              NAME [B, …]                                 each condition of the network, such as class_labels; guided,
              negative_NAME [B, …]                        also those that the caller gives for both halves
              guidance_scale [B]                          if guided, or the network takes it
    outputs   x_0 [B, *sample_shape]; with a trajectory also x_t and x0 [E, B, *sample_shape], the state after each
              evaluation and the image predicted at it

Coefficients and values that follow from the timesteps are constants; values that follow from the conditioning are
computed before the loop, once for all stages (skipstep.export.onnx_prologue). Seeds are not in the graph: the noise of
skipstep's samples is skipstep.calls.noise.standard_normal(seeds, n, stage=range(E), stream=Stream.STEP).

The loop form holds the network's nodes once. The unrolled form is for runtimes without Loop: it has E times the nodes,
the weights once, and at each stage only the operations that its flags ask for. Use it for fixed batch sizes and few
stages: the time that a runtime needs to load a graph grows faster than the graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import onnx
from onnx import TensorProto, ValueInfoProto, helper

from skipstep.errors import InputError, check_integer
from skipstep.export.graph_writer import Dims, GraphWriter, floats, serialised
from skipstep.export.onnx_loop import StepNetwork, carried_states, loop_body, write_evaluation
from skipstep.export.onnx_prologue import condition_inputs, write_prologue
from skipstep.export.onnx_table import loop_table, stage_columns
from skipstep.kernels.layout import StepFlags
from skipstep.networks.graphs import BATCH, Partition
from skipstep.networks.spec import NetworkSpec, check_plan_fits
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages

Form = Literal["loop", "unrolled"]
_OWN_NAMES = {"x", "x_T", "x_0", "x_t", "x0", "h0", "h1", "h2", "noise", "table", "stage", "go_on", "guidance_scale"}
_OWN_NAMES |= {"guidance", "batch_size", "minus_batch_size", "copies", "plan_index", "call_index"}
_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
# Outputs of a trajectory, and what they are in the loop.
_TRAJECTORY = {"x_t": "x", "x0": "x0"}


def build_sampler(
    parts: Partition,
    network: NetworkSpec,
    plan: Plan,
    *,
    batch_size: int | None = 1,
    guided: bool = False,
    form: Form = "loop",
    trajectory: bool = False,
) -> bytes:
    """Serialise `plan` around the network of `parts`.

    batch_size  B; None leaves it open, as the symbolic dimension "batch".
    guided      classifier-free guidance, out = u + guidance_scale·(c - u), with a network's batch of 2B: u is predicted
                with the null label, or with the negative prompts.
    form        "loop" or "unrolled".
    trajectory  x_t and x0 of every evaluation as outputs too.

    Raises InputError for options that the network does not support, PlanError for a plan that does not fit it, and
    ExportError.
    """
    _check(network, plan, guided=guided, form=form)
    batch: int | str = BATCH
    if batch_size is not None:
        batch = check_integer("batch_size", batch_size, low=1, remedy="use None for any batch size")
    model = onnx.load_from_string(parts.graphs.step)
    # The graph's inputs are called like the network's own.
    step = StepNetwork.of(model.graph, parts, prefix="network/")
    stages = Stages.of([plan])
    called = (each.in_call(guided=guided, rescale=False, wide_output=False) for each in stages.flags)
    stages = replace(stages, flags=tuple(called))
    flags = stages.flags[0].union(*stages.flags[1:])
    image = list(network.sample_shape)

    writer = GraphWriter("sampler")
    writer.add("Reshape", "x_T", writer.constant([-1, network.num_elements]), to="x")
    if flags.add_noise:
        writer.add("Reshape", "noise", writer.constant([len(stages), -1, network.num_elements]), to="noise/flat")
    samples = _write_batch_size(writer, batch, guided=guided)
    write_prologue(writer, parts, step, network, plan, samples=samples, guided=guided)
    if form == "loop":
        shape: Dims = [batch, network.num_elements]
        results = _write_loop(writer, step, stages, network, flags, shape, trajectory=trajectory)
    else:
        results = _write_unrolled(writer, step, stages, network, trajectory=trajectory)

    writer.add("Reshape", results.pop("x_0"), writer.constant([-1, *image]), to="x_0")
    for name, values in results.items():
        writer.add("Reshape", values, writer.constant([len(stages), -1, *image]), to=name)
    graph = helper.make_graph(
        writer.nodes,
        "sampler",
        _inputs(network, flags, len(stages), batch),
        [floats("x_0", [batch, *image]), *(floats(name, [len(stages), batch, *image]) for name in results)],
        writer.constants,
    )
    sampler = helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name="skipstep"
    )
    data = serialised(sampler)
    onnx.checker.check_model(sampler)
    return data


def _inputs(network: NetworkSpec, flags: StepFlags, num_stages: int, batch: int | str) -> list[ValueInfoProto]:
    inputs = [floats("x_T", [batch, *network.sample_shape])]
    if flags.add_noise:
        inputs.append(floats("noise", [num_stages, batch, *network.sample_shape]))
    for name, condition in condition_inputs(network, guided=flags.guided).items():
        inputs.append(helper.make_tensor_value_info(name, _TYPES[condition.dtype], [batch, *condition.shape]))
    if flags.guided or network.takes_guidance:
        inputs.append(floats("guidance_scale", [batch]))
    return inputs


def _write_batch_size(writer: GraphWriter, batch: int | str, *, guided: bool) -> str:
    """N, int64 [1], and the values derived from it that guidance reads."""
    if isinstance(batch, int):
        writer.constant([batch], to="batch_size")
    else:
        writer.add("Shape", "x_T", start=0, end=1, to="batch_size")
    if not guided:
        return "batch_size"
    writer.add("Neg", "batch_size", to="minus_batch_size")
    writer.constant([2, 1], to="copies")
    writer.add("Reshape", "guidance_scale", writer.constant([-1, 1]), to="guidance")
    return writer.add("Mul", "batch_size", writer.constant([2]))


def _write_loop(
    writer: GraphWriter,
    step: StepNetwork,
    stages: Stages,
    network: NetworkSpec,
    flags: StepFlags,
    shape: Dims,
    *,
    trajectory: bool,
) -> dict[str, str]:
    table = loop_table(stages)
    writer.constant(table, table.dtype, to="table")
    zeros = writer.add("ConstantOfShape", writer.add("Shape", "x"))
    kept = tuple(_TRAJECTORY.values()) if trajectory else ()
    body = loop_body(step, network, stages, flags, shape=shape, kept=kept, noise="noise/flat")
    carried = carried_states(flags)
    initial = [name if name == "x" else zeros for name in carried]
    outputs = [f"{name}_next" for name in carried] + [f"{name}_kept" for name in kept]
    trips = writer.constant(len(stages))
    writer.nodes.append(helper.make_node("Loop", [trips, "", *initial], outputs, name="loop", body=body))
    collected = {name: f"{value}_kept" for name, value in _TRAJECTORY.items()} if trajectory else {}
    return {"x_0": "x_next", **collected}


def _write_unrolled(
    writer: GraphWriter, step: StepNetwork, stages: Stages, network: NetworkSpec, *, trajectory: bool
) -> dict[str, str]:
    writer.constants.extend(step.weights)
    state = {"x": "x"}
    kept: dict[str, list[str]] = {name: [] for name in _TRAJECTORY} if trajectory else {}
    for stage, flags in enumerate(stages.flags):
        place = writer.constant(stage)
        after = write_evaluation(
            writer,
            step.at_stage(f"stage{stage}/"),
            place,
            state,
            network,
            flags,
            row={c: writer.constant(stages.table[stage, 0, c], np.float32) for c in stage_columns(flags)},
            noise=writer.add("Gather", "noise/flat", place, axis=0) if flags.add_noise else None,
            thresholding=stages.thresholding,
        )
        for name, values in kept.items():
            values.append(after[_TRAJECTORY[name]])
        state |= after
    collected = {name: writer.add("Concat", *values, axis=0) for name, values in kept.items()}
    return {"x_0": state["x"], **collected}


def _check(network: NetworkSpec, plan: Plan, *, guided: bool, form: str) -> None:
    if form not in get_args(Form):
        raise InputError(
            got=f"form={form!r}", expected="'loop' or 'unrolled'", remedy="use 'loop' where the runtime has it"
        )
    if guided and not network.can_guide:
        raise InputError(
            got="guided=True for a network without a null label and without prompts"
            if not network.takes_guidance
            else "guided=True for a network that takes the guidance scale itself",
            expected="a network that can predict without its conditioning",
            remedy="leave guided out" if network.takes_guidance else "build with null_label=, or leave guided out",
        )
    check_plan_fits(plan, network)
    # What the graph itself calls a value cannot be an input's name too.
    taken = _OWN_NAMES & condition_inputs(network, guided=guided).keys()
    if taken:
        raise InputError(
            got=f"a condition called {', '.join(sorted(taken))}",
            expected="a name that the graph of a loop has no value of",
            remedy="wrap the network in a module whose argument has another name",
        )
    if guided and any(flags.unguided or flags.scale_guidance for flags in plan.stage_flags):
        raise InputError(
            got=f"guided=True with {plan!r}, whose guidance differs from step to step",
            expected="one guidance scale in all steps of an exported loop",
            remedy="make the plan without guidance_interval and guidance_weights, or leave guided out",
        )
