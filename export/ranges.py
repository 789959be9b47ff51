"""The ranges of a step network's values: what the float network computes for given inputs, with the tails cut off.

percentile   all but one in ten thousand values at either end
entropy      where the rounded distribution tells most about the exact one (the least Kullback-Leibler divergence)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from skipstep.backends.onnxruntime import make_session, run_session
from skipstep.export.graph_writer import load_graph
from skipstep.export.quantize import Layer, LayerRanges, Range, all_values
from skipstep.networks.graphs import Values

Method = Literal["percentile", "entropy"]

_BINS: Final = 2048
_TAIL: Final = 1e-4
_LEVELS: Final = 128


def measure_ranges(
    step: bytes, layers: Sequence[Layer], inputs: Sequence[Values], *, method: Method = "percentile"
) -> dict[str, LayerRanges]:
    """By layer, over all of these inputs of the float32 step network. Raises ExportError."""
    names = all_values(layers)
    model = load_graph(step)
    known = {each.name for each in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in known
    )
    session = make_session(bytes(model.SerializeToString()))
    computed = [name for name in names if name not in {each.name for each in model.graph.input}]

    def values(given: Values) -> Mapping[str, NDArray[Any]]:
        return {**given, **run_session(session, computed, given)}

    # Histograms need their ends first, and the values of all inputs would not fit in memory.
    ends: dict[str, Range] = dict.fromkeys(names, (0.0, 0.0))
    for given in inputs:
        found = values(given)
        ends = {
            name: (min(low, float(found[name].min())), max(high, float(found[name].max())))
            for name, (low, high) in ends.items()
        }
    counts = {name: np.zeros(_BINS) for name in names}
    for given in inputs:
        found = values(given)
        for name in names:
            counts[name] += np.histogram(found[name], _BINS, _open(ends[name]))[0]
    cut = _percentile if method == "percentile" else _least_divergence
    spans = {name: cut(counts[name], _open(ends[name])) for name in names}
    return {
        layer.name: LayerRanges({i: spans[name] for i, name in layer.activations.items()}, spans[layer.result])
        for layer in layers
    }


def _open(ends: Range) -> Range:
    return ends if ends[0] < ends[1] else (ends[0], ends[0] + 1.0)


def _percentile(counts: NDArray[np.float64], ends: Range) -> Range:
    share = np.cumsum(counts) / counts.sum()
    edges = np.linspace(*ends, _BINS + 1)
    low = edges[int(np.searchsorted(share, _TAIL, side="right"))]
    high = edges[min(int(np.searchsorted(share, 1 - _TAIL)) + 1, _BINS)]
    return float(low), float(high)


def _least_divergence(counts: NDArray[np.float64], ends: Range) -> Range:
    """Symmetric: the magnitude beyond which nothing is told apart."""
    centres = np.abs(np.linspace(*ends, _BINS + 1)[:-1] + (ends[1] - ends[0]) / (2 * _BINS))
    magnitudes, edges = np.histogram(centres, _BINS, (0.0, max(-ends[0], ends[1])), weights=counts)
    best, limit = np.inf, float(edges[-1])
    for stop in range(_LEVELS, _BINS + 1, 16):
        exact = magnitudes[:stop].copy()
        exact[-1] += magnitudes[stop:].sum()
        parts = np.arange(stop) * _LEVELS // stop
        filled = (magnitudes[:stop] > 0).astype(float)
        sums, sizes = (np.bincount(parts, each, _LEVELS) for each in (magnitudes[:stop], filled))
        rounded = np.divide(sums, sizes, out=np.zeros(_LEVELS), where=sizes > 0)[parts] * filled
        divergence = _divergence(exact, rounded)
        if divergence < best:
            best, limit = divergence, float(edges[stop])
    return max(-limit, ends[0]), min(limit, ends[1])


def _divergence(exact: NDArray[np.float64], rounded: NDArray[np.float64]) -> float:
    p, q = exact / exact.sum(), rounded / max(rounded.sum(), 1e-12)
    told = p > 0
    # What the rounded distribution lacks counts as very rare.
    return float(np.sum(p[told] * np.log(p[told] / np.maximum(q[told], 1e-9))))
