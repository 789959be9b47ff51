"""The batch of somebody's graph: any number of samples, each with a timestep of its own.

Files are often written for one batch size b, or with one timestep for the whole batch. Most such graphs serve any batch
once the numbers that the exporter froze are taken out of them:

    Reshape to [k*b, …]        -> [-1, …]    rows stay rows: the other dimensions fix how many there are
    Expand to [b, …]           -> [1, …]
    Resize to [b, C, H, W]     -> by scales
    a constant of b equal rows -> one row, repeated where it is joined to others
    a timestep []              -> [batch], where it only becomes one row of a batch later

Nothing of this is trusted: shapes are inferred at two batch sizes, and must be the same but for the batch; and the
engine compares the graph with the file itself before it is used (skipstep.backends.onnx_file).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from skipstep.networks.graphs import BATCH

Shapes = dict[str, list[int | str | None]]

# Two sizes that no dimension of a network is likely to be a multiple of.
_SIZES = (1009, 1013)
# Tensors of more numbers say nothing about shapes.
_MOST_FOR_SHAPES = 1024
# What exporters compute shapes with.
# fmt: off
_SHAPE_ARITHMETIC = frozenset({
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Floor", "Gather", "Identity", "Mul",
    "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
})
# fmt: on
_ELEMENTWISE = frozenset({"Add", "Cast", "Div", "Exp", "Identity", "Log", "Mul", "Neg", "Pow", "Sqrt", "Sub"})


def infer_batched(model: ModelProto) -> Shapes:
    """Shapes by name, as integers, "batch", and None for a dimension that is neither; values of unknown rank are left
    out. Raises onnx.shape_inference.InferenceError for a graph that does not take every batch."""
    first, second = (_inferred(model, size) for size in _SIZES)
    shapes: Shapes = {}
    for name, dims in first.items():
        others = second.get(name, [])
        if len(others) != len(dims):
            continue
        shapes[name] = [a if a == b else BATCH if (a, b) == _SIZES else None for a, b in zip(dims, others, strict=True)]
    return shapes


def settled(model: ModelProto, simplify: Callable[[ModelProto], ModelProto]) -> tuple[ModelProto, Shapes]:
    """The graph with as little arithmetic on shapes as possible, and its shapes (infer_batched).

    Where inference does not see through that arithmetic, the graph is simplified at one batch size, at which all of it
    is constant, and that size is taken out again.
    """
    shapes = infer_batched(model)
    if not _unknown(model, shapes):
        return model, shapes
    frozen = ModelProto()
    frozen.CopyFrom(model)
    _set_batch(frozen, BATCH, _SIZES[0])
    frozen = simplify(frozen)
    free_batch(frozen, _SIZES[0], [each.name for each in frozen.graph.input])
    _set_batch(frozen, _SIZES[0], BATCH)
    del frozen.graph.value_info[:]
    for each, own in zip(frozen.graph.output, model.graph.output, strict=True):
        each.CopyFrom(own)
    try:
        again = infer_batched(frozen)
    except onnx.shape_inference.InferenceError:
        return model, shapes
    return (frozen, again) if _unknown(frozen, again) < _unknown(model, shapes) else (model, shapes)


def _unknown(model: ModelProto, shapes: Shapes) -> int:
    """How many values have dimensions that are not known."""
    made = [name for node in model.graph.node for name in node.output if name]
    return sum(name not in shapes or None in shapes[name] for name in made)


def _set_batch(model: ModelProto, before: int | str, after: int | str) -> None:
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim[:1]:
            if before in (dim.dim_param, dim.dim_value):
                dim.Clear()
                setattr(dim, "dim_param" if isinstance(after, str) else "dim_value", after)


def infer_at(model: ModelProto) -> dict[str, list[int | None]]:
    """Shapes by name as the graph stands."""
    return _inferred(model, None)


def _inferred(model: ModelProto, size: int | None) -> dict[str, list[int | None]]:
    light = ModelProto()
    light.CopyFrom(_without_weights(model))
    for value in light.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if size is not None and dim.dim_param == BATCH:
                dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(light, strict_mode=True, data_prop=True).graph
    return {
        value.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }


def _without_weights(model: ModelProto) -> ModelProto:
    """The model with its large weights as inputs."""
    graph = model.graph
    small = [each for each in graph.initializer if np.prod(each.dims, dtype=np.float64) <= _MOST_FOR_SHAPES]
    kept = {each.name for each in small}
    large = [
        helper.make_tensor_value_info(each.name, each.data_type, list(each.dims))
        for each in graph.initializer
        if each.name not in kept
    ]
    light = helper.make_graph(graph.node, graph.name, [*graph.input, *large], list(graph.output), small)
    return helper.make_model(light, opset_imports=model.opset_import, ir_version=model.ir_version)


def free_timestep(model: ModelProto, timestep: str, ranks: Mapping[str, int]) -> str | None:
    """Let the number `timestep`, which is now `[batch]`, stay a row for each sample; `ranks` are those of the graph as
    it was. Returns the operator that needs one number for all, None where there is none."""
    numbers = {timestep}
    for node in model.graph.node:
        read = numbers.intersection(node.input)
        if not read:
            continue
        others = max((ranks.get(name, 0) for name in node.input if name and name not in numbers), default=0)
        rank = ranks.get(node.output[0])
        if node.op_type in ("Reshape", "Squeeze", "Unsqueeze") and rank is not None and rank <= 1:
            data = node.input[0]
            node.CopyFrom(helper.make_node("Identity", [data], list(node.output), name=node.name))
        elif node.op_type not in (*_ELEMENTWISE, "Expand") or (node.op_type in _ELEMENTWISE and others > 1):
            return str(node.op_type)
        if rank == 0:
            numbers.update(node.output)
    return None


def free_batch(model: ModelProto, batch: int, inputs: Sequence[str]) -> None:
    """Take the batch size that its exporter froze out of a graph, in place, as far as the module's rules go."""
    _fold(model)
    shapes = infer_at(model)
    constants = {each.name: each for each in model.graph.initializer}
    rows = set(inputs)
    nodes: list[NodeProto] = []
    for node in list(model.graph.node):
        # Of a value only the shape is known to Shape and Size; those follow from no sample.
        if rows.isdisjoint(node.input) or node.op_type in ("Shape", "Size"):
            nodes.append(node)
            continue
        rows.update(node.output)
        before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
        if not before or not after or None in (*before, *after):
            if node.op_type == "Expand" and after and len(after) == 1:
                _replace(model, node, 1, np.array([1]))
            nodes.append(node)
            continue
        sizes = [each for each in after if each is not None]
        if node.op_type == "Reshape" and sizes[0] % batch == 0:
            _replace(model, node, 1, np.array([0 if before[0] == sizes[0] else -1, *sizes[1:]]))
        elif node.op_type == "Expand" and sizes[0] == batch:
            _replace(model, node, 1, np.array([1, *sizes[1:]]))
        elif node.op_type == "Resize" and len(node.input) > 3 and node.input[3]:
            scales = [a / float(b or 1) for a, b in zip(sizes, before, strict=True)]
            _replace(model, node, 2, np.array(scales, np.float32))
            del node.input[3:]
        elif node.op_type in (*_ELEMENTWISE, "Concat"):
            for index, name in enumerate(node.input):
                row = _one_row(constants[name], batch, len(after)) if name in constants else None
                if row is not None:
                    _replace(model, node, index, row)
                    if node.op_type == "Concat":
                        nodes += _repeated(node, index, inputs[0], len(after))
        nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _fold(model: ModelProto) -> None:
    """Compute what follows from small constants alone: shapes, at a fixed batch size. The optimizer leaves some."""
    graph = model.graph
    known = {
        each.name: numpy_helper.to_array(each)
        for each in graph.initializer
        if np.prod(each.dims, dtype=np.float64) <= _MOST_FOR_SHAPES
    }
    kept: list[NodeProto] = []
    for node in graph.node:
        foldable = node.op_type in _SHAPE_ARITHMETIC and all(name in known for name in node.input)
        if not foldable:
            kept.append(NodeProto.FromString(node.SerializeToString()))
            continue
        results = _evaluated(node, model, known)
        for name, value in zip(node.output, results, strict=True):
            known[name] = value
            graph.initializer.append(numpy_helper.from_array(value, name))
    del graph.node[:]
    graph.node.extend(kept)


def _evaluated(
    node: NodeProto, model: ModelProto, known: Mapping[str, NDArray[np.generic]]
) -> list[NDArray[np.generic]]:
    given = {name: known[name] for name in node.input}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in given.items()
    ]
    outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output]
    alone = helper.make_model(
        helper.make_graph([node], "node", inputs, outputs), opset_imports=model.opset_import, ir_version=10
    )
    return [np.asarray(each) for each in ReferenceEvaluator(alone).run(None, given)]


def _repeated(node: NodeProto, index: int, counted: str, rank: int) -> list[NodeProto]:
    """Nodes that repeat the row which a node reads at `index` for each row of `counted`; the node reads those."""
    row = node.input[index]
    ones = [helper.make_node("Constant", [], [f"{row}/ones"], name=f"{row}/ones", value_ints=[1] * (rank - 1))]
    node.input[index] = f"{row}/rows"
    return [
        *(ones if rank > 1 else []),
        helper.make_node("Shape", [counted], [f"{row}/count"], name=f"{row}/count", start=0, end=1),
        helper.make_node(
            "Concat",
            [f"{row}/count", *(each.output[0] for each in ones if rank > 1)],
            [f"{row}/shape"],
            name=f"{row}/shape",
            axis=0,
        ),
        helper.make_node("Expand", [row, f"{row}/shape"], [f"{row}/rows"], name=f"{row}/rows"),
    ]


def _one_row(tensor: TensorProto, batch: int, rank: int) -> NDArray[np.generic] | None:
    """The row of which a constant holds one for each sample of the batch; None where it does not."""
    if len(tensor.dims) != rank or not tensor.dims or tensor.dims[0] != batch:
        return None
    values: NDArray[np.generic] = numpy_helper.to_array(tensor)
    return values[:1] if np.all(values == values[:1]) else None


def _replace(model: ModelProto, node: NodeProto, index: int, value: NDArray[np.generic]) -> None:
    """Give a node a constant of its own at one of its inputs."""
    name = f"{node.output[0]}/free{index}"
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    node.input[index] = name
    if node.op_type == "Reshape":
        kept = [each for each in node.attribute if each.name != "allowzero"]
        del node.attribute[:]
        node.attribute.extend(kept)
