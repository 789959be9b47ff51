"""What observers of a call receive: progress, an event per step, and trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import check_integer

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]


def part_of(progress: Progress | None, start: int, total: int) -> Progress | None:
    """The progress of one part of a call: `start` evaluations of `total` are done when it begins."""
    return None if progress is None else lambda done, _: progress(start + done, total)


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One step of one batch: `step` of `num_steps`, and copies of the state it led to and the image it predicted.

    `x_t`, `x0`: float32 `[n, *sample_shape]` of the samples `first` … `first + n - 1` of the call.
    """

    step: int
    num_steps: int
    first: int
    x_t: Array
    x0: Array


Callback = Callable[[StepEvent], None]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The states that a call passed through: `steps` `[K]` (0 is the first), `x_t` and `x0` float32 `[K, B, C, H, W]`.

    x_t is the state that a step led to, x0 the image that it predicted. The last step is always among them.
    """

    steps: NDArray[np.int64]
    x_t: Array
    x0: Array

    @classmethod
    def empty(cls, num_steps: int, stride: int, shape: Sequence[int]) -> Trajectory:
        """Room for every `stride`-th step, counted back from the last. Raises InputError for a stride below 1."""
        stride = check_integer(
            "trajectory", stride, low=1, remedy="pass True for every step, or trajectory=5 for every fifth"
        )
        steps = np.arange(num_steps - 1, -1, -min(stride, num_steps))[::-1].copy()
        x_t = np.empty((len(steps), *shape), np.float32)
        return cls(steps, x_t, np.empty_like(x_t))
