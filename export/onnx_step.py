"""One step in ONNX, after the network and before it: the operations of kernels.step_numpy in their order.

A row of the coefficient table comes as one value for each column, and says what is done: a term whose column is not in
the row is not in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from skipstep.export.graph_writer import GraphWriter
from skipstep.kernels.layout import Column
from skipstep.kernels.statistics import Thresholding, rank
from skipstep.loops.loop_table import WRITE_BASE, LoopFeatures
from skipstep.networks.spec import NetworkSpec

_LAST = np.iinfo(np.int64).max


def write_step(
    writer: GraphWriter,
    state: Mapping[str, str],
    network: NetworkSpec,
    features: LoopFeatures,
    *,
    output: ValueInfoProto,
    row: Mapping[int, str],
    noise: str | None,
) -> dict[str, str]:
    """One step from what the network gave: the predicted image x0, and what x, memory and base of `state` become.

    `row` has a value for each column of this step. Where it can be guided, the graph around has the values guidance
    `[B, 1]`, batch_size and minus_batch_size `[1]`.
    """
    x = state["x"]
    out, variance = _predictions(writer, output, network, features)

    def weighted(column: int, value: str) -> str:
        return writer.add("Mul", value, row[column])

    def combined(*terms: tuple[int, str | None]) -> str:
        products = [weighted(column, value) for column, value in terms if column in row and value is not None]
        return reduce(lambda total, product: writer.add("Add", total, product), products)

    image = combined((Column.X0_X, x), (Column.X0_OUT, out))
    if Column.CLIP in row:
        # Min and Max keep NaN, where Clip need not.
        image = writer.add("Max", writer.add("Min", image, row[Column.CLIP]), writer.add("Neg", row[Column.CLIP]))
    if features.thresholding is not None:
        image = _threshold(writer, image, features.thresholding, network.num_elements)
    eps = out
    if Column.EPS_X in row:
        eps = combined((Column.EPS_X, x), (Column.EPS_OUT, out))
    if Column.RE_X in row:
        derived = combined((Column.RE_X, x), (Column.RE_X0, image))
        eps = writer.add("Add", derived, eps) if Column.EPS_X in row else derived
    if noise is not None and variance is not None:
        scaled = writer.add("Add", weighted(Column.LOG_SIGMA_OUT, variance), row[Column.LOG_SIGMA])
        noise = writer.add("Mul", noise, writer.add("Exp", scaled))

    memory = state.get("memory")
    after = {
        "x0": image,
        "x": combined(
            (Column.C_X0, image),
            (Column.C_EPS, eps),
            (Column.C_X, x),
            (Column.C_BASE, state.get("base")),
            (Column.C_MEMORY, memory),
            (Column.SIGMA, noise),
        ),
    }
    if Column.M_X in row:
        after["memory"] = combined(
            (Column.M_X, x), (Column.M_X0, image), (Column.M_EPS, eps), (Column.M_MEMORY, memory)
        )
    if WRITE_BASE in row:
        written = writer.add("Equal", row[WRITE_BASE], writer.constant(1.0, np.float32))
        after["base"] = writer.add("Where", written, x, state["base"])
    return after


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
