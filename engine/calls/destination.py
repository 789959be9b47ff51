"""Where samples go: new memory, or the caller's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from skipstep.calls.arrays import DLPACK_ERRORS, tensor_from_dlpack
from skipstep.errors import InputError


def new_samples(shape: tuple[int, ...], *, on_device: str | None) -> Any:
    """Float32 memory of `shape`: a tensor on the CUDA device `on_device`, or a NumPy array."""
    if on_device is None:
        return np.empty(shape, np.float32)
    import torch

    return torch.empty(shape, device=on_device)


def copy_samples(samples: np.ndarray[Any, Any], part: Any) -> None:
    """Write host samples to memory of either kind."""
    if isinstance(part, np.ndarray):
        part[...] = samples
        return
    import torch

    part.copy_(torch.from_numpy(samples))


def callers_memory(out: Any, shape: tuple[int, ...], *, device: str) -> Any:
    """`out` in the form that loops write to: a NumPy array, or a tensor on the CUDA `device`, over the same memory.

    It may be a NumPy array, a torch tensor, or anything with DLPack: float32, contiguous, writable, in host memory or
    on the engine's device. Raises InputError.
    """
    given = out
    if not isinstance(out, np.ndarray) and hasattr(out, "__dlpack__"):
        if not hasattr(out, "detach"):
            try:
                out = tensor_from_dlpack(out)
            except DLPACK_ERRORS as error:
                problem = f"whose memory cannot be shared: {error}"
                raise _unfit(out, problem, "memory that can be written to") from error
        if out.device.type == "cpu":
            # A tensor that needs a gradient has no NumPy array.
            out = out.detach().numpy() if out.dtype.is_floating_point and out.is_contiguous() else out
        elif str(out.device) != device:
            raise _unfit(given, f"on {out.device}", f"host memory, or {device}, where the engine runs")
    if isinstance(out, np.ndarray):
        fits = out.dtype == np.float32 and out.flags.c_contiguous and out.flags.writeable
    elif hasattr(out, "detach"):
        fits = str(out.dtype) == "torch.float32" and out.is_contiguous()
    else:
        raise _unfit(given, "without memory to write to", "a NumPy array, a torch tensor, or one with __dlpack__")
    described = f"of shape {list(out.shape)} and dtype {out.dtype}" + ("" if fits else ", as it lies in memory")
    if not fits or tuple(out.shape) != shape:
        raise _unfit(given, described, f"writable contiguous float32 {list(shape)}")
    return out


def _unfit(out: Any, got: str, expected: str) -> InputError:
    return InputError(
        got=f"out of type {type(out).__name__} {got}", expected=expected, remedy="leave out= out for new memory"
    )
