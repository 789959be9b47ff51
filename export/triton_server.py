"""Model repositories for NVIDIA's Triton Inference Server: self-contained graphs that the unmodified server runs, and a
bundle behind its batcher for the server's Python backend (skipstep.serving.triton_model).

    NAME/config.pbtxt    the description of a graph for the server, made from the graph's inputs and outputs
    NAME/1/model.onnx    the graph, which the server's onnxruntime backend runs; or model.py

The server batches requests itself where the first dimension of every input and output is one open batch: then
max_batch_size counts samples, and the dims leave that dimension out. Any other graph takes the shapes that it states
(max_batch_size 0), with -1 for a dimension that is open. The schema is the server's model_config.proto.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # Its stubs are a package apart.
from onnx import TensorProto, ValueInfoProto

from skipstep.errors import ExportError, InputError, check_integer
from skipstep.networks.spec import NetworkSpec

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_TYPES: Mapping[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.BOOL: "TYPE_BOOL",
}
_OPEN = -1
_MODEL = b"from skipstep.serving.triton_model import TritonPythonModel  # noqa: F401\n"
Device = Literal["cpu", "gpu"]


def model_repository(
    graphs: Mapping[str, bytes], *, max_batch_size: int = 8, device: Device = "cpu", instances: int = 1
) -> dict[str, bytes]:
    """The files of the folder that `tritonserver --model-repository` takes, by relative name; `graphs` by model name.

    max_batch_size  how many samples the server may join into one run, where it can.
    device          what each of the `instances` of a model runs on: "cpu", or each "gpu" of the server.

    Raises InputError and ExportError.
    """
    files: dict[str, bytes] = {}
    for name, graph in graphs.items():
        config = model_config(name, graph, max_batch_size=max_batch_size, device=device, instances=instances)
        files[f"{name}/config.pbtxt"] = config.encode()
        files[f"{name}/1/model.onnx"] = graph
    # Models whose names differ in case alone would share a folder on some file systems.
    if not graphs or len({name.lower() for name in graphs}) < len(graphs):
        raise InputError(
            got=f"models named {', '.join(graphs)}" if graphs else "no graphs",
            expected="at least one, with names that differ in more than case",
            remedy="name them by model, steps and plan",
        )
    return files


def model_config(
    name: str, graph: bytes, *, max_batch_size: int = 8, device: Device = "cpu", instances: int = 1
) -> str:
    """The text of config.pbtxt for one graph. See model_repository."""
    _check(name, max_batch_size, device, instances)
    try:
        model = onnx.load_from_string(graph)
    except DecodeError as error:
        raise InputError(
            got=f"{len(graph)} bytes that are no ONNX model, for {name}",
            expected="a serialised graph",
            remedy="pass what build_sampler returns",
        ) from error
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [_Tensor.of(each) for each in model.graph.input if each.name not in weights]
    outputs = [_Tensor.of(each) for each in model.graph.output]
    first_dimensions = {each.batch for each in (*inputs, *outputs)}
    batched = len(first_dimensions) == 1 and "" not in first_dimensions
    lines = [
        f"name: {_quoted(name)}",
        'platform: "onnxruntime_onnx"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch_size if batched else 0}",
    ]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for each in tensors:
            lines += [f"{kind} {{", *(f"  {line}" for line in each.described(batched)), "}"]
    lines += ["instance_group {", f"  count: {instances}", f"  kind: KIND_{device.upper()}", "}"]
    if batched and max_batch_size > 1:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def batcher_repository(
    name: str,
    network: NetworkSpec,
    *,
    bundle: str = "../../..",
    max_batch_size: int = 16,
    instances: int = 1,
    decoupled: bool = False,
    **parameters: str,
) -> dict[str, bytes]:
    """The files of a model that draws from `bundle`, a path from the version's folder, through a Batcher.

    max_batch_size  the most samples of a request, and of the requests that the server brings together.
    instances       processes, each with an engine of its own.
    decoupled       requests join evaluations that are under way; only streams (gRPC) and `generate` (HTTP) reach it.
    parameters      num_threads, max_batch, max_wait_ms, max_queue, require_signature: skipstep.serving.triton_model.

    Raises InputError.
    """
    _check(name, max_batch_size, "cpu", instances)
    single = {"steps": "TYPE_INT32", "plan": "TYPE_STRING", "deadline_ms": "TYPE_FP32", "guidance_scale": "TYPE_FP32"}
    inputs = [_Tensor("seeds", "TYPE_UINT64", (_OPEN,), "B")]
    inputs += [_Tensor(each, kind, (_OPEN,), "B") for each, kind in {**single, "guidance_rescale": "TYPE_FP32"}.items()]
    if network.num_classes is not None:
        inputs.append(_Tensor("class_labels", "TYPE_INT64", (_OPEN,), "B"))
    for key, each in network.passed_conditions.items():
        kind = "TYPE_INT64" if each.dtype == "int64" else "TYPE_FP32"
        for prefix in ("", "negative_") if each.null == "given" else ("",):
            inputs.append(_Tensor(f"{prefix}{key}", kind, (_OPEN, *each.shape), "B"))
    lines = [f"name: {_quoted(name)}", 'backend: "python"', f"max_batch_size: {max_batch_size}"]
    for tensor in inputs:
        optional = [] if tensor.name == "seeds" else ["optional: true"]
        lines += ["input {", *(f"  {line}" for line in (*tensor.described(True), *optional)), "}"]
    output = _Tensor("samples", "TYPE_FP32", (_OPEN, *network.sample_shape), "B")
    lines += ["output {", *(f"  {line}" for line in output.described(True)), "}"]
    lines += ["instance_group {", f"  count: {instances}", "  kind: KIND_CPU", "}", "dynamic_batching { }"]
    for key, value in {"bundle": bundle, **parameters}.items():
        lines += ["parameters {", f"  key: {_quoted(key)}", f"  value {{ string_value: {_quoted(value)} }}", "}"]
    if decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    return {f"{name}/config.pbtxt": ("\n".join(lines) + "\n").encode(), f"{name}/1/model.py": _MODEL}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An input or output: -1 in `dims` where a dimension is open; `batch` is the name of the first if that one is."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    batch: str

    @classmethod
    def of(cls, value: ValueInfoProto) -> _Tensor:
        tensor = value.type.tensor_type
        if tensor.elem_type not in _TYPES or not tensor.HasField("shape"):
            raise ExportError(
                got=f"{value.name} of {onnx.helper.printable_type(value.type)}",
                expected="a tensor of numbers and known rank",
                remedy="build the graph with build_sampler",
            )
        dims = tensor.shape.dim
        return cls(
            value.name,
            _TYPES[tensor.elem_type],
            tuple(dim.dim_value if dim.HasField("dim_value") else _OPEN for dim in dims),
            dims[0].dim_param if dims else "",
        )

    def described(self, batched: bool) -> Sequence[str]:
        dims = self.dims[1:] if batched else self.dims
        lines = [f"name: {_quoted(self.name)}", f"data_type: {self.data_type}"]
        if dims:
            return [*lines, f"dims: [ {', '.join(map(str, dims))} ]"]
        # A request's tensor has at least one dimension beside the batch; the graph's has none.
        return [*lines, "dims: [ 1 ]", "reshape { shape: [ ] }"]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _check(name: str, max_batch_size: int, device: str, instances: int) -> None:
    if not _SAFE_NAME.fullmatch(name):
        raise InputError(
            got=f"the model name {name!r}",
            expected="letters, digits, '_', '.', '+' and '-', at most 200 and not a '.', '+' or '-' first",
            remedy="choose another name: it becomes a folder's and part of a URL",
        )
    for option, value in (("max_batch_size", max_batch_size), ("instances", instances)):
        check_integer(option, value, low=1, high=2**31 - 1)
    if device not in ("cpu", "gpu"):
        raise InputError(got=f"device={device!r}", expected="'cpu' or 'gpu'", remedy="pick one of these")
