"""Reading somebody's .onnx file: whole, within its folder, of known operators, as one model that carries its weights.

size -> protobuf -> weights beside it, by plain names below its folder -> domains and opset -> OPSET
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import GraphProto, ModelProto, TensorProto, helper

from skipstep.errors import IntegrityError, ModelFormatError
from skipstep.export.graph_writer import OPSET, inner_graphs
from skipstep.storage.verified import check_relative_name, read_below, read_regular

# Of a protobuf message, and so of a graph with its weights.
MAX_BYTES = 2**31 - 1
_OLDEST_OPSET = 13
_STANDARD_DOMAINS = ("", "ai.onnx")
_AGAIN = "export the network again, with opset 17 or later and without a runtime's own optimizations"


def read_onnx_model(path: Path) -> ModelProto:
    """The model in a file, with its weights and as it was written; the path itself may be a link, weights may not.

    Raises ModelFormatError for what is no such model, IntegrityError for weights outside its folder.
    """
    try:
        data = read_regular(path, MAX_BYTES + 1, follow=True)
    except OSError as error:
        raise ModelFormatError(
            got=f"{path}, which cannot be read ({error.strerror})", expected="an .onnx file", remedy="check the path"
        ) from error
    if len(data) > MAX_BYTES:
        raise _too_large(path, len(data))
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # Protobuf has a class of its own for damage.
        raise _no_model(path, str(error)) from error
    if not model.graph.output or not model.graph.node or not model.opset_import:
        raise _no_model(path, "it has no graph with an output")
    _read_weights(model, path)
    _check_operators(model, path)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise _no_model(path, str(error).splitlines()[0]) from error
    return model


def modernised(model: ModelProto, path: Path) -> ModelProto:
    """The same network without functions of its own, at least at the opset that the parts are written in."""
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        if _opset(model) < OPSET:
            model = onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # The converter raises RuntimeError and its own; the inliner ValueError.
        raise _unsupported(path, f"opset {_opset(model)}, which onnx does not convert ({error!s:.200})") from error
    # In old files weights are listed as inputs, too: as if a caller might replace them.
    weights = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in weights]
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import, True))
    del model.metadata_props[:], model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def _opset(model: ModelProto) -> int:
    return max(int(each.version) for each in model.opset_import if each.domain in _STANDARD_DOMAINS)


def _check_operators(model: ModelProto, path: Path) -> None:
    versions = [each.version for each in model.opset_import if each.domain in _STANDARD_DOMAINS]
    newest = onnx.defs.onnx_opset_version()
    if not versions or not _OLDEST_OPSET <= max(versions) <= newest:
        raise _unsupported(path, f"opset {max(versions, default=0)}, where {_OLDEST_OPSET} to {newest} are read")
    own = {(each.domain, each.name) for each in model.functions}
    bodies = (node for function in model.functions for node in function.node)
    for node in (*_nodes(model.graph), *bodies):
        if node.domain not in _STANDARD_DOMAINS and (node.domain, node.op_type) not in own:
            raise _unsupported(path, f"the operator {node.domain}::{node.op_type}")


def _unsupported(path: Path, what: str) -> ModelFormatError:
    return ModelFormatError(got=f"{path} with {what}", expected="standard operators of ai.onnx", remedy=_AGAIN)


def _no_model(path: Path, why: str) -> ModelFormatError:
    return ModelFormatError(
        got=f"{path}, which holds no valid ONNX model ({why:.300})",
        expected="an .onnx file of a network",
        remedy="complete or repeat the download, or export the network again",
    )


def _too_large(path: Path, size: int) -> ModelFormatError:
    return ModelFormatError(
        got=f"{path} with at least {size / 2**30:.1f} GiB, weights included",
        expected="less than 2 GiB, the limit of one graph with its weights",
        remedy="export the network with its weights in float16",
    )


def _read_weights(model: ModelProto, path: Path) -> None:
    """Move the weights that lie in files beside the model into it."""
    files: dict[str, bytes] = {}
    root = path.parent
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        where = {each.key: each.value for each in tensor.external_data}
        name = where.get("location", "")
        if name not in files:
            left = MAX_BYTES - sum(map(len, files.values()))
            files[name] = _read_beside(root, name, left + 1)
            if len(files[name]) > left:
                raise _too_large(path, MAX_BYTES)
        data = files[name]
        needed = _num_bytes(tensor, path)
        try:
            offset = int(where.get("offset", "0"))
            length = int(where.get("length", str(needed)))
        except ValueError as error:
            raise _misplaced(path, tensor, "no numbers", name) from error
        if offset < 0 or length != needed or offset + length > len(data):
            raise _misplaced(path, tensor, f"{length} bytes at {offset} of {len(data)}, for {needed}", name)
        tensor.raw_data = data[offset : offset + length]
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def _read_beside(root: Path, name: str, limit: int) -> bytes:
    check_relative_name(name)
    try:
        return read_below(root, name, limit=limit)
    except IntegrityError as error:
        raise IntegrityError(
            got=error.got,
            expected="the weights as a regular file in the folder of the .onnx file",
            remedy="complete the download; if they are links that you trust, copy the folder with `cp -rL`",
        ) from error


def _num_bytes(tensor: TensorProto, path: Path) -> int:
    if any(dim < 0 for dim in tensor.dims):
        raise _no_model(path, f"the weight {tensor.name!r:.80} of shape {list(tensor.dims)}")
    count = 1
    for dim in tensor.dims:
        count *= dim
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    try:
        return count * int(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
    except (KeyError, TypeError) as error:
        raise _no_model(path, f"the weight {tensor.name!r:.80} of type {tensor.data_type}") from error


def _misplaced(path: Path, tensor: TensorProto, what: str, name: str) -> IntegrityError:
    return IntegrityError(
        got=f"the weight {tensor.name!r:.80} of {path} as {what} in {name!r:.80}",
        expected="the bytes of a tensor of its shape",
        remedy="complete or repeat the download of both files",
    )


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: weights, and those in attributes of nodes."""
    for graph in _graphs(model.graph):
        yield from graph.initializer
    for node in (*_nodes(model.graph), *(node for function in model.functions for node in function.node)):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from _graphs(inner)


def _nodes(graph: GraphProto) -> Iterator[onnx.NodeProto]:
    for each in _graphs(graph):
        yield from each.node
