"""Backends: what runs the network inside a loop, each behind the same four names."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.conditioning import Conditioning
from skipstep.errors import InputError, MissingDependencyError

BackendName = Literal["torch", "onnxruntime", "tensorrt"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

_EXPORT = ("torch", "onnx", "onnxscript")
# Either TensorRT will do; which one is found when it is needed.
_NEEDS: Mapping[BackendName, tuple[str, ...]] = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", *_EXPORT),
    "tensorrt": ("tensorrt|tensorrt_rtx", "onnxruntime", *_EXPORT),
}
_INSTALL: Mapping[BackendName, str] = {
    "torch": "pip install 'skipstep[torch]'",
    "onnxruntime": "pip install 'skipstep[cpu,export]', or 'skipstep[gpu,export]' on a GPU",
    "tensorrt": "pip install 'skipstep[gpu,export]', or 'skipstep[rtx,cpu,export]'",
}


class Denoiser(Protocol):
    """A network on the CPU at one batch size N, behind buffers that never move: write `input`, enqueue, read `output`.

    `input` is `[N, C, H, W]` and `output` `[N, C or 2C, H, W]` (NetworkSpec.output_shape), float32 NumPy arrays.
    skipstep.backends.denoiser has its like on a GPU.
    """

    batch_size: int
    input: Any
    output: Any

    def prepare(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> None:
        """Make the constants of a whole loop resident: `timesteps` `[E, N]`, and the conditioning of N samples."""
        ...

    def enqueue(self, stage: int) -> None:
        """Evaluate the network at `timesteps[stage]`."""
        ...


def resolve_backend(name: str, *, device: str) -> BackendName:
    """Turn "auto" into a backend: torch on a GPU; on the CPU onnxruntime, the fastest there, or torch without it.

    Raises InputError for an unknown name or one that the device has not, and MissingDependencyError, naming the extra,
    for one that is not installed.
    """
    if name == "auto":
        return "onnxruntime" if device == "cpu" and not _missing("onnxruntime") else "torch"
    for known in BACKENDS:
        if name == known:
            break
    else:
        raise InputError(
            got=f"backend={name!r}",
            expected=f"one of auto, {', '.join(BACKENDS)}",
            remedy="use 'auto' to let the engine choose",
        )
    if known == "tensorrt" and device == "cpu":
        raise InputError(
            got="backend='tensorrt' on the CPU",
            expected="device='cuda': TensorRT's engines run on NVIDIA GPUs",
            remedy="use backend='onnxruntime' on the CPU",
        )
    missing = _missing(known)
    if missing:
        raise MissingDependencyError(
            got=f"no package {', '.join(missing)}", expected=f"what the {known} backend needs", remedy=_INSTALL[known]
        )
    return known


def _missing(name: BackendName) -> list[str]:
    return [
        each.replace("|", " or ")
        for each in _NEEDS[name]
        if all(importlib.util.find_spec(package) is None for package in each.split("|"))
    ]
