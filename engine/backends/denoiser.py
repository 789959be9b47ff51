"""A network on a GPU, as loops there drive it.

The loop owns all memory that a stage looks up, at addresses that never move, and says where it is at every evaluation.
So a network has no state of its own between calls, one graph serves every plan of equal structure, and what a network
looks up travels to the device in the same copy as the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, dtype

from skipstep.calls.conditioning import Conditioning

# Which stage: its number, or where on the device it stands (int32 `[1]`), for a graph that is one step of many.
Stage = int | Tensor
Enqueue = Callable[[Mapping[str, Tensor], Stage], None]


@dataclass(frozen=True, slots=True)
class Constant:
    """Something that a network looks up: `shape` of one sample's, and whether every stage has its own."""

    shape: tuple[int, ...]
    dtype: dtype
    per_stage: bool


class DeviceDenoiser(Protocol):
    """A network at one batch size N.

    `input` `[N, C, H, W]` and `output` `[N, C or 2C, H, W]` are CUDA tensors in the network's dtype that never move.
    `constants` says what it looks up, by name. `capture_refusal` is why it cannot be recorded into a CUDA graph of
    ours, None where it can.
    """

    name: str
    batch_size: int
    input: Tensor
    output: Tensor
    constants: Mapping[str, Constant]
    capture_refusal: str | None

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> dict[str, NDArray[Any]]:
        """The constants' values in host memory, for `timesteps` `[E, N]` and the conditioning of N samples.

        `[E, N, *shape]` for those of every stage, `[N, *shape]` for the others; float32 stands for bfloat16, which
        NumPy lacks.
        """
        ...

    def new_context(self) -> Enqueue:
        """How to evaluate it: `enqueue(constants, stage)` launches work on the current stream, and only launches.

        `constants` are device tensors of the shapes that `compute` gives. Each captured graph takes a context of its
        own and keeps it: what a library remembers between launches must not be shared between graphs. Contexts share
        the network's buffers and activations, so only one may be running.
        """
        ...
