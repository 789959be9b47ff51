"""A step network with 8-bit layers: pairs of QuantizeLinear and DequantizeLinear around them, as in NVIDIA's ModelOpt.

    int8   weights with a scale for each output channel, activations with one scale; symmetric, or with a zero point
    fp8    E4M3 (FLOAT8E4M3FN), symmetric, with the same scales

A runtime computes a layer whose inputs come out of such pairs in 8 bits; one that cannot computes the same rounded
numbers in the network's own type. The first and the last convolution stay as they are, and so does what has left the
loop, the time path with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from skipstep.errors import ExportError
from skipstep.export.graph_writer import OPSET, load_graph

Kind = Literal["int8", "fp8"]
# The lowest and the highest value that a tensor takes, or is clipped to.
Range = tuple[float, float]

_LARGEST: Final[Mapping[str, float]] = {"int8": 127.0, "fp8": 448.0}
_DTYPES: Final[Mapping[str, Any]] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
# The axis of a weight's output channels.
_CHANNELS: Final[Mapping[str, int]] = {"Conv": 0, "MatMul": -1, "Gemm": -1}
# The smallest scale: one that float16 holds, and that a value of nothing but zeros may have.
_LEAST: Final = 2.0**-20


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that may be in 8 bits: the `activations` that it reads, by the index of its input, and its `result`."""

    name: str
    activations: Mapping[int, str]
    result: str

    @property
    def values(self) -> tuple[str, ...]:
        return *self.activations.values(), self.result


@dataclass(frozen=True, slots=True)
class LayerRanges:
    """The ranges of a layer's activations, by the index of its input, and of its result."""

    inputs: Mapping[int, Range]
    result: Range


def find_layers(step: bytes) -> list[Layer]:
    """In order: convolutions but the first and the last, and matrix products."""
    graph = load_graph(step).graph
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in _CHANNELS]
    convolutions = [node.name for node in nodes if node.op_type == "Conv"]
    outer = {*convolutions[:1], *convolutions[-1:]}
    return [
        Layer(node.name, {i: each for i, each in enumerate(node.input[:2]) if each not in weights}, node.output[0])
        for node in nodes
        if node.name not in outer
    ]


def quantize(
    step: bytes,
    layers: Mapping[str, LayerRanges],
    kind: Kind,
    *,
    symmetric: bool = True,
    results: bool = False,
) -> bytes:
    """`step`, in float32 or half precision, with these of its layers in 8 bits.

    `symmetric`: int8 activations have no zero point, as TensorRT wants them. `results`: what a layer computes goes
    through a pair, too, for ONNX Runtime, which has no convolution in 8 bits with a result in float.
    Raises ExportError for a graph of an older opset, which has no such pairs.
    """
    model = load_graph(step)
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)
    if opset < OPSET:
        raise ExportError(
            got=f"a step network of opset {opset}",
            expected=f"opset {OPSET}, in which skipstep exports",
            remedy="export the network again with this version of skipstep",
        )
    _Pairs(model, kind, symmetric=symmetric or kind == "fp8").insert(layers, results=results)
    return bytes(model.SerializeToString())


class _Pairs:
    """The pairs of one graph: each value has one, which all of its readers share."""

    def __init__(self, model: ModelProto, kind: Kind, *, symmetric: bool) -> None:
        self._graph, self._kind, self._symmetric = model.graph, kind, symmetric
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        typed = onnx.shape_inference.infer_shapes(model).graph
        values = (*typed.value_info, *typed.input, *typed.output)
        self._types = {each.name: each.type.tensor_type.elem_type for each in values}
        self._restored: dict[str, str] = {}
        self._nodes: list[NodeProto] = []

    def insert(self, layers: Mapping[str, LayerRanges], *, results: bool) -> None:
        for node in self._graph.node:
            ranges = layers.get(node.name)
            for index, name in enumerate(node.input[:2] if ranges is not None else ()):
                assert ranges is not None
                if name in self._constants:
                    node.input[index] = self._weight(name, _output_axis(node))
                else:
                    node.input[index] = self._activation(name, name, ranges.inputs[index])
            self._nodes.append(node)
            if ranges is not None and results:
                made, node.output[0] = node.output[0], f"{node.output[0]}/exact"
                self._activation(made, node.output[0], ranges.result, restored=made)
        self._rewrite()

    def _rewrite(self) -> None:
        read = {name for node in self._nodes for name in node.input}
        del self._graph.node[:], self._graph.value_info[:]
        self._graph.node.extend(self._nodes)
        del self._graph.initializer[:]
        self._graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in read)

    def _activation(self, name: str, source: str, span: Range, *, restored: str | None = None) -> str:
        if name not in self._restored:
            low, high = min(span[0], 0.0), max(span[1], 0.0)
            scale, zero = max(-low, high) / _LARGEST[self._kind], 0
            if not self._symmetric:
                scale = (high - low) / 255
                zero = round(-128 - low / max(scale, _LEAST))
            dtype = helper.tensor_dtype_to_np_dtype(self._types.get(name) or TensorProto.FLOAT)
            inputs = self._scale(name, np.array(max(scale, _LEAST), dtype), zero)
            low_name, made = f"{name}/{self._kind}", restored or f"{name}/restored"
            self._nodes += [
                helper.make_node("QuantizeLinear", [source, *inputs], [low_name], name=low_name),
                helper.make_node("DequantizeLinear", [low_name, *inputs], [made], name=f"{name}/restored"),
            ]
            self._restored[name] = made
        return self._restored[name]

    def _weight(self, name: str, axis: int) -> str:
        if name not in self._restored:
            tensor = self._constants[name]
            exact = numpy_helper.to_array(tensor).astype(np.float32)
            axis %= exact.ndim
            others = tuple(each for each in range(exact.ndim) if each != axis)
            scale = np.maximum(np.abs(exact).max(axis=others) / _LARGEST[self._kind], _LEAST)
            inputs = self._scale(name, scale.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type)), 0)
            stored = numpy_helper.to_array(self._constants[inputs[0]]).astype(np.float32)
            scaled = np.divide(exact, np.expand_dims(stored, others), dtype=np.float32)
            low, made = f"{name}/{self._kind}", f"{name}/restored"
            self._constants[low] = numpy_helper.from_array(_rounded(scaled, self._kind), low)
            self._nodes.append(helper.make_node("DequantizeLinear", [low, *inputs], [made], name=made, axis=axis))
            self._restored[name] = made
        return self._restored[name]

    def _scale(self, name: str, scale: NDArray[Any], zero: int) -> tuple[str, str]:
        """The constants of a pair: scale and zero point."""
        names = f"{name}/scale", f"{name}/zero"
        points = np.full(scale.shape, zero, _DTYPES[self._kind])
        for each, array in zip(names, (scale, points), strict=True):
            self._constants[each] = numpy_helper.from_array(array, each)
        return names


def _rounded(scaled: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    """To the nearest value of the type."""
    clipped = np.clip(scaled, -_LARGEST[kind], _LARGEST[kind])
    return (np.rint(clipped) if kind == "int8" else clipped).astype(_DTYPES[kind])


def _output_axis(node: NodeProto) -> int:
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if transposed else _CHANNELS[node.op_type]


def all_values(layers: Iterable[Layer]) -> list[str]:
    """The values whose ranges these layers need, each once."""
    return list(dict.fromkeys(name for layer in layers for name in layer.values))
