"""One plan as one self-contained ONNX graph, for any ONNX runtime, with nothing of skipstep around it.

    inputs    seeds [B], uint64                           the samples', or, with noise="given",
              x_T [B, *sample_shape]
              noise [E, B, *sample_shape]                 if the plan adds noise: standard normals for each evaluation
              NAME [B, …]                                 each condition of the network, such as class_labels; guided,
              negative_NAME [B, …]                        also those that the caller gives for both halves
              guidance_scale [B]                          if guided, or the network takes it
    outputs   x_0 [B, *sample_shape]; with a trajectory also x_t and x0 [E, B, *sample_shape], the state after each
              evaluation and the image predicted at it

Coefficients and values that follow from the timesteps are constants; values that follow from the conditioning are
computed before the loop, once for all stages (skipstep.export.onnx_prologue). From seeds the graph draws the noise of
skipstep.calls.noise, bit for bit (skipstep.export.onnx_noise), with operators of uint64. For a runtime without them
that module gives the same numbers: standard_normal(seeds, n, stage=0, stream=Stream.INITIAL), and (stage=range(E),
stream=Stream.STEP).

The loop form holds the network's nodes once. The unrolled form is for runtimes without Loop: it has E times the nodes,
the weights once, and at each stage only the operations that its flags ask for. Use it for at most MOST_UNROLLED stages:
the time that a runtime needs to load a graph grows faster than the graph. Where shapes must be fixed, an open batch is
fixed when the graph is loaded (ONNX Runtime's free dimension "batch").

A resumable loop does some of its stages in one run, and the rest in later ones: to show a sample while it is drawn, to
start from a state of one's own, or (with num_stages 0) to learn the initial state of a seed.

    inputs    first_stage, num_stages, int64 scalars
              x_T [B or 0, *sample_shape]                 the state to go on from; no rows: the initial one of the seeds
              h0, h1, h2 [B or 0, *sample_shape]          the plan's history, where it has one; no rows: zeros
    outputs   x_0, the state after these stages; next_h0, next_h1, next_h2; a trajectory of these stages alone
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, get_args

import numpy as np
import onnx
from onnx import TensorProto, ValueInfoProto, helper

from skipstep.errors import InputError, PlanError, check_choice, check_integer
from skipstep.export.graph_writer import Dims, GraphWriter, floats, serialised
from skipstep.export.onnx_loop import StepNetwork, carried_states, loop_body, write_evaluation
from skipstep.export.onnx_noise import write_normals
from skipstep.export.onnx_prologue import condition_inputs, write_prologue
from skipstep.export.onnx_table import loop_table, stage_columns
from skipstep.kernels.layout import StepFlags, Stream
from skipstep.networks.graphs import BATCH, Partition
from skipstep.networks.spec import NetworkSpec, check_plan_fits
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages

Form = Literal["loop", "unrolled"]
Noise = Literal["given", "seeds"]
MOST_UNROLLED: Final = 20
_OWN_NAMES = {"x", "x_T", "x_0", "x_t", "x0", "h0", "h1", "h2", "noise", "table", "stage", "go_on", "guidance_scale"}
_OWN_NAMES |= {"guidance", "batch_size", "minus_batch_size", "copies", "plan_index", "call_index"}
_STAGES = ("first_stage", "num_stages")
_OWN_NAMES |= {"seeds", "iteration", *_STAGES}
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
    noise: Noise = "given",
    resumable: bool = False,
) -> bytes:
    """Serialise `plan` around the network of `parts`.

    batch_size  B; None leaves it open, as the symbolic dimension "batch".
    guided      classifier-free guidance, out = u + guidance_scale·(c - u), with a network's batch of 2B: u is predicted
                with the null label, or with the negative prompts.
    form        "loop" or "unrolled".
    trajectory  x_t and x0 of every evaluation as outputs too.
    noise       "given", or "seeds" for a runtime with operators of uint64.
    resumable   some stages in a run; for a loop from seeds with an open batch.

    Raises InputError for options that the network does not support, PlanError for a plan that does not fit it, and
    ExportError.
    """
    _check(network, plan, guided=guided, form=form)
    check_choice("noise", noise, get_args(Noise))
    if resumable and (form, noise, batch_size) != ("loop", "seeds", None):
        raise InputError(
            got=f"resumable=True with form={form!r}, noise={noise!r} and batch_size={batch_size!r}",
            expected="a loop from seeds with an open batch",
            remedy="pass form='loop', noise='seeds' and batch_size=None, or leave resumable out",
        )
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
    samples = _write_batch_size(writer, batch, "x_T" if noise == "given" else "seeds", guided=guided)
    slots = carried_states(flags)[1:] if form == "loop" else ()
    initial = _write_initial(writer, network, flags, slots, noise=noise, resumable=resumable)
    write_prologue(writer, parts, step, network, plan, samples=samples, guided=guided)
    if form == "loop":
        shape: Dims = [batch, network.num_elements]
        results = _write_loop(
            writer,
            step,
            stages,
            network,
            flags,
            initial,
            shape,
            noise=noise,
            trajectory=trajectory,
            resumable=resumable,
        )
    else:
        if noise == "seeds" and flags.add_noise:
            every = writer.constant(np.arange(len(stages)))
            write_normals(writer, "seeds", every, network.num_elements, Stream.STEP, to="noise/flat")
        results = _write_unrolled(writer, step, stages, network, initial["x"], trajectory=trajectory)

    outputs = []
    for name, values in results.items():
        leading: Dims = ["stages" if resumable else len(stages), batch] if name in _TRAJECTORY else [batch]
        sizes = [len(stages), -1] if len(leading) == 2 and form == "unrolled" else [0] * len(leading)
        writer.add("Reshape", values, writer.constant(sizes + image), to=name)
        outputs.append(floats(name, [*leading, *image]))
    inputs = _inputs(network, flags, len(stages), batch, noise=noise, resumable=resumable)
    graph = helper.make_graph(writer.nodes, "sampler", inputs, outputs, writer.constants)
    sampler = helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name="skipstep"
    )
    data = serialised(sampler)
    onnx.checker.check_model(sampler)
    return data


def check_unrolled(plans: Iterable[Plan]) -> None:
    """Raises PlanError if none of the plans is short enough to be unrolled in a bundle."""
    least = min(plan.num_evaluations for plan in plans)
    if least > MOST_UNROLLED:
        raise PlanError(
            got=f"plans of {least} and more evaluations for the target onnx-unrolled",
            expected=f"one of at most {MOST_UNROLLED}",
            remedy="add --steps 10, or use the target onnx-loop",
        )


def _inputs(
    network: NetworkSpec, flags: StepFlags, num_stages: int, batch: int | str, *, noise: Noise, resumable: bool
) -> list[ValueInfoProto]:
    inputs = []
    if noise == "seeds":
        inputs.append(helper.make_tensor_value_info("seeds", TensorProto.UINT64, [batch]))
    if resumable:
        inputs += [helper.make_tensor_value_info(name, TensorProto.INT64, []) for name in _STAGES]
        names = ["x_T", *carried_states(flags)[1:]]
        inputs += [floats(name, [f"rows_of_{name}", *network.sample_shape]) for name in names]
    elif noise == "given":
        inputs.append(floats("x_T", [batch, *network.sample_shape]))
        if flags.add_noise:
            inputs.append(floats("noise", [num_stages, batch, *network.sample_shape]))
    for name, condition in condition_inputs(network, guided=flags.guided).items():
        inputs.append(helper.make_tensor_value_info(name, _TYPES[condition.dtype], [batch, *condition.shape]))
    if flags.guided or network.takes_guidance:
        inputs.append(floats("guidance_scale", [batch]))
    return inputs


def _write_initial(
    writer: GraphWriter,
    network: NetworkSpec,
    flags: StepFlags,
    slots: Sequence[str],
    *,
    noise: Noise,
    resumable: bool,
) -> dict[str, str]:
    """What the first evaluation reads, `[B, n]`: x and the history `slots`."""
    flat = writer.constant([-1, network.num_elements])
    if noise == "given":
        x = writer.add("Reshape", "x_T", flat)
        if flags.add_noise:
            writer.add("Reshape", "noise", writer.constant([0, 0, network.num_elements]), to="noise/flat")
    else:
        x = write_normals(writer, "seeds", writer.constant([0]), network.num_elements, Stream.INITIAL)
        x = writer.add("Reshape", x, flat)
    initial = {"x": x}
    if slots:
        initial |= dict.fromkeys(slots, writer.add("ConstantOfShape", writer.add("Shape", x)))
    if resumable:
        for name, given in {"x": "x_T", **{slot: slot for slot in slots}}.items():
            # The first B rows of what is given and what stands for it: all of the one, or of the other.
            both = writer.add("Concat", writer.add("Reshape", given, flat), initial[name], axis=0)
            initial[name] = writer.add("Slice", both, writer.constant([0]), "batch_size", writer.constant([0]))
    return initial


def _write_batch_size(writer: GraphWriter, batch: int | str, source: str, *, guided: bool) -> str:
    """N, int64 [1], the first dimension of `source`, and the values derived from it that guidance reads."""
    if isinstance(batch, int):
        writer.constant([batch], to="batch_size")
    else:
        writer.add("Shape", source, start=0, end=1, to="batch_size")
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
    initial: Mapping[str, str],
    shape: Dims,
    *,
    noise: Noise,
    trajectory: bool,
    resumable: bool,
) -> dict[str, str]:
    table = loop_table(stages)
    writer.constant(table, table.dtype, to="table")
    kept = tuple(_TRAJECTORY.values()) if trajectory else ()
    first = _STAGES[0] if resumable else None
    body = loop_body(step, network, stages, flags, shape=shape, kept=kept, seeds=noise == "seeds", first_stage=first)
    carried = carried_states(flags)
    outputs = [f"{name}_after" for name in carried] + [f"{name}_kept" for name in kept]
    trips = _STAGES[1] if resumable else writer.constant(len(stages))
    states = [initial[name] for name in carried]
    writer.nodes.append(helper.make_node("Loop", [trips, "", *states], outputs, name="loop", body=body))
    results = {"x_0": "x_after"}
    if resumable:
        results |= {f"next_{slot}": f"{slot}_after" for slot in carried[1:]}
    if trajectory:
        results |= {name: f"{value}_kept" for name, value in _TRAJECTORY.items()}
    return results


def _write_unrolled(
    writer: GraphWriter, step: StepNetwork, stages: Stages, network: NetworkSpec, x: str, *, trajectory: bool
) -> dict[str, str]:
    writer.constants.extend(step.weights)
    state = {"x": x}
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
