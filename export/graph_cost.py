"""The cost of a network's parts: nodes, floating-point operations and bytes by binding time, for one sample.

Operations are counted as is usual: two for each multiply-add of a convolution or matrix product, one an element for
all else that computes; moving and reshaping count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from skipstep.networks.graphs import BATCH, Binding, Partition

_MOVES = frozenset(
    {
        *("Reshape", "Transpose", "Concat", "Split", "Slice", "Gather", "Identity", "Shape", "Squeeze", "Unsqueeze"),
        *("Cast", "Constant", "ConstantOfShape", "Expand", "Flatten", "Pad", "Tile", "Resize"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartCost:
    """One binding time. `flops` of one evaluation for one sample; `weight_bytes` of the constants that it reads.

    `crossing` values of `crossing_bytes` a row go from here to later times.
    """

    nodes: int
    flops: int
    weight_bytes: int
    crossing: int
    crossing_bytes: int


def partition_costs(parts: Partition) -> dict[str, PartCost]:
    """Costs by the name of each graph that exists: plan, prompt, call, step."""
    costs: dict[str, PartCost] = {}
    for binding in (Binding.PLAN, Binding.PROMPT, Binding.CALL, Binding.STEP):
        name = str(binding.name).lower()
        graph: bytes | None = getattr(parts.graphs, name)
        if graph is not None:
            nodes = len(parts.nodes[binding])
            if binding == Binding.CALL and parts.graphs.prompt is None:
                nodes += len(parts.nodes[Binding.PROMPT])  # This graph repeats them.
            costs[name] = graph_cost(onnx.load_from_string(graph), nodes=nodes, crosses=binding != Binding.STEP)
    return costs


def costs_as_json(costs: Mapping[str, PartCost]) -> dict[str, Any]:
    return {name: asdict(cost) for name, cost in costs.items()}


def graph_cost(model: ModelProto, *, nodes: int, crosses: bool) -> PartCost:
    """The cost of a graph at a batch size of one; `crosses`: its outputs are read by other graphs.

    `nodes` are those of the exported network; the graph has some more, which compute shapes.
    """
    model = at_batch_one(model)
    shapes, sizes = shapes_and_sizes(model.graph)
    crossing = [each.name for each in model.graph.output] if crosses else []
    return PartCost(
        nodes=nodes,
        flops=sum(node_flops(node, shapes) for node in model.graph.node),
        weight_bytes=sum(_tensor_bytes(tensor) for tensor in model.graph.initializer),
        crossing=len(crossing),
        crossing_bytes=sum(math.prod(shapes[name]) * sizes[name] for name in crossing),
    )


def at_batch_one(model: ModelProto) -> ModelProto:
    """A copy whose batch is one sample, with the shapes that follow from it."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in (*fixed.graph.input, *fixed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == BATCH:
                dim.dim_value = 1
    return onnx.shape_inference.infer_shapes(fixed, data_prop=True)


def shapes_and_sizes(graph: GraphProto) -> tuple[dict[str, Shape], dict[str, int]]:
    """Each tensor's shape by name, and the bytes of an element of each that is no constant."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    sizes: dict[str, int] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
        sizes[value.name] = helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return shapes, sizes


def node_flops(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Operations of one node, counted as described above."""
    if node.op_type in _MOVES:
        return 0
    elements = math.prod(shapes.get(node.output[0], (0,)))
    if node.op_type in ("Conv", "ConvTranspose"):
        # A filter is [out, in/groups, …]: each output element is one product over the rest of it.
        return 2 * elements * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "MatMul":
        return 2 * elements * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        return 2 * elements * shapes[node.input[0]][0 if attributes.get("transA") else 1]
    return elements


def _tensor_bytes(tensor: TensorProto) -> int:
    itemsize: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims)) * itemsize
