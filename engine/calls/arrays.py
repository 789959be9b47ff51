"""Arrays of other libraries: NumPy's, torch's, and whatever else offers DLPack."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError

# What the exporters of other libraries raise for memory that cannot be shared.
DLPACK_ERRORS: Final = (RuntimeError, BufferError, TypeError, ValueError)
# Of DLPack's device types.
_DLPACK_CUDA = 2


def from_dlpack(name: str, given: Any) -> Any:
    """Arrays of other libraries without a copy: as NumPy's where they are in host memory, as torch's on a GPU."""
    if isinstance(given, np.ndarray) or hasattr(given, "detach") or not hasattr(given, "__dlpack__"):
        return given
    try:
        if given.__dlpack_device__()[0] != _DLPACK_CUDA:
            return np.from_dlpack(given)
        return tensor_from_dlpack(given)
    except (*DLPACK_ERRORS, ImportError) as error:
        raise InputError(
            got=f"{name} of type {type(given).__name__}, whose memory cannot be read through DLPack: {error}",
            expected="floating-point numbers in host memory or on a CUDA device",
            remedy="pass a NumPy array or a torch tensor",
        ) from error


def host_floats(name: str, given: Any) -> NDArray[np.floating[Any]]:
    """A NumPy array of any floating dtype, from NumPy or torch."""
    if hasattr(given, "detach"):
        if given.device.type not in ("cpu", "cuda"):
            raise InputError(
                got=f"{name} on {given.device}", expected="a tensor in memory", remedy=f"move it with {name}.cpu()"
            )
        # NumPy has no bfloat16.
        given = (given.float() if given.dtype.is_floating_point else given).detach().cpu().numpy()
    if not isinstance(given, np.ndarray) or not np.issubdtype(given.dtype, np.floating):
        kind = f"dtype {given.dtype}" if isinstance(given, np.ndarray) else f"type {type(given).__name__}"
        raise InputError(
            got=f"{name} of {kind}",
            expected="floating-point numbers in a NumPy array or a torch tensor",
            remedy="pass float32",
        )
    return given


def tensor_from_dlpack(given: Any) -> Any:
    """A torch tensor over the memory of `given`. Raises what its library raises (DLPACK_ERRORS)."""
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
