"""Models with weights beside them (skipstep.networks.large_graph), as onnx and its optimizer see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from skipstep.errors import ExportError, InputError
from skipstep.networks.graphs import LORA_INPUTS
from skipstep.networks.large_graph import LOCATION, NO_FILE, LargeGraph, Weights, graph_size

if TYPE_CHECKING:  # A device that only builds engines has onnx alone.
    import onnx_ir as ir

# From this size on weights leave the graph: one protobuf message ends at 2 GiB, and to copy it takes as much memory.
LARGE_BYTES = 1 << 30
# Smaller weights stay: shape inference and the optimizer read them.
WEIGHT_BYTES = 1 << 16


def take_weights_out(model: ir.Model, *, large: bool = False) -> dict[str, NDArray[Any]]:
    """The large weights of a model that is large, or is said to be, out of it; they share the tensors' memory."""
    import onnx_ir as ir

    values = [value for value in model.graph.initializers.values() if value.const_value is not None]
    if not large and sum(value.const_value.nbytes for value in values if value.const_value) < LARGE_BYTES:
        return {}
    weights = {}
    for value in values:
        tensor, name = value.const_value, str(value.name)
        assert tensor is not None
        if tensor.nbytes >= WEIGHT_BYTES:
            weights[name] = np.ascontiguousarray(tensor.numpy())
            value.const_value = ir.ExternalTensor(
                NO_FILE, None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=""
            )
    return weights


def lora_factors_as_inputs(model: ir.Model, names: Iterable[str]) -> None:
    """The factors beside a network's layers, which a swap changes, become inputs of its graph; `names` are those of the
    module's buffers. Raises ExportError where the exporter made other constants of them."""
    for name in [each for each in names if each.endswith(LORA_INPUTS)]:
        value = model.graph.initializers.pop(name, None)
        if value is None:
            raise ExportError(
                got=f"a graph in which {name} is folded into constants",
                expected="one that reads it",
                remedy="use backend='torch', or fuse the LoRAs: leave lora_rank out",
            )
        value.const_value = None
        model.graph.inputs.append(value)


def put_weights_in(model: ir.Model, graph: bytes) -> None:
    """Give the tensors of a model that was made from `graph` their values."""
    import onnx_ir as ir

    if isinstance(graph, LargeGraph):
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                assert value.dtype is not None
                value.const_value = ir.Tensor(graph.weights[name], dtype=value.dtype, name=name)


@contextmanager
def weights_as_inputs(model: ModelProto) -> Iterator[None]:
    """Meanwhile the weights outside of a model are inputs of it: nothing looks for their files."""
    outside = [tensor for tensor in model.graph.initializer if is_outside(tensor)]
    names = {tensor.name for tensor in outside}
    _keep(model.graph.initializer, lambda tensor: tensor.name not in names)
    model.graph.input.extend(helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in outside)
    try:
        yield
    finally:  # The model may have become another one.
        _keep(model.graph.input, lambda value: value.name not in names)
        model.graph.initializer.extend(outside)


def is_outside(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def array_of(tensor: TensorProto, weights: Weights) -> NDArray[Any]:
    """The values of an initializer, which may be one of the `weights` outside."""
    return weights[tensor.name] if is_outside(tensor) else numpy_helper.to_array(tensor)


def outside(name: str, array: NDArray[Any]) -> TensorProto:
    """An initializer whose values are elsewhere."""
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=dtype, dims=array.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key=LOCATION.decode(), value=NO_FILE)
    return tensor


def refuse_large(graph: bytes, what: str, remedy: str) -> None:
    """Raise InputError where `what` would need a large graph in one piece."""
    if isinstance(graph, LargeGraph):
        raise InputError(
            got=f"{what} of {graph_size(graph) / 1e9:.1f} GB",
            expected=f"below {LARGE_BYTES / 1e9:.1f} GB, which one graph holds",
            remedy=remedy,
        )


def _keep(repeated: Any, wanted: Any) -> None:
    kept = [each for each in repeated if wanted(each)]
    del repeated[:]
    repeated.extend(kept)
