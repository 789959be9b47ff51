"""Weights in half the bytes on disk where no bit is lost: float16 in the file, a Cast in the graph.

A float32 weight of which float16 holds every element exactly is stored as float16 and cast back before the nodes of its
own graph, also inside a loop's body. ONNX Runtime computes such casts when it loads the model, so the same operations
run on the same numbers. A network whose weights were rounded to float16 takes half the disk.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from skipstep.export.graph_writer import inner_graphs, load_graph


def compress_weights(model: bytes) -> bytes:
    """The same model with every float32 initializer stored as float16 where that is exact and takes fewer bytes.

    Left alone: weights of other types, weights in files beside the model, and those that a caller may replace or read
    as an output. A weight keeps its name; what is stored has another one.
    """
    loaded = load_graph(model)
    graphs = list(_graphs(loaded.graph))
    taken = {name for graph in graphs for name in _names(graph)}
    for graph in reversed(graphs):  # Inner ones first: a graph's nodes are written anew, with all that they hold.
        _compress(graph, taken)
    return bytes(loaded.SerializeToString())


def expand_weights(model: bytes) -> bytes:
    """The model before `compress_weights`, for builders that take a weight only as it is: TensorRT's fusions do."""
    loaded = load_graph(model)
    for graph in reversed(list(_graphs(loaded.graph))):
        stored = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
        nodes = []
        for node in graph.node:
            # The form that `compress_weights` writes, and no cast of a network's own.
            if node.op_type == "Cast" and node.input[0] in stored and node.name == node.input[0]:
                half = numpy_helper.to_array(stored[node.input[0]])
                stored[node.input[0]].CopyFrom(numpy_helper.from_array(half.astype(np.float32), node.output[0]))
            else:
                nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
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
    """The graph and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from _graphs(inner)


def _names(graph: GraphProto) -> Iterator[str]:
    for each in (*graph.input, *graph.initializer):
        yield each.name
    for node in graph.node:
        yield node.name
        yield from node.output
