"""Half-precision networks: products in float16 or bfloat16, sensitive operations in float32.

    products     Conv, MatMul, …     in the network's dtype: they take the time, and sum in float32 inside
    moves        Reshape, Concat, …  in float32 where all that they move is, or where only float32 nodes read it
    arithmetic   Add, Sigmoid, …     in float32 where one of its inputs is, or where only float32 nodes read it
    all others   Softmax, norms, …   in float32: whatever sums over many elements, and whatever is unknown

So a normalisation is float32 from the addition before it to the activation after it, and none of what lies between is
rounded; TensorRT computes all of that in one kernel (skipstep.export.norms). Casts stand only where a value changes
dtype, one for all its readers. If, Loop and Scan carry float32.

We have our own pass because the maintained ones do less: those of ONNX Runtime and onnxconverter-common support only
float16 and clamp weights that do not fit; Model Optimizer's AutoCast needs older releases of onnx and onnxruntime-gpu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from skipstep.errors import ExportError, check_choice
from skipstep.export.graph_writer import load_graph, serialised
from skipstep.export.large_model import put_weights_in, take_weights_out, weights_as_inputs
from skipstep.networks.large_graph import weights_of

HalfPrecision = Literal["float16", "bfloat16"]

# fmt: off
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
_MOVES = frozenset({
    "Compress", "Concat", "ConstantOfShape", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements",
    "GatherND", "Identity", "MaxPool", "Pad", "Reshape", "Resize", "ScatterElements", "ScatterND", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
})
# What stays near the range of its inputs: no powers, no roots, no exponentials.
_ARITHMETIC = frozenset({
    "Abs", "Add", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu",
    "Max", "Min", "Mul", "Neg", "PRelu", "Relu", "Selu", "Sigmoid", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Where",
})
# fmt: on
# From here on the standard has bfloat16 convolutions.
_BFLOAT16_OPSET = 22


def lower_precision(step_graph: bytes, dtype: HalfPrecision) -> bytes:
    """The same network with weights, activations, float32 inputs and outputs in `dtype`; names and shapes stay.

    For bfloat16 the graph moves on to opset 22. Integers, booleans and values of other float types are left alone.
    Raises ExportError for a weight that `dtype` cannot hold, named with the node that reads it: one beyond the range of
    float16 (65504), or one of which nothing is left but zeros; and for a graph whose types cannot be inferred.
    """
    check_choice("dtype", dtype, get_args(HalfPrecision))
    low = ir.DataType.FLOAT16 if dtype == "float16" else ir.DataType.BFLOAT16
    try:
        model = _typed(step_graph, _BFLOAT16_OPSET if low == ir.DataType.BFLOAT16 else 0)
        put_weights_in(model, step_graph)
        _Lowering(model, low).run()
        weights = take_weights_out(model, large=bool(weights_of(step_graph)))
        lowered = ir.to_proto(model)
        with weights_as_inputs(lowered):
            onnx.checker.check_model(lowered, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            got=f"a graph whose types do not fit: {str(error).splitlines()[0]}",
            expected="a valid float32 network",
            remedy="export the network again, or keep it in float32",
        ) from error
    return serialised(lowered, weights)


def _typed(graph: bytes, least_opset: int) -> ir.Model:
    """The model with every value's type, its constants as initializers, and at least this opset."""
    model = ir.from_proto(load_graph(graph))
    if model.opset_imports[""] < least_opset:
        from onnxscript.version_converter import convert_version

        convert_version(model, least_opset)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    typed = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True, data_prop=True))
    for node in typed.graph.all_nodes():
        for value in node.outputs:
            if value.type is None and value.uses():
                raise ExportError(
                    got=f"a value of unknown type, {value.name!r} from {_described(node)}",
                    expected="types that ONNX's inference can find",
                    remedy="declare it in the graph's value_info, or keep the network in float32",
                )
    return typed


class _Lowering:
    """The lowering of one model, in place."""

    def __init__(self, model: ir.Model, low: ir.DataType) -> None:
        self._model = model
        self._graph = model.graph
        self._low = low
        self._nodes = list(model.graph.all_nodes())  # Each before its readers.
        self._types = {node: _type_parameters(node, model, low) for node in self._nodes}
        self._lowered: set[ir.Node] = set()
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        self._choose()
        # From here on a value's dtype is that of its producer's result; `floats` are the values that were float32.
        floats = {value for value in self._values() if value.dtype == ir.DataType.FLOAT}
        for value in floats:
            if self._is_made_low(value):
                value.dtype = self._low
        for node in self._nodes:
            if node.op_type == "ConstantOfShape" and node in self._lowered:
                fill = self._rounded(_fill(node), node.name, _described(node))
                node.attributes["value"] = ir.AttrTensor("value", fill)
            for index, read in enumerate(node.inputs):
                if read in floats:
                    node.replace_input_with(index, self._as(read, self._wanted(node, index), _described(node)))
        for graph in (self._graph, *self._graph.subgraphs()):
            wanted = self._low if graph is self._graph else ir.DataType.FLOAT
            for index, output in enumerate(graph.outputs):
                if output in floats and output.dtype != wanted:
                    self._replace_output(graph, index, wanted)
        self._drop_unread_constants()

    def _drop_unread_constants(self) -> None:
        """Where the float32 original has no reader left, its rounded copy takes its name."""
        copies = {value: cast for (value, _), cast in self._casts.items()}
        for graph in (self._graph, *self._graph.subgraphs()):
            for name, value in list(graph.initializers.items()):
                if not value.uses() and not value.is_graph_output():
                    del graph.initializers[name]
                    if value in copies:
                        copies[value].name = name

    def _choose(self) -> None:
        """Choose the nodes that compute in the low dtype: first forwards by their inputs, then backwards by readers."""
        accurate: set[ir.Value] = set()
        for node in self._nodes:
            if self._types[node] is None or not self._follows_low(node, accurate):
                accurate.update(value for value in node.outputs if value.dtype == ir.DataType.FLOAT)
            else:
                self._lowered.add(node)
        for node in reversed(self._nodes):
            if node.op_type not in _PRODUCTS and node in self._lowered and self._is_read_as_float(node):
                self._lowered.remove(node)

    def _follows_low(self, node: ir.Node, accurate: set[ir.Value]) -> bool:
        if node.op_type in _PRODUCTS:
            return True
        if node.op_type == "ConstantOfShape":
            return _fits(_fill(node), self._low)
        moved = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT]
        constants = [value.const_value for value in moved if value.is_initializer() and value.const_value is not None]
        if not all(_fits(constant, self._low) for constant in constants):
            return False
        computed = [value in accurate for value in moved if not value.is_initializer()]
        return not (any(computed) if node.op_type in _ARITHMETIC else computed and all(computed))

    def _is_read_as_float(self, node: ir.Node) -> bool:
        read = False
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT:
                continue
            if value.is_graph_output() and value.graph is self._graph:
                return False
            if any(self._wanted(use.node, use.idx) == self._low for use in value.uses()):
                return False
            read |= bool(value.uses()) or value.is_graph_output()
        return read

    def _wanted(self, node: ir.Node, index: int) -> ir.DataType:
        """The dtype in which a node reads a float32 input."""
        return self._low if node in self._lowered and index in (self._types[node] or ()) else ir.DataType.FLOAT

    def _is_made_low(self, value: ir.Value) -> bool:
        producer = value.producer()
        if producer is not None:
            return producer in self._lowered
        return value.is_graph_input() and value.graph is self._graph

    def _values(self) -> Iterator[ir.Value]:
        for graph in (self._graph, *self._graph.subgraphs()):
            yield from graph.inputs
            yield from graph.initializers.values()
        for node in self._nodes:
            yield from node.outputs

    def _as(self, value: ir.Value, dtype: ir.DataType, reader: str) -> ir.Value:
        """The value in `dtype`: itself, or its only cast. A constant is rounded here and now."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._casts:
            graph, producer = value.graph, value.producer()
            assert graph is not None
            name = f"{value.name}/{dtype.name.lower()}"
            if value.is_initializer():
                assert value.const_value is not None
                cast = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
                cast.const_value = self._rounded(value.const_value, value.name, reader)
                graph.register_initializer(cast)
            else:
                node = ir.node("Cast", [value], {"to": ir.AttrInt64("to", dtype)}, name=name)
                cast = node.outputs[0]
                cast.name, cast.type, cast.shape = name, ir.TensorType(dtype), value.shape
                if producer is None:
                    graph.insert_before(graph[0], node)
                else:
                    graph.insert_after(producer, node)
            self._casts[value, dtype] = cast
        return self._casts[value, dtype]

    def _replace_output(self, graph: ir.Graph, index: int, dtype: ir.DataType) -> None:
        """The cast of an output takes its name, which is the graph's interface."""
        value = graph.outputs[index]
        name, cast = value.name, self._as(value, dtype, "the graph's result")
        value.name, cast.name = cast.name, name
        graph.outputs[index] = cast

    def _rounded(self, tensor: ir.TensorProtocol, name: str | None, reader: str) -> ir.TensorProtocol:
        if not _fits(tensor, self._low):
            largest = np.abs(tensor.numpy()).max()
            raise ExportError(
                got=f"{name!r}, read by {reader}, with values up to {largest:.3g}",
                expected=f"values that {self._low.name.lower()} can hold",
                remedy="choose bfloat16, which has the range of float32, or keep the network in float32",
            )
        return ir.tensor(tensor.numpy().astype(self._low.numpy()), dtype=self._low)


def _described(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}"


def _fits(tensor: ir.TensorProtocol, dtype: ir.DataType) -> bool:
    """Whether a tensor survives: nothing becomes infinite, and something is left of what is not zero."""
    exact = tensor.numpy()
    with np.errstate(over="ignore"):
        rounded = exact.astype(dtype.numpy()).astype(np.float32)
    return bool((np.isfinite(rounded) == np.isfinite(exact)).all() and rounded.any() == exact.any())


def _fill(node: ir.Node) -> ir.TensorProtocol:
    """What a ConstantOfShape is full of; float32 zeros if it does not say."""
    value = node.attributes.get("value")
    return ir.tensor(np.zeros(1, np.float32)) if value is None else value.as_tensor()


def _type_parameters(node: ir.Node, model: ir.Model, low: ir.DataType) -> frozenset[int] | None:
    """Inputs of the type that the operator's result has, by its schema; None where that may not be the low dtype."""
    if node.op_type not in _PRODUCTS | _MOVES | _ARITHMETIC or node.domain not in ("", "ai.onnx"):
        return None
    schema = onnx.defs.get_schema(node.op_type, model.opset_imports[""], "")
    result = schema.outputs[0]
    if f"tensor({low.name.lower()})" not in result.types:
        return None
    formal = [schema.inputs[min(index, len(schema.inputs) - 1)] for index in range(len(node.inputs))]
    return frozenset(index for index, each in enumerate(formal) if each.type_str == result.type_str)
