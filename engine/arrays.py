"""Arrays and numbers as callers pass them: NumPy's, torch's, lists, and whatever else offers DLPack."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError

# Of DLPack's device types.
_DLPACK_CUDA = 2


def from_dlpack(name: str, given: Any) -> Any:
    """Arrays of other libraries without a copy: as NumPy's where they are in host memory, as torch's on a GPU."""
    if isinstance(given, np.ndarray) or is_tensor(given) or not hasattr(given, "__dlpack__"):
        return given
    try:
        if given.__dlpack_device__()[0] != _DLPACK_CUDA:
            return np.from_dlpack(given)
        return tensor_from_dlpack(given)
    except Exception as error:  # The exporters of other libraries raise what they like.
        raise InputError(
            got=f"{name} of type {type(given).__name__}, whose memory cannot be read through DLPack: {error}",
            expected="floating-point numbers in host memory or on a CUDA device",
            remedy="pass a NumPy array or a torch tensor",
        ) from error


def host_floats(name: str, given: Any) -> NDArray[np.floating[Any]]:
    """A NumPy array of any floating dtype, from NumPy or torch."""
    if is_tensor(given):
        problem = unreadable(given)
        if problem is not None:
            raise InputError(
                got=f"{name}, {problem}",
                expected="a dense tensor in host memory or on a CUDA device",
                remedy=f"pass a dense float32 copy of {name}",
            )
        given = host_array(given)
    if not isinstance(given, np.ndarray) or not np.issubdtype(given.dtype, np.floating):
        kind = f"dtype {given.dtype}" if isinstance(given, np.ndarray) else f"type {type(given).__name__}"
        raise InputError(
            got=f"{name} of {kind}",
            expected="floating-point numbers in a NumPy array or a torch tensor",
            remedy="pass float32",
        )
    return np.asarray(given)  # Without what subclasses add, such as a mask.


def float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """As contiguous float32; what is too large for it becomes infinity, which later checks refuse."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)


def tensor_from_dlpack(given: Any) -> Any:
    """A torch tensor over the memory of `given`. Raises what its library raises."""
    import torch.utils.dlpack

    return torch.utils.dlpack.from_dlpack(given)


def may_share_memory(a: Any, b: Any) -> bool:
    """Whether writing to one may change the other: NumPy arrays, or tensors; where it is not sure, True."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.may_share_memory(a, b)
    if hasattr(a, "untyped_storage") and hasattr(b, "untyped_storage"):
        return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())
    return False


def batch_rows(array: Any, index: NDArray[np.int64]) -> Any:
    """The rows of a NumPy array or a tensor; `index` is consecutive, except that the last may repeat."""
    if isinstance(array, np.ndarray):
        return array[index]
    rows = array[int(index[0]) : int(index[-1]) + 1]
    missing = len(index) - len(rows)
    if not missing:
        return rows
    import torch

    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def is_tensor(value: object) -> bool:
    """Whether it is torch's. It does not import torch: without torch there are no tensors."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def unreadable(tensor: Any) -> str | None:
    """Why NumPy cannot have the numbers of a tensor, in words, or None where it can."""
    if tensor.is_nested:
        return "a nested tensor"
    if str(tensor.layout) != "torch.strided":
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_quantized:
        return "a quantized tensor"
    return None if tensor.device.type in ("cpu", "cuda") else f"a tensor on {tensor.device}"


def host_array(tensor: Any) -> NDArray[Any]:
    """The numbers of a readable tensor; those of a float dtype that NumPy lacks (bfloat16, float8) as float32."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    if tensor.dtype.is_floating_point and str(tensor.dtype) != "torch.float64":
        tensor = tensor.float()
    return tensor.numpy()  # type: ignore[no-any-return]


def number_array(values: object) -> NDArray[Any] | None:
    """An array of integers or floats, or None for anything else. A bool in a list is none, nor is text."""
    if isinstance(values, str | bytes | bytearray | memoryview):
        return None
    if isinstance(values, list | tuple) and any(isinstance(each, bool | np.bool_) for each in values):
        return None
    try:
        if is_tensor(values):
            array = host_array(values) if unreadable(values) is None else None
        else:
            array = np.asarray(values)
    except Exception:  # Objects that say they are arrays raise what they like.
        return None
    return array if array is not None and array.dtype.kind in "iuf" else None
