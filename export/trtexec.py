"""A step network for TensorRT's own tools, with the arrays and the examples that a loop around it needs.

    step_bN_PRECISION.onnx   the step network at one batch size; with guidance that of 2N samples' halves
    run.sh                   what trtexec builds and measures each of these with
    first/bN/NAME.bin        inputs of the first evaluation as trtexec reads them, raw
    plan_STEPS-KEY/          a plan, as float32 arrays unless said otherwise:
      coefficients.npy       [E, 32], rows of weights (skipstep.kernels.layout); here a column that an evaluation does
                             not use is zero, and the last says which slot of the history it writes, plus one, or 0
      timesteps.npy          [E], float64
      x_T.npy, noise.npy     [1, ...] and [E, 1, ...], of seed 0; one zero an evaluation where the plan adds no noise
      inputs/NAME.npy        [E, R, ...], the network's other inputs: R is 1, or a row for each label and then one for
                             the null label
    loop.py, loop.cpp        the loop: with ONNX Runtime and NumPy, and with TensorRT and CUDA

Inputs and outputs of the networks are float32 in every precision, as the loop's state is; inputs have names that say
which layer they belong to (skipstep.export.input_names).
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from skipstep.backends.onnxruntime import EarlyGraphs
from skipstep.calls.conditioning import Conditioning
from skipstep.calls.noise import standard_normal
from skipstep.errors import ExportError, InputError
from skipstep.export.graph_writer import serialised
from skipstep.export.input_names import layer_names
from skipstep.export.norms import write_out_norms
from skipstep.export.tensorrt_graph import batch_profiles
from skipstep.kernels.layout import NUM_COLUMNS, Column, Stream
from skipstep.networks.graphs import SAMPLE, Partition
from skipstep.networks.spec import LABELS, NetworkSpec, network_batch_sizes
from skipstep.plans.plan import Plan

EXAMPLES = ("loop.py", "loop.cpp")
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Of one plan's step inputs; a table for each of a thousand labels of a large network is beyond it.
_MAX_TABLE_BYTES = 1 << 30
Arrays = dict[str, NDArray[np.generic]]


def trtexec_files(
    parts: Partition, step: bytes, network: NetworkSpec, plans: Sequence[Plan], batch_sizes: Iterable[int], kind: str
) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file. `step` is the network of `parts` in the precision `kind`.

    Raises InputError and ExportError for what is refused (check_trtexec), and for tables that are too large.
    """
    check_trtexec(network, plans)
    names = layer_names(parts)
    sizes = network_batch_sizes(network, batch_sizes)
    first: Arrays = {}
    for plan in plans:
        folder = f"plan_{plan.steps}-{plan.key}"
        tables = step_tables(parts, network, plan)
        arrays = plan_arrays(network, plan)
        first = first or {SAMPLE: arrays["x_T"], **{names[name]: table[0] for name, table in tables.items()}}
        for name, array in {**arrays, **{f"inputs/{names[name]}": table for name, table in tables.items()}}.items():
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(array), allow_pickle=False)
            yield f"{folder}/{name}.npy", content.getvalue()
    for size in sizes:
        yield f"{network_name(size, kind)}.onnx", static_network(step, names, size)
        for name, rows in first.items():
            yield f"first/b{size}/{name}.bin", rows[np.arange(size) % len(rows)].tobytes()
    yield "run.sh", run_script(sizes, list(first), kind).encode()
    for name in EXAMPLES:
        yield name, resources.files("skipstep.export").joinpath("examples", name).read_bytes()


def check_trtexec(network: NetworkSpec, plans: Iterable[Plan]) -> None:
    """Raise InputError for networks whose step inputs are no finite table, and for plans that need more of a step than
    the examples do."""
    further = [name for name in network.all_conditions if name != LABELS or network.num_classes is None]
    if further:
        raise InputError(
            got=f"target trtexec for a network that takes {', '.join(further)}",
            expected="a network of state, timestep and labels: of all else a step input is known in a call alone",
            remedy="use the target onnx-loop, whose graphs compute what follows from conditions",
        )
    for plan in plans:
        needs = {
            "dynamic thresholding": plan.thresholding is not None,
            "a learned variance": plan.learns_variance,
            "guidance that differs from step to step": any(f.unguided or f.scale_guidance for f in plan.stage_flags),
        }
        for what, needed in needs.items():
            if needed:
                raise InputError(
                    got=f"target trtexec for {plan!r}, which has {what}",
                    expected="plans of the step's linear form",
                    remedy="leave the plan out, or use the target onnx-loop",
                )


def step_tables(parts: Partition, network: NetworkSpec, plan: Plan) -> Arrays:
    """The inputs of the step graph but the sample, `[E, R, …]` each: R is 1 or a row for each label, the null one last.

    Raises ExportError where they take more than 1 GiB.
    """
    labels = np.arange(network.num_classes or 0, dtype=np.int64)
    if network.null_label is not None:
        labels = np.append(labels, np.int64(network.null_label))
    rows, num_stages = max(1, len(labels)), len(plan.evaluation_timesteps)
    graph = onnx.load_from_string(parts.graphs.step).graph
    weights = {tensor.name for tensor in graph.initializer}
    shapes = {
        each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim[1:]]
        for each in graph.input
        if each.name not in weights and each.name != SAMPLE
    }
    size = 4 * num_stages * rows * sum(int(np.prod(shape)) for shape in shapes.values())
    if size > _MAX_TABLE_BYTES:
        raise ExportError(
            got=f"step inputs of {size / 2**30:.1f} GiB for {num_stages} evaluations and {rows} labels",
            expected=f"at most {_MAX_TABLE_BYTES / 2**30:g} GiB a plan",
            remedy="use the target onnx-loop, whose graphs compute them in the call",
        )
    # Every distinct label is a sample.
    conditioning = Conditioning({LABELS: labels} if len(labels) else {}, np.arange(rows))
    timesteps = np.repeat(plan.evaluation_timesteps[:, None], rows, axis=1)
    inputs = EarlyGraphs(parts.graphs.before_loop, network).compute(timesteps, conditioning)
    tables: Arrays = {}
    for name in shapes:
        table = inputs.expanded(name)
        if not inputs.per_stage(name):
            table = np.broadcast_to(table, (num_stages, *table.shape))
        tables[name] = table[:, :1] if name in inputs.plan else table
    return tables


def plan_arrays(network: NetworkSpec, plan: Plan) -> Arrays:
    """What the loop reads beside step inputs: rows of weights, and the noise of seed 0."""
    rows = plan.coefficients.copy()
    for row, flags in zip(rows, plan.stage_flags, strict=True):
        if not flags.rederive_eps:
            row[[Column.RE_X, Column.RE_X0]] = 0.0
        row[NUM_COLUMNS - 1] = 1 + max(flags.written_slots, default=-1)
    seeds, stages = np.zeros(1, np.uint64), range(len(rows))
    x_T = standard_normal(seeds, network.num_elements, stage=0, stream=Stream.INITIAL)
    noise = np.zeros((len(rows), 1, *(1 for _ in network.sample_shape)), np.float32)
    if any(flags.add_noise for flags in plan.stage_flags):
        drawn = standard_normal(seeds, network.num_elements, stage=stages, stream=Stream.STEP)
        noise = drawn.reshape(len(rows), 1, *network.sample_shape)
    return {
        "coefficients": rows,
        "timesteps": plan.evaluation_timesteps,
        "x_T": x_T.reshape(1, *network.sample_shape),
        "noise": noise,
    }


def network_name(batch_size: int, kind: str) -> str:
    return f"step_b{batch_size}_{kind}"


def static_network(step: bytes, names: dict[str, str], batch_size: int) -> bytes:
    """The step graph at one batch size, its inputs renamed and, as its outputs, in float32."""
    model = onnx.load_from_string(step)
    batch_profiles(model, [batch_size])
    write_out_norms(model)
    # Other values' shapes are left to the reader, which infers them.
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for each in model.graph.input:
        each.name = names.get(each.name, each.name)
    return float32_interface(serialised(model))


def float32_interface(network: bytes) -> bytes:
    """The network with float32 inputs and outputs, converted where it has half precision."""
    model = onnx.load_from_string(network)
    graph = model.graph
    before, after = [], []
    for role, values in (("in", graph.input), ("out", graph.output)):
        for each in values:
            kind, half = each.type.tensor_type, f"{each.name}/half"
            if kind.elem_type not in _HALVES:
                continue
            for node in graph.node:
                node.input[:] = [half if name == each.name else name for name in node.input]
                node.output[:] = [half if name == each.name else name for name in node.output]
            if role == "in":
                before.append(helper.make_node("Cast", [each.name], [half], name=half, to=kind.elem_type))
            else:
                after.append(helper.make_node("Cast", [half], [each.name], name=half, to=TensorProto.FLOAT))
            kind.elem_type = TensorProto.FLOAT
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return serialised(model)


def run_script(batch_sizes: Iterable[int], inputs: Sequence[str], kind: str) -> str:
    """The commands that build and measure the networks, one for each batch size."""
    lines = [
        "#!/bin/sh",
        "# An engine of each step network, built and measured. Further options are passed on: sh run.sh --verbose",
        "# TRTEXEC names the program where it is not on the path. Batch and precision are the graph's own.",
        "set -e",
        'cd "$(dirname "$0")"',
    ]
    for size in batch_sizes:
        name = network_name(size, kind)
        options = [
            f"--onnx={name}.onnx",
            f"--saveEngine={name}.engine",
            "--stronglyTyped",
            # Without it float32 products are rounded to 10 bits.
            *(["--noTF32"] if kind == "float32" else []),
            "--useCudaGraph",
            "--profilingVerbosity=detailed",
            f"--exportLayerInfo={name}.layers.json",
            "--loadInputs=" + ",".join(f"{each}:first/b{size}/{each}.bin" for each in inputs),
        ]
        lines += ["", " \\\n  ".join(['"${TRTEXEC:-trtexec}"', *map(shlex.quote, options), '"$@"'])]
    return "\n".join(lines) + "\n"
