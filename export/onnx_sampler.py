"""One plan as one self-contained ONNX graph, for any ONNX runtime, with nothing of skipstep around it.

    inputs    x_T [B, C, H, W]
              noise [E, B, C, H, W]                       if the plan adds noise: standard normals for each evaluation
              class_labels int64 [B]                      if the network has classes
              encoder_hidden_states [B, L, D]             if it attends to prompts; guided, also
              negative_encoder_hidden_states [B, L, D]
              guidance_scale [B]                          if guided
    outputs   x_0 [B, C, H, W]; with a trajectory also x_t and x0 [E, B, C, H, W], the state after each evaluation and
              the image predicted at it

Coefficients and what follows from the timesteps are constants; what follows from the conditioning is computed before
the loop, once for all stages (skipstep.export.onnx_prologue). Seeds are not in the graph: the noise of skipstep's own
samples is skipstep.calls.noise.standard_normal(seeds, C·H·W, stage=range(E), stream=Stream.STEP).

Of the two forms the loop holds the network once. The unrolled one needs no Loop of a runtime, at the price of E times
the nodes; the weights are there once, and each stage has the operations that its flags ask for, no others. It is for
fixed batch sizes and few stages: what a runtime does to a graph when it loads it grows faster than the graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from skipstep.calls.conditioning import LABELS, PROMPTS
from skipstep.errors import ExportError, InputError
from skipstep.export.graph_writer import Dims, GraphWriter, floats
from skipstep.export.onnx_loop import StepNetwork, loop_body, write_evaluation
from skipstep.export.onnx_prologue import NEGATIVE_PROMPTS, write_prologue
from skipstep.export.partition import BATCH, Partition
from skipstep.kernels.layout import Column, StepFlags
from skipstep.loops.loop_table import LoopFeatures, loop_table
from skipstep.networks.spec import NetworkSpec, check_plan_fits
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages

Form = Literal["loop", "unrolled"]
_MAX_BYTES = 2**31 - 1
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

    Raises InputError for options that the network has not, PlanError for a plan that does not fit it, ExportError.
    """
    _check(network, plan, batch_size=batch_size, guided=guided, form=form)
    model = onnx.load_from_string(parts.graphs.step)
    # The graph's inputs are called like the network's own.
    step = StepNetwork.of(model.graph, parts, prefix="network/")
    stages = Stages.of([plan])
    features = replace(LoopFeatures.of(network, stages), guided=guided)
    batch = BATCH if batch_size is None else batch_size
    image = list(network.sample_shape)

    writer = GraphWriter("sampler")
    writer.add("Reshape", "x_T", writer.constant([-1, network.num_elements]), to="x")
    if features.noise:
        writer.add("Reshape", "noise", writer.constant([len(stages), -1, network.num_elements]), to="noise/flat")
    samples = _write_batch_size(writer, batch, guided=guided)
    write_prologue(writer, parts, step, network, plan, samples=samples, guided=guided)
    if form == "loop":
        shape: Dims = [batch, network.num_elements]
        found = _write_loop(writer, step, stages, network, features, shape, trajectory=trajectory)
    else:
        found = _write_unrolled(writer, step, stages, network, features, trajectory=trajectory)

    writer.add("Reshape", found.pop("x_0"), writer.constant([-1, *image]), to="x_0")
    for name, values in found.items():
        writer.add("Reshape", values, writer.constant([len(stages), -1, *image]), to=name)
    graph = helper.make_graph(
        writer.nodes,
        "sampler",
        _inputs(network, features, len(stages), batch),
        [floats("x_0", [batch, *image]), *(floats(name, [len(stages), batch, *image]) for name in found)],
        writer.constants,
    )
    return _serialised(
        helper.make_model(
            graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name="skipstep"
        )
    )


def _inputs(network: NetworkSpec, features: LoopFeatures, num_stages: int, batch: int | str) -> list[ValueInfoProto]:
    inputs = [floats("x_T", [batch, *network.sample_shape])]
    if features.noise:
        inputs.append(floats("noise", [num_stages, batch, *network.sample_shape]))
    if network.num_classes is not None:
        inputs.append(helper.make_tensor_value_info(LABELS, TensorProto.INT64, [batch]))
    if network.prompt_shape is not None:
        names = (PROMPTS, NEGATIVE_PROMPTS) if features.guided else (PROMPTS,)
        inputs += [floats(name, [batch, *network.prompt_shape]) for name in names]
    if features.guided:
        inputs.append(floats("guidance_scale", [batch]))
    return inputs


def _write_batch_size(writer: GraphWriter, batch: int | str, *, guided: bool) -> str:
    """N, int64 [1], with what guidance reads of it."""
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
    features: LoopFeatures,
    shape: Dims,
    *,
    trajectory: bool,
) -> dict[str, str]:
    table = loop_table(stages, features)
    writer.constant(table, table.dtype, to="table")
    zeros = writer.add("ConstantOfShape", writer.add("Shape", "x"))
    kept = tuple(_TRAJECTORY.values()) if trajectory else ()
    body = loop_body(step, network, features, shape=shape, carried=features.carried, kept=kept, noise="noise/flat")
    initial = [name if name == "x" else zeros for name in features.carried]
    outputs = [f"{name}_next" for name in features.carried] + [f"{name}_kept" for name in kept]
    trips = writer.constant(len(stages))
    writer.nodes.append(helper.make_node("Loop", [trips, "", *initial], outputs, name="loop", body=body))
    found = {name: f"{value}_kept" for name, value in _TRAJECTORY.items()} if trajectory else {}
    return {"x_0": "x_next", **found}


def _write_unrolled(
    writer: GraphWriter,
    step: StepNetwork,
    stages: Stages,
    network: NetworkSpec,
    features: LoopFeatures,
    *,
    trajectory: bool,
) -> dict[str, str]:
    writer.constants.extend(step.weights)
    state = {"x": "x"}
    kept: dict[str, list[str]] = {name: [] for name in _TRAJECTORY} if trajectory else {}
    for stage, flags in enumerate(stages.flags):
        place = writer.constant(stage)
        coefficients = stages.table[stage, 0]
        after = write_evaluation(
            writer,
            step.at_stage(f"stage{stage}/"),
            place,
            state,
            network,
            features,
            row={column: writer.constant(coefficients[column], np.float32) for column in _columns(flags, coefficients)},
            noise=writer.add("Gather", "noise/flat", place, axis=0) if flags.add_noise else None,
        )
        if flags.write_base:
            after["base"] = state["x"]
        for name, values in kept.items():
            values.append(after[_TRAJECTORY[name]])
        state |= after
    found = {name: writer.add("Concat", *values, axis=0) for name, values in kept.items()}
    return {"x_0": state["x"], **found}


def _columns(flags: StepFlags, row: NDArray[np.float32]) -> list[Column]:
    """What one stage reads of its row."""
    columns = [Column.X0_X, Column.X0_OUT, Column.C_X0, Column.C_EPS]
    if flags.clip:
        columns.append(Column.CLIP)
    if flags.rederive_eps:
        columns += [Column.RE_X, Column.RE_X0]
    elif row[Column.EPS_X] != 0.0 or row[Column.EPS_OUT] != 1.0:
        columns += [Column.EPS_X, Column.EPS_OUT]
    if flags.add_state:
        columns.append(Column.C_X)
    if flags.read_base:
        columns.append(Column.C_BASE)
    if flags.read_memory:
        columns.append(Column.C_MEMORY)
    if flags.write_memory:
        columns += [Column.M_X, Column.M_X0, Column.M_EPS]
        if flags.read_memory:
            columns.append(Column.M_MEMORY)
    if flags.add_noise:
        columns.append(Column.SIGMA)
    if flags.learned_variance:
        columns += [Column.LOG_SIGMA, Column.LOG_SIGMA_OUT]
    return columns


def _serialised(model: ModelProto) -> bytes:
    size = model.ByteSize()
    if size > _MAX_BYTES:
        raise ExportError(
            got=f"a graph of {size / 2**30:.1f} GiB",
            expected="at most 2 GiB, the limit of one protobuf message",
            remedy="convert the weights to float16",
        )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _check(network: NetworkSpec, plan: Plan, *, batch_size: int | None, guided: bool, form: str) -> None:
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(
            got=f"batch_size={batch_size!r}", expected="an integer ≥ 1, or None", remedy="use None for any batch size"
        )
    if form not in get_args(Form):
        raise InputError(
            got=f"form={form!r}", expected="'loop' or 'unrolled'", remedy="use 'loop' where the runtime has it"
        )
    if guided and not network.can_guide:
        raise InputError(
            got="guided=True for a network without a null label and without prompts",
            expected="a network that can predict without its conditioning",
            remedy="build with null_label=, or leave guided out",
        )
    check_plan_fits(plan, network)
