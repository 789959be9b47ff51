"""Weights on disk in half the bytes where not a bit is lost: float16 in the file, a Cast in the graph.

A float32 weight whose every element float16 holds exactly is stored as float16 and cast back ahead of the nodes of its
own graph, inside a loop's body too. A runtime computes such casts when it loads the model, so what runs is what ran
before; a network whose weights were rounded to float16 takes half the disk.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper


def compress_weights(model: bytes) -> bytes:
    """The same model with every float32 initializer stored as float16 where that is exact and takes fewer bytes.

    Left alone: weights of other types, weights in files beside the model, and those that a caller may replace or read
    as an output. A weight keeps its name; what is stored has another one.
    """
    loaded = onnx.load_from_string(model)
    graphs = list(_graphs(loaded.graph))
    taken = {name for graph in graphs for name in _names(graph)}
    for graph in reversed(graphs):  # Inner ones first: a graph's nodes are written anew, with all that they hold.
        _compress(graph, taken)
    return bytes(loaded.SerializeToString())


def _compress(graph: GraphProto, taken: set[str]) -> None:
    public = {value.name for value in (*graph.input, *graph.output)}
    casts: list[NodeProto] = []
    for weight in graph.initializer:
        if weight.name in public:
            continue
        stored = _as_float16(weight)
        if stored is None:
            continue
        stored.name = _free_name(f"{weight.name}/stored", taken)
        cast = helper.make_node("Cast", [stored.name], [weight.name], name=stored.name, to=TensorProto.FLOAT)
        if stored.ByteSize() + cast.ByteSize() < weight.ByteSize():
            weight.CopyFrom(stored)
            casts.append(cast)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _as_float16(weight: TensorProto) -> TensorProto | None:
    """The weight in float16, or None if that is another weight. Compared by bits: -0 is not 0, and NaN is itself."""
    if weight.data_type != TensorProto.FLOAT or weight.data_location == TensorProto.EXTERNAL:
        return None
    exact = numpy_helper.to_array(weight)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    if half.astype(np.float32).tobytes() != exact.tobytes():
        return None
    return numpy_helper.from_array(half)


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all that its nodes hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)


def _names(graph: GraphProto) -> Iterator[str]:
    for each in (*graph.input, *graph.initializer):
        yield each.name
    for node in graph.node:
        yield node.name
        yield from node.output
