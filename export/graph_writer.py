"""Writing ONNX graphs: nodes and constants by the name of their result, renamed copies, and serialised models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, load_from_string, numpy_helper

from skipstep.errors import ExportError, shown
from skipstep.networks.large_graph import LargeGraph, Weights

# In which networks are exported, and to which older files are brought.
OPSET: Final = 20
Dims = list[int | str | None]
_MAX_BYTES: Final = 2**31 - 1


class GraphWriter:
    """Nodes and constants of one graph. Generated names start with `prefix`; two writers of a graph need two."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._count = 0
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def name(self) -> str:
        self._count += 1
        return f"{self._prefix}/{self._count}"

    def add(self, op_type: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        output = to or self.name()
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def cast(self, value: str, elem_type: int) -> str:
        output = self.name()
        self.nodes.append(helper.make_node("Cast", [value], [output], name=output, to=elem_type))
        return output

    def split(self, value: str, num_outputs: int, *, axis: int) -> list[str]:
        outputs = [self.name() for _ in range(num_outputs)]
        self.nodes.append(
            helper.make_node("Split", [value], outputs, name=outputs[0], axis=axis, num_outputs=num_outputs)
        )
        return outputs

    def constant(self, value: Any, dtype: Any = np.int64, *, to: str | None = None) -> str:
        name = to or f"{self._prefix}/constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name


def floats(name: str, shape: Sequence[int | str | None]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def serialised(model: ModelProto, weights: Weights | None = None) -> bytes:
    """The bytes of a model, with those of the `weights` beside it that it refers to. Raises ExportError for more than
    protobuf can hold."""
    size = model.ByteSize()
    if size > _MAX_BYTES:
        raise ExportError(
            got=f"a graph of {size / 2**30:.1f} GiB",
            expected="at most 2 GiB, the limit of one protobuf message",
            remedy="convert the weights to float16, or use backend='torch'",
        )
    data = bytes(model.SerializeToString())
    outside = [each.name for each in model.graph.initializer if each.data_location == TensorProto.EXTERNAL]
    return LargeGraph(data, {name: weights[name] for name in outside}) if weights and outside else data


def load_graph(data: bytes) -> ModelProto:
    """The ONNX model in `data`. Raises ExportError for what is none."""
    try:
        model = load_from_string(data)
    except Exception as error:  # Protobuf has a class of its own for damage; other types raise others.
        raise ExportError(
            got=f"{shown(data)[:80]}, which holds no ONNX model ({error})",
            expected="the bytes of one",
            remedy="pass bundle.read_graph(name), or what Path.read_bytes() gives for an .onnx file",
        ) from error
    if not model.graph.output:
        raise ExportError(
            got="a model without outputs", expected="a network", remedy="pass the whole file's bytes, uncompressed"
        )
    return model


def inner_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies and branches that a node holds in its attributes; not those inside them."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def rename_graph(graph: GraphProto, rename: Callable[[str], str]) -> None:
    """Change every name in `graph`, also in the subgraphs of its nodes; drop the exporter's notes on source code."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = rename(value.name)
    for node in graph.node:
        _rename_node(node, rename)


def renamed_nodes(nodes: Iterable[NodeProto], rename: Callable[[str], str]) -> list[NodeProto]:
    """Copies of `nodes` with every name changed, without the exporter's notes on source code."""
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        _rename_node(copy, rename)
        copies.append(copy)
    return copies


def renamed_value(value: ValueInfoProto, rename: Callable[[str], str]) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = rename(value.name)
    return copy


def _rename_node(node: NodeProto, rename: Callable[[str], str]) -> None:
    node.name = rename(node.name)
    # Where in the network's source a node comes from, at ten times the size of the node.
    node.ClearField("doc_string")
    node.ClearField("metadata_props")
    for names in (node.input, node.output):
        names[:] = [name and rename(name) for name in names]  # An empty name is an input or output left out.
    for graph in inner_graphs(node):
        rename_graph(graph, rename)
