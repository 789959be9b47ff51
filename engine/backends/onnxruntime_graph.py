"""A step graph for sessions of ONNX Runtime on the CPU: self-attention is com.microsoft's operator, which computes what
exporters write as three products, three sums and twenty further nodes. The stored graph keeps to the standard.

Where attention is written in another way, or what is needed of its shapes does not follow, it is left alone.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.networks.large_graph import field, fields, read_varint, varint

_N: Final = 1_000_003  # A prime that stands for the number of samples.
_ELEMENTS: Mapping[int, Any] = {1: np.float32, 7: np.int64}
_LARGEST = 256  # Bytes of an encoded constant that is read.
_DOMAIN: Final = b"com.microsoft"

Encoded = bytes | memoryview


class _OtherwiseError(Exception):
    """The graph is written in another way than the one that is looked for."""


@dataclass(slots=True)
class _Node:
    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: Mapping[str, list[int]]
    encoded: Encoded


def with_attention(model: bytes) -> bytes:
    """The model with attention as single nodes. Raises ValueError for bytes that are no ONNX model."""
    parts = list(fields(memoryview(model)))
    try:
        (graph,) = (_Graph(content) for number, _, content in parts if number == 7)
    except _OtherwiseError:
        return model
    if not graph.fuse():
        return model
    pieces = graph.encoded()
    # The last field is the graph, which may be large: its pieces are copied once.
    header = field(8, field(1, _DOMAIN) + b"\x10\x01") + b"\x3a" + varint(sum(map(len, pieces)))
    return b"".join((*(whole for number, whole, _ in parts if number != 7), header, *pieces))


class _Graph:
    """The nodes of a graph, its small constants, and the shapes that follow from them."""

    def __init__(self, encoded: Encoded) -> None:
        self._nodes: list[_Node] = []
        self._rest: list[Encoded] = []
        self._outputs: set[str] = set()
        inputs: set[str] = set()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._constants: dict[str, NDArray[Any]] = {}
        for number, whole, content in fields(memoryview(encoded)):
            if number == 1:
                self._nodes.append(_node(content))
                continue
            self._rest.append(whole)
            if number == 5:
                self._read_tensor(content)
            elif number in (11, 12):
                (inputs if number == 11 else self._outputs).add(_text(_by_number(content)[1]))
        self._weights = set(self._shapes)
        self._makers = {name: node for node in self._nodes for name in node.outputs}
        self._users: dict[str, list[_Node]] = defaultdict(list)
        for node in self._nodes:
            for name in node.inputs:
                self._users[name].append(node)
            try:
                self._follow(node, inputs)
            except (KeyError, IndexError, ValueError):
                continue  # Its shape is not known.

    def _read_tensor(self, content: Encoded) -> None:
        found = _by_number(content)
        name, shape = _text(found[8]), tuple(_integers(found[1]))
        self._shapes[name] = shape
        element = _ELEMENTS.get(found[2][0])
        if element is not None and len(content) <= _LARGEST and (found[9] or found[7]):
            numbers = np.frombuffer(found[9][0], element) if found[9] else np.array(_integers(found[7]), np.int64)
            self._constants[name] = numbers.reshape(shape)

    def _follow(self, node: _Node, inputs: set[str]) -> None:
        """Note what is known of the node's output. Raises KeyError, IndexError or ValueError for nothing."""
        name, given = node.outputs[0], [self._shapes.get(each) for each in node.inputs]
        numbers = [self._constants.get(each) for each in node.inputs]
        if node.op == "Shape" and node.inputs[0] in inputs and node.attributes.get("end") == [1]:
            self._constants[name] = np.array([_N])
        elif node.op == "Concat" and all(each is not None for each in numbers):
            self._constants[name] = np.concatenate([each for each in numbers if each is not None])
        elif node.op == "Slice" and len(numbers) == 3 and all(each is not None for each in numbers):
            vector, begin, end = (each for each in numbers if each is not None)
            self._constants[name] = vector[int(begin[0]) : int(end[0])]
        elif node.op == "Reshape":
            self._shapes[name] = _reshaped(given[0], self._constants[node.inputs[1]].tolist())
        elif all(each is not None for each in given):
            self._shapes[name] = _result(node, [each for each in given if each is not None])
            if node.op == "Cast" and node.inputs[0] in self._weights:
                self._weights.add(name)

    def fuse(self) -> bool:
        """Replace what is attention; whether there is any."""
        found = False
        for node in [each for each in self._nodes if each.op == "Softmax"]:
            try:
                self._fuse(node)
            except (_OtherwiseError, KeyError, ValueError):
                continue
            found = True
        return found

    def _fuse(self, softmax: _Node) -> None:
        """Raises _OtherwiseError, KeyError or ValueError where it is not all there."""
        scores = self._made(softmax.inputs[0], "MatMul")
        (queries, first), (turned, second) = map(self._scaled, scores.inputs)
        swapped = self._made(self._made(turned, "Reshape").inputs[0], "Transpose", [0, 2, 1])
        folded = self._made(swapped.inputs[0], "Reshape")
        keys = folded.inputs[0]
        weighted = self._user(softmax.outputs[0], "MatMul")
        joined = self._user(weighted.outputs[0], "Transpose", [0, 2, 1, 3])
        result = self._user(joined.outputs[0], "Reshape")
        samples, heads, length, size = self._shapes[keys]
        shapes = {
            queries: (samples, heads, length, size),
            folded.outputs[0]: (samples * heads, length, size),
            turned: (samples, heads, size, length),
            weighted.inputs[1]: (samples, heads, length, size),
        }
        rows, target = (samples, length, heads * size), self._constants[result.inputs[1]].tolist()
        fits = all(self._shapes[each] == shape for each, shape in shapes.items())
        last = softmax.attributes.get("axis", [-1])[0] in (-1, 3) and weighted.inputs[0] == softmax.outputs[0]
        if not (fits and last) or _reshaped((samples, length, heads, size), target) != rows:
            raise _OtherwiseError
        projections = [self._projection(each, rows) for each in (queries, keys, weighted.inputs[1])]
        given, weights, biases = zip(*projections, strict=True)
        if len(set(given)) != 1:
            raise _OtherwiseError
        name = result.outputs[0]
        result.inputs = [given[0], f"{name}/weights", f"{name}/biases"]
        self._add_before(result, "Concat", weights, result.inputs[1], 1)
        self._add_before(result, "Concat", biases, result.inputs[2], 0)
        attributes = {"num_heads": heads, "scale": first * second}
        result.encoded = _encoded("Attention", result.inputs, name, attributes, _DOMAIN)

    def _projection(self, name: str, rows: tuple[int, ...]) -> tuple[str, str, str]:
        """What values [samples, heads, length, size] are a linear function of, with its weights and its bias.

        Without a bias ONNX Runtime's operator reads memory that is not its own.
        """
        split = self._made(self._made(name, "Transpose", [0, 2, 1, 3]).inputs[0], "Reshape").inputs[0]
        added = self._made(split, "Add")
        product, bias = added.inputs if added.inputs[1] in self._weights else added.inputs[::-1]
        given, weights = self._made(product, "MatMul").inputs
        shapes = self._shapes[split], self._shapes[bias]
        if not self._weights.issuperset((weights, bias)) or shapes != (rows, self._shapes[weights][1:]):
            raise _OtherwiseError
        return given, weights, bias

    def _scaled(self, name: str) -> tuple[str, float]:
        """A value and the number that it was multiplied by."""
        node = self._makers[name]
        factor = self._constants.get(node.inputs[1]) if node.op == "Mul" else None
        return (name, 1.0) if factor is None or factor.size != 1 else (node.inputs[0], float(factor.reshape(())))

    def _made(self, name: str, op: str, order: list[int] | None = None) -> _Node:
        return _checked(self._makers[name], op, order)

    def _user(self, name: str, op: str, order: list[int] | None = None) -> _Node:
        (user,) = self._users[name]
        return _checked(user, op, order)

    def _add_before(self, node: _Node, op: str, inputs: Sequence[str], output: str, axis: int) -> None:
        made = _Node(op, list(inputs), [output], {}, _encoded(op, inputs, output, {"axis": axis}))
        self._nodes.insert(self._nodes.index(node), made)

    def encoded(self) -> list[Encoded]:
        """The graph's fields, without the nodes that no output needs any more."""
        needed, kept = set(self._outputs), []
        for node in reversed(self._nodes):
            if not needed.isdisjoint(node.outputs):
                kept.append(field(1, bytes(node.encoded)))
                needed.update(node.inputs)
        return [*reversed(kept), *self._rest]


def _reshaped(given: tuple[int, ...] | None, target: list[int]) -> tuple[int, ...]:
    """Raises ValueError where that takes the shape before and it is not known."""
    if given is None and not min(target) > 0:
        raise ValueError(target)
    sizes = [given[place] if given and size == 0 else size for place, size in enumerate(target)]
    rest = math.prod(given or ()) // abs(math.prod(sizes))
    return tuple(rest if size == -1 else size for size in sizes)


def _result(node: _Node, given: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what some operators make. Raises ValueError for others."""
    first = given[0]
    if node.op in ("Cast", "Softmax", "InstanceNormalization"):
        return first
    if node.op in ("Add", "Mul"):
        return np.broadcast_shapes(*given)
    if node.op == "Transpose":
        return tuple(first[each] for each in node.attributes["perm"])
    if node.op == "MatMul" and len(first) == 3 and len(given[1]) == 2:
        return (*first[:2], given[1][1])
    raise ValueError(node.op)


def _checked(node: _Node, op: str, order: list[int] | None) -> _Node:
    if node.op != op or (order is not None and node.attributes["perm"] != order):
        raise _OtherwiseError
    return node


def _by_number(content: Encoded) -> dict[int, list[Any]]:
    """Fields by number: contents of those with bytes, and numbers of those with integers."""
    found: dict[int, list[Any]] = defaultdict(list)
    for number, whole, held in fields(memoryview(content)):
        if whole[0] & 7 == 2:
            found[number].append(held)
        elif whole[0] & 7 == 0:
            found[number] += _integers([whole[read_varint(whole, 0)[1] :]])
    return found


def _integers(found: Sequence[Any]) -> list[int]:
    """Of a repeated field: numbers, or several packed into bytes."""
    numbers = []
    for each in found:
        end = 0
        while not isinstance(each, int) and end < len(each):
            value, end = read_varint(each, end)
            numbers.append(value - (value >> 63 << 64))
        if isinstance(each, int):
            numbers.append(each)
    return numbers


def _text(found: Sequence[Encoded]) -> str:
    return bytes(found[0]).decode() if found else ""


def _node(content: Encoded) -> _Node:
    """Raises _OtherwiseError for a node with graphs inside, which read values that it does not name."""
    found = _by_number(content)
    attributes = {}
    for each in map(_by_number, found[5]):
        if each[6] or each[11]:
            raise _OtherwiseError
        attributes[_text(each[1])] = _integers([*each[3], *each[8]])
    inputs, outputs = ([bytes(name).decode() for name in found[number]] for number in (1, 2))
    return _Node("" if _text(found[7]) else _text(found[4]), inputs, outputs, attributes, content)


def _encoded(
    op: str, inputs: Sequence[str], output: str, attributes: Mapping[str, float], domain: bytes = b""
) -> bytes:
    made = [
        *(field(1, each.encode()) for each in inputs),
        field(2, output.encode()),
        field(3, f"{output}/{op}".encode()),
    ]
    made += [field(4, op.encode()), field(7, domain)]
    for name, value in attributes.items():
        # An integer in field 3 or a float in field 2, and in field 20 which it is.
        held = b"\x18" + varint(value) + b"\xa0\x01\x02" if isinstance(value, int) else _FLOAT.pack(21, value, 416, 1)
        made.append(field(5, field(1, name.encode()) + held))
    return b"".join(made)


_FLOAT = struct.Struct("<BfHB")
