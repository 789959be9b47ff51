"""Where samples go: new memory, or the caller's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from skipstep.arrays import is_tensor, tensor_from_dlpack, unreadable
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
    memory: Any = out
    if type(out) is np.ndarray and out.shape == shape and out.dtype == np.float32 and out.flags.carray:
        return out
    if not isinstance(out, np.ndarray) and not is_tensor(out) and hasattr(out, "__dlpack__"):
        try:
            memory = tensor_from_dlpack(out)
        except Exception as error:  # The exporters of other libraries raise what they like.
            raise _unfit(out, f"whose memory cannot be shared: {error}", "memory that can be written to") from error
    tensor = is_tensor(memory)
    if tensor:
        problem = unreadable(memory) or ("a tensor that requires a gradient" if memory.requires_grad else None)
        if problem is not None:
            raise _unfit(out, f"({problem})", "a dense tensor without a gradient, such as out.detach()")
        if memory.device.type != "cpu" and str(memory.device) != device:
            raise _unfit(out, f"on {memory.device}", f"host memory, or {device}, where the engine runs")
        fits = str(memory.dtype) == "torch.float32" and memory.is_contiguous() and not memory.is_neg()
    elif isinstance(memory, np.ndarray):
        fits = memory.dtype == np.float32 and memory.flags.c_contiguous and memory.flags.writeable
    else:
        raise _unfit(out, "without memory to write to", "a NumPy array, a torch tensor, or one with __dlpack__")
    described = f"of shape {list(memory.shape)} and dtype {memory.dtype}" + ("" if fits else ", as it lies in memory")
    if not fits or tuple(memory.shape) != shape:
        raise _unfit(out, described, f"writable contiguous float32 {list(shape)}")
    return memory.numpy() if tensor and memory.device.type == "cpu" else memory


def _unfit(out: Any, got: str, expected: str) -> InputError:
    return InputError(
        got=f"out of type {type(out).__name__} {got}", expected=expected, remedy="leave out= out for new memory"
    )
