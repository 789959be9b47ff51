"""What TensorRT-RTX does not fuse into single kernels, by rules found by building (tests/export/test_fusion.py).

    attention   in half precision up to a head dimension of 256, at batch 1 with two heads or more; in float32 never

In a network in 8 bits it is fused while neither of its products is in them, as skipstep.quantizing leaves it.

Of release 1.7, found on sm_75, sm_86 and sm_89. Nothing is wrong with such a network: it launches more kernels.
Norms of any groups are one kernel (skipstep.export.norms).
"""

from __future__ import annotations

import math
from collections import Counter

import onnx
from onnx import NodeProto

from skipstep.export.graph_cost import at_batch_one, shapes_and_sizes

_MAX_HEAD = 256
_HALF_BYTES = 2


def not_fused(step_graph: bytes) -> list[str]:
    """Each kind of attention of the network that is not fused, with how many there are and why."""
    graph = at_batch_one(onnx.load_from_string(step_graph)).graph
    shapes, sizes = shapes_and_sizes(graph)
    made = {output: node for node in graph.node for output in node.output}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "Softmax" and (product := _product(node, made)) is not None:
            queries = product.input[0]
            *heads, _, head = shapes[queries]
            if sizes[queries] > _HALF_BYTES:
                found["attention in float32, which is fused in half precision alone"] += 1
            elif head > _MAX_HEAD:
                found[f"attention of head dimension {head}, which is above {_MAX_HEAD}"] += 1
            elif math.prod(heads) == 1:
                found["attention of one head, which is fused from a batch of 2 on"] += 1
    return [f"{count} × {kind}" for kind, count in found.items()]


def _product(softmax: NodeProto, made: dict[str, NodeProto]) -> NodeProto | None:
    """The product of queries and keys before a softmax; conversions and factors between are passed over."""
    node = made.get(softmax.input[0])
    while node is not None and node.op_type in ("Cast", "Mul", "Add", "Div"):
        node = made.get(node.input[0])
    return node if node is not None and node.op_type == "MatMul" else None
