"""Backends: what runs the network inside a loop, each behind the same four names."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from skipstep.conditioning import Conditioning
from skipstep.errors import InputError, MissingDependencyError

BackendName = Literal["torch", "onnxruntime"]
BACKENDS: tuple[str, ...] = get_args(BackendName)

_NEEDS = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "torch", "onnx", "onnxscript")}
_INSTALL = {"torch": "pip install 'skipstep[torch]'", "onnxruntime": "pip install 'skipstep[cpu,export]'"}


class Denoiser(Protocol):
    """A network at one batch size N, behind buffers that never move: write `input`, enqueue, read `output`.

    `input` is `[N, C, H, W]` and `output` `[N, C or 2C, H, W]` (NetworkSpec.output_shape): NumPy arrays for a network
    on the CPU, CUDA tensors in the network's dtype for one on a GPU, where `enqueue` only launches work on the current
    stream.
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

    Raises InputError for an unknown name and MissingDependencyError, naming the extra, for one that is not installed.
    """
    if name == "auto":
        name = "onnxruntime" if device == "cpu" and not _missing("onnxruntime") else "torch"
    if name not in ("torch", "onnxruntime"):
        raise InputError(
            got=f"backend={name!r}",
            expected=f"one of auto, {', '.join(BACKENDS)}",
            remedy="use 'auto' to let the engine choose",
        )
    missing = _missing(name)
    if missing:
        raise MissingDependencyError(
            got=f"no package {', '.join(missing)}", expected=f"what the {name} backend needs", remedy=_INSTALL[name]
        )
    if name == "onnxruntime" and device != "cpu":
        raise InputError(
            got=f"backend='onnxruntime' on {device}",
            expected="device='cpu': this backend drives ONNX Runtime's CPU provider",
            remedy="use backend='torch' on a GPU",
        )
    return "torch" if name == "torch" else "onnxruntime"


def _missing(name: str) -> list[str]:
    return [package for package in _NEEDS[name] if importlib.util.find_spec(package) is None]
