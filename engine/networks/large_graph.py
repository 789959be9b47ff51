"""Graphs whose weights are too many for one file: an ONNX model with external data, and its weights as arrays.

    LargeGraph = the model's bytes, each large weight an initializer "in the file 'weights'"  +  arrays by name

A runtime is given the arrays by name and opens no file. On disk the arrays are safetensors files beside the graph
(skipstep.export.bundle_files); a reader takes all that points to files out of the graph and attaches what it verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Weights = Mapping[str, NDArray[Any]]

# The name of a file that is never opened, and of the entry that holds such names.
NO_FILE: Final = "weights"
LOCATION: Final = b"location"
# TensorProto.DataType
_ELEMENTS: Mapping[str, int] = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11,
    "bfloat16": 16,
}  # fmt: skip
# The fields that are read and written here: ModelProto.graph, GraphProto.initializer and GraphProto.input.
_GRAPH, _INITIALIZER, _INPUT = 7, 5, 11
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class LargeGraph(bytes):
    """A serialised model that is complete with its `weights`. As bytes it is the model without them."""

    weights: Weights

    def __new__(cls, model: bytes, weights: Weights) -> LargeGraph:
        made = super().__new__(cls, model)
        made.weights = weights
        return made


def weights_of(graph: bytes) -> Weights:
    """The weights beside a graph; none where it is complete in itself."""
    return graph.weights if isinstance(graph, LargeGraph) else {}


def graph_size(graph: bytes) -> int:
    """Bytes, with weights."""
    return len(graph) + sum(array.nbytes for array in weights_of(graph).values())


def graph_sha256(graph: bytes) -> Any:
    """The hash object over a graph and its weights."""
    digest = hashlib.sha256(graph)
    for name, array in sorted(weights_of(graph).items()):
        digest.update(f"{name} {array.dtype.name} {array.shape} ".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest


def with_weights(model: bytes, weights: Weights) -> LargeGraph:
    """A model that lacks initializers, with these as its own. Raises ValueError for an array that ONNX cannot hold.

    Two encoded protobuf messages, one after the other, are one message with the repeated fields of both.
    """
    tensors = b"".join(_field(_INITIALIZER, _tensor(name, array)) for name, array in weights.items())
    return LargeGraph(model + _field(_GRAPH, tensors), weights)


def weights_as_inputs(graph: bytes) -> bytes:
    """The model with an input, of its type and shape, in the place of each weight beside it."""
    weights = weights_of(graph)
    inputs = (_field(_INPUT, _field(1, name.encode()) + _input_type(array)) for name, array in weights.items())
    return without_stored_weights(graph) + _field(_GRAPH, b"".join(inputs)) if weights else graph


def without_stored_weights(model: bytes) -> bytes:
    """The model without the initializers that mention a file. Raises ValueError for what is no protobuf message.

    Whatever a hostile model makes of the format: where the result has no LOCATION in it, it leads to no file.
    """
    kept = []
    for number, whole, content in _fields(model):
        if number == _GRAPH:
            fields = _fields(content)
            inner = [each for field, each, held in fields if field != _INITIALIZER or LOCATION not in held]
            whole = _field(_GRAPH, b"".join(inner))
        kept.append(whole)
    return b"".join(kept)


def _tensor(name: str, array: NDArray[Any]) -> bytes:
    if array.dtype.name not in _ELEMENTS:
        raise ValueError(f"{name!r} is of dtype {array.dtype}")
    location = _field(13, _field(1, LOCATION) + _field(2, NO_FILE.encode()))
    dims = b"".join(b"\x08" + _varint(size) for size in array.shape)
    return dims + b"\x10" + _element(array) + _field(8, name.encode()) + location + b"\x70\x01"


def _input_type(array: NDArray[Any]) -> bytes:
    """ValueInfoProto.type of a tensor."""
    dims = b"".join(_field(1, b"\x08" + _varint(size)) for size in array.shape)
    return _field(2, _field(1, b"\x08" + _element(array) + _field(2, dims)))


def _element(array: NDArray[Any]) -> bytes:
    return _varint(_ELEMENTS[array.dtype.name])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Number, whole field and content of each field of a message; only a field of bytes has content."""
    end = 0
    while end < len(message):
        begin = end
        tag, end = _read_varint(message, end)
        kind, start = tag & 7, end
        if kind == _VARINT:
            _, end = _read_varint(message, end)
        elif kind == _BYTES:
            size, start = _read_varint(message, end)
            end = start + size
        elif kind in (_FIXED32, _FIXED64):
            end += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of wire type {kind}")
        if end > len(message):
            raise ValueError("a field that ends beyond its message")
        yield tag >> 3, message[begin:end], message[start:end] if kind == _BYTES else b""


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number without an end")
