"""How many kernels a TensorRT-RTX engine launches, and the largest of them, by the graph that it was built from."""

from __future__ import annotations

from typing import Any

import onnx

from skipstep.export.engine_plan import PRODUCTS, Launch, launches
from skipstep.export.graph_cost import at_batch_one, node_flops, shapes_and_sizes
from skipstep.export.input_names import layer_of

_LARGEST = 10


def describe_launches(engine: bytes, step_graph: bytes) -> dict[str, Any]:
    """`kernels` of an evaluation at each profile, and the `largest` ten, by the operations of one sample, in words.

    `step_graph` is what the engine was built from. Raises ExportError for an engine without a plan in
    text (skipstep.export.engine_plan).
    """
    plans = launches(engine)
    graph = at_batch_one(onnx.load_from_string(step_graph)).graph
    shapes, _ = shapes_and_sizes(graph)
    # In half precision and in 8 bits a weight's name may say its type behind a slash.
    weights = {tensor.name.partition("/")[0] for tensor in graph.initializer}
    costs = {node.name: node_flops(node, shapes) for node in graph.node}
    layers = {}
    for node in graph.node:
        found = [layer_of(weight) for name in node.input if (weight := name.partition("/")[0]) in weights]
        layers[node.name] = next((layer for layer in found if layer), None)
    # What moves a product's input, and in 8 bits what scales its result, names its node too.
    computed: dict[str, Launch] = {}
    for each in sorted(plans[0], key=lambda each: each.kind not in PRODUCTS):
        computed |= dict.fromkeys((node for node in each.nodes if node not in computed), each)
    sized = [(sum(costs.get(node, 0) for node in each.nodes if computed[node] is each), each) for each in plans[0]]
    sized.sort(key=lambda pair: -pair[0])
    largest = []
    for flops, each in sized[:_LARGEST]:
        where = dict.fromkeys(layer for node in each.nodes if (layer := layers.get(node)))
        largest.append(f"{flops / 1e6:.2f} MFLOP in {' + '.join(where) or ' + '.join(each.nodes)}")
    return {"kernels": [len(plan) for plan in plans], "largest": largest}
