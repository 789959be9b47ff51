"""What TensorRT-RTX does not fuse into single kernels, by rules found by building (tests/export/test_fusion.py).

    a group norm   where the channels of a group are no power of two: statistics and result take a kernel more
    attention      in half precision up to a head dimension of 256; in float32 never

Of release 1.7, found on sm_75, sm_86 and sm_89. Nothing is wrong with such a network: it launches more kernels.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import NodeProto

from skipstep.export.graph_cost import at_batch_one, shapes_and_sizes

_MAX_HEAD = 256
_HALF_BYTES = 2


def not_fused(step_graph: bytes) -> list[str]:
    """Each kind of norm and attention of the network that is not fused, with how many there are and why."""
    graph = at_batch_one(onnx.load_from_string(step_graph)).graph
    shapes, sizes = shapes_and_sizes(graph)
    made = {output: node for node in graph.node for output in node.output}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "InstanceNormalization" and (given := _reshaped(node, made)) in shapes:
            groups, channels = shapes[node.input[0]][1], shapes[given][1]
            each = channels // groups
            if each & (each - 1):
                found[f"norm with {each} channels in a group, which is no power of two"] += 1
        elif node.op_type == "Softmax" and (product := _product(node, made)) is not None:
            queries = product.input[0]
            head = shapes[queries][-1]
            if sizes[queries] > _HALF_BYTES:
                found["attention in float32, which is fused in half precision alone"] += 1
            elif head > _MAX_HEAD:
                found[f"attention of head dimension {head}, which is above {_MAX_HEAD}"] += 1
    return [f"{count} × {kind}" for kind, count in found.items()]


def _reshaped(norm: NodeProto, made: dict[str, NodeProto]) -> str:
    """What is reshaped into groups for a norm; a conversion between is passed over."""
    node = made.get(norm.input[0])
    while node is not None and node.op_type == "Cast":
        node = made.get(node.input[0])
    return node.input[0] if node is not None and node.op_type == "Reshape" else ""


def _product(softmax: NodeProto, made: dict[str, NodeProto]) -> NodeProto | None:
    """The product of queries and keys before a softmax; conversions and factors between are passed over."""
    node = made.get(softmax.input[0])
    while node is not None and node.op_type in ("Cast", "Mul", "Add", "Div"):
        node = made.get(node.input[0])
    return node if node is not None and node.op_type == "MatMul" else None
