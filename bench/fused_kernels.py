"""How many kernels a network's graph is on a GPU, and what each moves: an assumption about fusion, stated as a rule.

    a kernel begins at   a convolution or matrix product, a normalisation, a reduction, a concatenation, a resize, a pad
    it takes in          elementwise operations on what it makes (bias, affine, activation, residual sum), and
                         an attention's softmax and second product (as flash attention does)
    it costs nothing     to reshape or transpose (strides), or to compute a shape

An operation joins the last of the kernels that make its inputs, so kernels in order are a valid order. This is about
what TensorRT does with a UNet: it also writes concatenations in place and joins the three products before an attention,
which makes fewer, and converts layouts, which makes more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx
from onnx import ModelProto, NodeProto

from skipstep.export.graph_cost import Shape, at_batch_one, node_flops, shapes_and_sizes

_VIEWS: Final = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Transpose"})
_PRODUCTS: Final = frozenset({"MatMul", "Gemm"})
_BEGIN: Final = _PRODUCTS | {
    *("Conv", "ConvTranspose", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "Softmax"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "AveragePool", "MaxPool", "GlobalAveragePool"),
    *("Concat", "Split", "Slice", "Gather", "Resize", "Pad", "Tile", "Expand"),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel at a batch of one: `name` is that of the operation that it begins with.

    `weights` are elements of constants, the same for any batch; `elements` those of the tensors of a sample that it
    reads and writes, each once. `result` is rows (of a sample) and columns of the last matrix product, if it has one.
    """

    name: str
    flops: int
    weights: int
    elements: int
    result: tuple[int, int] | None


@dataclass(slots=True)
class _Group:
    name: str
    nodes: list[NodeProto] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)


def fused_kernels(step_network: ModelProto) -> tuple[Kernel, ...]:
    """The kernels of one evaluation, in order. `step_network` is the graph of skipstep.export.partition."""
    model = at_batch_one(step_network)
    shapes, _ = shapes_and_sizes(model.graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    bookkeeping = _shape_arithmetic(model)
    groups: list[_Group] = []
    home: dict[str, int] = {}  # The kernel that makes a tensor; those of no kernel are the network's inputs.
    source: dict[str, str] = {}  # What a view is a view of.

    def origin(name: str) -> str:
        return source.get(name, name)

    for node in model.graph.node:
        if node.output[0] in bookkeeping:
            continue
        if node.op_type in _VIEWS:
            source[node.output[0]] = origin(node.input[0])
            continue
        reads = [origin(name) for name in node.input if name and name not in bookkeeping]
        made = [home[name] for name in reads if name in home]
        number = max(made, default=len(groups))
        if not made or not _joins(node, groups[number]):
            number = len(groups)
            groups.append(_Group(node.op_type))
        group = groups[number]
        group.nodes.append(node)
        group.reads.update(name for name in reads if home.get(name) != number)
        for name in reads:
            if name in home and home[name] != number:
                groups[home[name]].writes.add(name)
        home |= dict.fromkeys(node.output, number)
    for output in model.graph.output:
        groups[home[origin(output.name)]].writes.add(origin(output.name))
    return tuple(_kernel(group, shapes, constants) for group in groups)


def _joins(node: NodeProto, group: _Group) -> bool:
    if node.op_type == "Softmax":
        return group.name in _PRODUCTS
    if node.op_type in _PRODUCTS:
        return any(each.op_type == "Softmax" and each.output[0] in node.input for each in group.nodes)
    return node.op_type not in _BEGIN


def _kernel(group: _Group, shapes: dict[str, Shape], constants: set[str]) -> Kernel:
    def elements(names: Sequence[str]) -> int:
        return sum(math.prod(shapes[name]) for name in names)

    return Kernel(
        group.name,
        flops=sum(node_flops(node, shapes) for node in group.nodes),
        weights=elements([name for name in group.reads if name in constants]),
        elements=elements([*(name for name in group.reads if name not in constants), *group.writes]),
        result=_result(group, shapes),
    )


def _result(group: _Group, shapes: dict[str, Shape]) -> tuple[int, int] | None:
    """A convolution is a product too: of all positions and all output channels."""
    for node in reversed(group.nodes):
        shape = shapes[node.output[0]]
        if node.op_type in ("Conv", "ConvTranspose"):
            return math.prod(shape[2:]), shape[1]
        if node.op_type in _PRODUCTS:
            return math.prod(shape[:-1]), shape[-1]
    return None


def _shape_arithmetic(model: ModelProto) -> set[str]:
    """Tensors that are integers: what shapes are made of."""
    graph = model.graph
    values = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)
    }
    values |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    integers = {onnx.TensorProto.INT64, onnx.TensorProto.INT32}
    return {name for name, kind in values.items() if kind in integers}
