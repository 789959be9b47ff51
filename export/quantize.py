"""A step network with 8-bit layers: pairs of QuantizeLinear and DequantizeLinear around them, as in NVIDIA's ModelOpt.

    int8   weights with a scale for each output channel, activations with one scale; symmetric, or with a zero point
    fp8    E4M3 (FLOAT8E4M3FN), symmetric, with the same scales

int8 without zero points loses half of its steps on a range that is positive for the most part. So a convolution reads
what is above or below the range's centre, and what it computes of the centre alone, a constant, is added to its result.

A runtime computes a layer whose inputs come out of such pairs in 8 bits; one that cannot computes the same rounded
numbers in the network's own type. The first and the last convolution stay as they are, and so does what has left the
loop, the time path with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from skipstep.backends.onnxruntime import make_session, run_session
from skipstep.export.graph_cost import at_batch_one, shapes_and_sizes
from skipstep.export.graph_writer import load_graph
from skipstep.networks.graphs import Values

Kind = Literal["int8", "fp8"]
# The lowest and the highest value that a tensor takes, or is clipped to.
Range = tuple[float, float]
# Of a layer: what its activations have, by the index of the input, and at RESULT what its result has.
Ranges = Mapping[int, Range]

RESULT: Final = -1
_LARGEST: Final[Mapping[str, float]] = {"int8": 127.0, "fp8": 448.0}
_DTYPES: Final[Mapping[str, Any]] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
# The axis of a weight's output channels.
_CHANNELS: Final[Mapping[str, int]] = {"Conv": 0, "MatMul": -1, "Gemm": -1}
# The smallest scale: one that float16 holds, and that a value of nothing but zeros may have.
_LEAST: Final = 2.0**-20
# The share of an evaluation's values that is cut off at either end: what is cut is what single pixels are off by.
_TAIL: Final = 1e-5
# How much wider than what was measured a range is: fp8 rounds to parts of the value, and loses nothing by it.
_ROOM: Final[Mapping[str, float]] = {"int8": 1.0, "fp8": 2.0}


def find_layers(step: bytes) -> dict[str, dict[int, str]]:
    """The values of each layer that may be in 8 bits, by its node's name, in order: of convolutions but the first and
    the last, and of matrix products."""
    graph = load_graph(step).graph
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in _CHANNELS]
    convolutions = [node.name for node in nodes if node.op_type == "Conv"]
    return {
        node.name: {i: name for i, name in enumerate(node.input[:2]) if name not in weights} | {RESULT: node.output[0]}
        for node in nodes
        if node.name not in (*convolutions[:1], *convolutions[-1:])
    }


def measure_ranges(
    step: bytes, layers: Mapping[str, Mapping[int, str]], inputs: Sequence[Values]
) -> dict[str, dict[int, Range]]:
    """By layer, over all of these inputs of the float32 step network: of each evaluation the percentiles 0.001 and
    99.999, of all evaluations the widest. Raises ExportError."""
    names = list(dict.fromkeys(name for values in layers.values() for name in values.values()))
    model = load_graph(step)
    known = {each.name for each in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in known
    )
    session = make_session(bytes(model.SerializeToString()))
    computed = [name for name in names if name not in {each.name for each in model.graph.input}]
    found: list[list[Range]] = []
    for given in inputs:
        values = {**given, **run_session(session, computed, given)}
        found.append([_percentiles(values[name]) for name in names])
    spans = {
        name: (min(s[0] for s in each), max(s[1] for s in each)) for name, *each in zip(names, *found, strict=True)
    }
    return {layer: {i: spans[name] for i, name in values.items()} for layer, values in layers.items()}


def _percentiles(values: NDArray[Any]) -> Range:
    cut = int(values.size * _TAIL)
    ordered = np.partition(values, (cut, values.size - 1 - cut), axis=None)
    return float(ordered[cut]), float(ordered[-1 - cut])


def quantize(
    step: bytes, layers: Mapping[str, Ranges], kind: Kind, *, symmetric: bool = True, results: bool = False
) -> bytes:
    """`step`, in float32 or half precision, with these of its layers in 8 bits.

    `symmetric`: int8 activations have no zero point, as TensorRT wants them. `results`: what a layer computes goes
    through a pair, too, for ONNX Runtime, which has no convolution in 8 bits with a result in float.
    """
    model = load_graph(step)
    _Pairs(model, kind, symmetric=symmetric or kind == "fp8").insert(layers, results=results)
    return bytes(model.SerializeToString())


class _Pairs:
    """The pairs of one graph: each value has one, which all of its readers share."""

    def __init__(self, model: ModelProto, kind: Kind, *, symmetric: bool) -> None:
        self._graph, self._kind, self._symmetric = model.graph, kind, symmetric
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        typed = at_batch_one(model).graph
        values = (*typed.value_info, *typed.input, *typed.output)
        self._types = {each.name: each.type.tensor_type.elem_type for each in values}
        self._shapes, _ = shapes_and_sizes(typed)
        self._restored: dict[str, str] = {}
        self._nodes: list[NodeProto] = []

    def insert(self, layers: Mapping[str, Ranges], *, results: bool) -> None:
        for node in self._graph.node:
            ranges = dict(layers.get(node.name, {}))
            of_centre = self._centre(node, ranges) if ranges and self._kind == "int8" and self._symmetric else None
            for index, name in enumerate(node.input[:2] if ranges else ()):
                if name in self._constants:
                    node.input[index] = self._weight(name, _output_axis(node))
                else:
                    node.input[index] = self._activation(name, name, ranges[index], f"{name}/restored")
            self._nodes.append(node)
            if of_centre is not None:
                made, node.output[0] = node.output[0], f"{node.output[0]}/of_centred"
                self._add(f"{made}/centre", of_centre)
                node = helper.make_node("Add", [node.output[0], f"{made}/centre"], [made], name=f"{made}/whole")
                self._nodes.append(node)
            if ranges and results:
                made, node.output[0] = node.output[0], f"{node.output[0]}/exact"
                self._activation(made, node.output[0], ranges[RESULT], made)
        read = {name for node in self._nodes for name in node.input}
        for held, kept in (
            (self._graph.node, self._nodes),
            (self._graph.value_info, []),
            (self._graph.initializer, [tensor for name, tensor in self._constants.items() if name in read]),
        ):
            del held[:]
            held.extend(kept)

    def _centre(self, node: NodeProto, ranges: dict[int, Range]) -> NDArray[Any] | None:
        """Let a convolution read values around zero; what it computes of their centre, where that is a constant."""
        (name, weight), shape = node.input[:2], self._shapes.get(node.input[0], (0,))
        if node.op_type != "Conv" or weight not in self._constants or not all(shape):
            return None
        kernel = numpy_helper.to_array(self._constants[weight])
        low, high = ranges[0]
        centre = np.array((low + high) / 2, kernel.dtype)
        ranges[0] = low - float(centre), high - float(centre)
        centred = node.input[0] = f"{name}/centred"
        if centred not in self._types:
            self._types[centred] = self._constants[weight].data_type
            self._add(f"{centred}/centre", centre)
            self._nodes.append(helper.make_node("Sub", [name, f"{centred}/centre"], [centred], name=centred))
        alone = helper.make_node("Conv", ["x", "w"], ["y"])
        alone.attribute.extend(node.attribute)
        x, w, y = (helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in "xwy")
        model = helper.make_model(
            helper.make_graph([alone], "centre", [x, w], [y]),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
        given = {"x": np.full((1, *shape[1:]), centre, np.float32), "w": kernel.astype(np.float32)}
        return run_session(make_session(model.SerializeToString()), ["y"], given)["y"].astype(kernel.dtype)

    def _activation(self, name: str, source: str, span: Range, restored: str) -> str:
        if name not in self._restored:
            low, high = min(span[0], 0.0), max(span[1], 0.0)
            scale, zero = max(max(-low, high) * _ROOM[self._kind] / _LARGEST[self._kind], _LEAST), 0
            if not self._symmetric:
                scale = max((high - low) / 255, _LEAST)
                zero = round(-128 - low / scale)
            dtype = helper.tensor_dtype_to_np_dtype(self._types.get(name) or TensorProto.FLOAT)
            inputs, rounded = self._scale(name, np.array(scale, dtype), zero), f"{name}/{self._kind}"
            self._nodes.append(helper.make_node("QuantizeLinear", [source, *inputs], [rounded], name=rounded))
            self._restore(name, inputs, restored)
        return self._restored[name]

    def _weight(self, name: str, axis: int) -> str:
        if name not in self._restored:
            tensor = self._constants[name]
            exact = numpy_helper.to_array(tensor).astype(np.float32)
            axis %= exact.ndim
            others = tuple(each for each in range(exact.ndim) if each != axis)
            scale = np.maximum(np.abs(exact).max(axis=others) / _LARGEST[self._kind], _LEAST)
            stored = scale.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            scaled = np.divide(exact, np.expand_dims(stored, others), dtype=np.float32)
            self._add(f"{name}/{self._kind}", _rounded(scaled, self._kind))
            self._restore(name, self._scale(name, stored, 0), f"{name}/restored", axis=axis)
        return self._restored[name]

    def _restore(self, name: str, scale: Sequence[str], restored: str, **axis: Any) -> None:
        inputs = [f"{name}/{self._kind}", *scale]
        self._nodes.append(helper.make_node("DequantizeLinear", inputs, [restored], name=f"{name}/restored", **axis))
        self._restored[name] = restored

    def _scale(self, name: str, scale: NDArray[Any], zero: int) -> tuple[str, str]:
        """The constants of a pair: scale and zero point."""
        self._add(f"{name}/scale", scale)
        self._add(f"{name}/zero", np.full(scale.shape, zero, _DTYPES[self._kind]))
        return f"{name}/scale", f"{name}/zero"

    def _add(self, name: str, array: NDArray[Any]) -> None:
        self._constants[name] = numpy_helper.from_array(array, name)


def _rounded(scaled: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    """To the nearest value of the type."""
    clipped = np.clip(scaled, -_LARGEST[kind], _LARGEST[kind])
    return (np.rint(clipped) if kind == "int8" else clipped).astype(_DTYPES[kind])


def _output_axis(node: NodeProto) -> int:
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if transposed else _CHANNELS[node.op_type]
