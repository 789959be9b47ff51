"""Weights in half the bytes on disk where no bit is lost: float16 in the file, a Cast in the graph.

A float32 weight of which float16 holds every element exactly is stored as float16 and cast back before the nodes of its
own graph, also inside a loop's body. ONNX Runtime computes such casts when it loads the model, so the same operations
run on the same numbers. A network whose weights were rounded to float16 takes half the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from skipstep.export.graph_writer import inner_graphs, load_graph, serialised
from skipstep.export.large_model import array_of, is_outside, outside
from skipstep.networks.large_graph import Weights, weights_of


def compress_weights(model: bytes) -> bytes:
    """The same model with every float32 initializer stored as float16 where that is exact and takes fewer bytes.

    Left alone: weights of other types, weights in files, and those that a caller may replace or read as an output. A
    weight keeps its name; what is stored has another one.
    """
    loaded, weights = load_graph(model), dict(weights_of(model))
    graphs = list(_graphs(loaded.graph))
    taken = {name for graph in graphs for name in _names(graph)}
    for graph in reversed(graphs):  # Inner ones first: a graph's nodes are written anew, with all that they hold.
        _compress(graph, taken, weights)
    return serialised(loaded, weights)


def expand_weights(model: bytes) -> bytes:
    """The model before `compress_weights`, for builders that take a weight only as it is: TensorRT's fusions do."""
    loaded, weights = load_graph(model), dict(weights_of(model))
    for graph in reversed(list(_graphs(loaded.graph))):
        stored = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
        nodes = []
        for node in graph.node:
            # The form that `compress_weights` writes, and no cast of a network's own.
            if node.op_type == "Cast" and node.input[0] in stored and node.name == node.input[0]:
                half = stored[node.input[0]]
                exact = array_of(half, weights).astype(np.float32)
                half.CopyFrom(_placed(half, exact, node.output[0], weights))
            else:
                nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
    return serialised(loaded, weights)


def _compress(graph: GraphProto, taken: set[str], weights: dict[str, NDArray[Any]]) -> None:
    public = {value.name for value in (*graph.input, *graph.output)}
    casts: list[NodeProto] = []
    for weight in graph.initializer:
        if weight.name in public:
            continue
        half = _as_float16(weight, weights)
        if half is None:
            continue
        stored = _placed(weight, half, _free_name(f"{weight.name}/stored", taken), weights)
        cast = helper.make_node("Cast", [stored.name], [weight.name], name=stored.name, to=TensorProto.FLOAT)
        if is_outside(weight) or stored.ByteSize() + cast.ByteSize() < weight.ByteSize():
            weight.CopyFrom(stored)
            casts.append(cast)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _placed(of: TensorProto, array: NDArray[Any], name: str, weights: dict[str, NDArray[Any]]) -> TensorProto:
    """An initializer with these values: where the one lies that it takes the place of."""
    if not is_outside(of):
        return numpy_helper.from_array(array, name)
    weights[name] = array
    return outside(name, array)


def _as_float16(weight: TensorProto, weights: Weights) -> NDArray[np.float16] | None:
    """The weight in float16, or None if that is another weight. Compared by bits: -0 is not 0, and NaN is itself."""
    if weight.data_type != TensorProto.FLOAT or (is_outside(weight) and weight.name not in weights):
        return None
    exact = array_of(weight, weights)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32).view(np.uint32), exact.view(np.uint32)) else None


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
