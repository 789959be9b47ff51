"""Which graphs TensorRT may read: whatever could crash it, or change a network silently, is refused here.

Refused are bytes that are no valid graph, tensors in files, dtypes that the library would change, and shapes
without bounds. Nothing here needs TensorRT.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from skipstep.errors import ExportError, InputError
from skipstep.networks.graphs import BATCH as BATCH
from skipstep.networks.large_graph import weights_of

# What a strongly typed network holds. The parser would turn float64 into float32 without a word.
_DTYPES = (
    "FLOAT",
    "FLOAT16",
    "BFLOAT16",
    "FLOAT8E4M3FN",
    "FLOAT4E2M1",
    "INT64",
    "INT32",
    "INT8",
    "UINT8",
    "INT4",
    "BOOL",
)


def builder_graph(step: bytes) -> bytes:
    """A step network as the library reads it, but for its batch size: with norms written out."""
    norms, storage = map(importlib.import_module, ("skipstep.export.norms", "skipstep.export.weight_storage"))
    model = checked_graph(storage.expand_weights(step))
    norms.write_out_norms(model)
    return bytes(model.SerializeToString())


def checked_graph(onnx_model: bytes) -> Any:
    """The graph as a protobuf message: complete in itself, valid, and of dtypes that TensorRT does not change."""
    onnx, large = map(importlib.import_module, ("onnx", "skipstep.export.large_model"))
    try:
        model = onnx.load_from_string(onnx_model)
    except Exception as error:  # protobuf's DecodeError, whose module has no stable name.
        raise _unusable(
            f"{len(onnx_model)} bytes that are no ONNX model: {error}", "export the network again"
        ) from error
    # Unknown fields would be read by the library's parser alone.
    model.DiscardUnknownFields()
    allowed = {onnx.TensorProto.DataType.Value(name) for name in _DTYPES}
    for owner, message in messages(model):
        dtype = None
        if isinstance(message, onnx.TensorProto):
            # The library would follow the path anywhere, links included.
            outside = message.data_location == onnx.TensorProto.EXTERNAL or message.external_data
            if outside and message.name not in weights_of(onnx_model):
                raise _unusable(f"tensor {owner!r} stored in a file beside the model", "save the weights in the model")
            dtype = message.data_type
        elif isinstance(message, onnx.TypeProto.Tensor):
            dtype = message.elem_type
        elif isinstance(message, onnx.AttributeProto) and message.name in ("to", "dtype"):
            dtype = message.i
        if dtype is not None and dtype not in allowed:
            names = {value: name for name, value in onnx.TensorProto.DataType.items()}
            raise _unusable(
                f"{owner!r} of dtype {names.get(dtype, dtype)}", f"export with one of {', '.join(_DTYPES).lower()}"
            )
    try:
        with large.weights_as_inputs(model):
            onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise _unusable(f"an invalid graph: {str(error).splitlines()[0]}", "export the network again") from error
    return model


def _unusable(got: str, remedy: str) -> ExportError:
    return ExportError(
        got=got, expected="a valid ONNX graph, complete in itself, that TensorRT can hold", remedy=remedy
    )


def messages(message: Any, owner: str = "") -> Iterator[tuple[str, Any]]:
    """Every message inside another, each with the name of the node or tensor that it belongs to."""
    for descriptor, value in message.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            for each in (value,) if hasattr(value, "ListFields") else value:
                # An attribute's name is not useful; a node without a name is named by its first output.
                kind = type(each).__name__
                name = each.name or each.output[0] if kind == "NodeProto" and each.output else getattr(each, "name", "")
                inner = owner if kind == "AttributeProto" or not name else name
                yield inner, each
                yield from messages(each, inner)


def batch_profiles(model: Any, batch_sizes: Sequence[int]) -> tuple[int, ...] | None:
    """The sizes that an open batch dimension may have, in order; a single one is written into the graph."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in stored]
    leading = set()
    for each in inputs:
        kind = each.type.tensor_type
        if not kind.HasField("shape") or any(not d.dim_value and d.dim_param != BATCH for d in kind.shape.dim):
            raise _unusable(
                f"input {each.name!r} with a dimension that is neither a number nor {BATCH!r}",
                f"export with fixed shapes, or with one open dimension named {BATCH!r}",
            )
        leading |= {d.dim_param or d.dim_value for d in kind.shape.dim[:1]}
        if any(d.dim_param for d in kind.shape.dim):
            leading.add(BATCH)
    if BATCH not in leading:
        if set(batch_sizes) - leading:
            raise InputError(
                got=f"batch_sizes={tuple(batch_sizes)} for a graph fixed at {sorted(leading)}",
                expected="its own batch size, or none",
                remedy=f"leave batch_sizes out, or export with an open dimension named {BATCH!r}",
            )
        return None
    if not batch_sizes:
        raise InputError(
            got="no batch sizes for a graph with an open batch", expected="one or more", remedy="pass such as (1, 8)"
        )
    if len(set(batch_sizes)) > 1:
        return tuple(sorted(set(batch_sizes)))
    for each in (*inputs, *model.graph.output, *model.graph.value_info):
        for dimension in each.type.tensor_type.shape.dim:
            if dimension.dim_param == BATCH:
                dimension.dim_value = batch_sizes[0]
    return None
