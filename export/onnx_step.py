"""One step in ONNX, after the network and before it: the operations of kernels.step_numpy in their order.

A row of the coefficient table is given as one value for each column that is read (skipstep.export.onnx_table): a term
whose column is not in the row is not in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from skipstep.export.graph_writer import GraphWriter
from skipstep.export.onnx_table import WRITTEN_SLOT
from skipstep.kernels.layout import SLOT_COLUMNS, Column, StepFlags
from skipstep.kernels.statistics import Thresholding, rank
from skipstep.networks.spec import NetworkSpec

_LAST = np.iinfo(np.int64).max


def write_step(
    writer: GraphWriter,
    state: Mapping[str, str],
    network: NetworkSpec,
    flags: StepFlags,
    *,
    output: ValueInfoProto,
    row: Mapping[int, str],
    noise: str | None,
    thresholding: Thresholding | None,
) -> dict[str, str]:
    """One step from the network's `output`: the predicted image x0, the next x, and the history slots that are written.

    `row` has a value for each column of this step; in a loop, whose `flags` are those of all its stages, also the slot
    that a stage writes. With flags.guided the graph around has the values guidance
    `[B, 1]`, batch_size and minus_batch_size `[1]`.
    """
    x = state["x"]
    out, variance = _predictions(writer, output, network, flags)

    def weighted(column: int, value: str) -> str:
        return writer.add("Mul", value, row[column])

    def combined(*terms: tuple[int, str | None]) -> str:
        products = [weighted(column, value) for column, value in terms if column in row and value is not None]
        return reduce(lambda total, product: writer.add("Add", total, product), products)

    image = combined((Column.X0_X, x), (Column.X0_OUT, out))
    if Column.CLIP in row:
        # Min and Max keep NaN, where Clip need not.
        image = writer.add("Max", writer.add("Min", image, row[Column.CLIP]), writer.add("Neg", row[Column.CLIP]))
    if thresholding is not None:
        image = _threshold(writer, image, thresholding, network.num_elements)
    eps = out
    if Column.EPS_X in row:
        eps = combined((Column.EPS_X, x), (Column.EPS_OUT, out))
    if Column.RE_X in row:
        derived = combined((Column.RE_X, x), (Column.RE_X0, image))
        eps = writer.add("Add", derived, eps) if Column.EPS_X in row else derived
    if noise is not None and variance is not None:
        scaled = writer.add("Add", weighted(Column.LOG_SIGMA_OUT, variance), row[Column.LOG_SIGMA])
        noise = writer.add("Mul", noise, writer.add("Exp", scaled))

    after = {
        "x0": image,
        "x": combined(
            (Column.C_X0, image),
            (Column.C_EPS, eps),
            (Column.C_X, x),
            *((column, state.get(f"h{slot}")) for slot, column in enumerate(SLOT_COLUMNS)),
            (Column.SIGMA, noise),
        ),
    }
    for slot in flags.written_slots:
        name = f"h{slot}"
        kept = combined((Column.M_X, x), (Column.M_X0, image), (Column.M_EPS, eps), (Column.M_H, state.get(name)))
        if WRITTEN_SLOT in row:
            written = writer.add("Equal", row[WRITTEN_SLOT], writer.constant(slot, np.float32))
            kept = writer.add("Where", written, kept, state[name])
        after[name] = kept
    return after


def _predictions(
    writer: GraphWriter, output: ValueInfoProto, network: NetworkSpec, flags: StepFlags
) -> tuple[str, str | None]:
    """The network's prediction `[B, n]`, guidance included, and its learned variance, if the step uses one."""
    out, variance = output.name, None
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        out = writer.cast(out, TensorProto.FLOAT)
    flat = writer.constant([-1, network.num_elements])
    if network.learns_variance:
        out, wide = writer.split(out, 2, axis=1)
        if flags.learned_variance:
            variance = writer.add("Reshape", wide, flat)
    out = writer.add("Reshape", out, flat)
    if flags.guided:
        out = _guide(writer, out)
        variance = None if variance is None else _first_half(writer, variance)
    return out, variance


def _first_half(writer: GraphWriter, value: str) -> str:
    return writer.add("Slice", value, writer.constant([0]), "batch_size", writer.constant([0]))


def _guide(writer: GraphWriter, out: str) -> str:
    """u + guidance·(c - u)."""
    conditional = _first_half(writer, out)
    unconditional = writer.add("Slice", out, "minus_batch_size", writer.constant([_LAST]), writer.constant([0]))
    difference = writer.add("Sub", conditional, unconditional)
    return writer.add("Add", unconditional, writer.add("Mul", "guidance", difference))


def _threshold(writer: GraphWriter, image: str, parameters: Thresholding, num_elements: int) -> str:
    """clamp(image, ±s)/s, where s is a bound for each sample (skipstep.kernels.statistics)."""
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
