"""Looking on while a loop runs: progress, a callback per step, and trajectories kept in buffers taken beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError
from skipstep.loops.stepwise import Observer, Run
from skipstep.plans.stages import Stages

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One step of one batch: `step` of `num_steps`, and copies of the state it led to and the image it predicted.

    `x_t`, `x0`: float32 `[n, C, H, W]` of the samples `first` … `first + n - 1` of the call.
    """

    step: int
    num_steps: int
    first: int
    x_t: Array
    x0: Array


Callback = Callable[[StepEvent], None]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What a call passed through: `steps` `[K]` (0 is the first), `x_t` and `x0` float32 `[K, B, C, H, W]`.

    x_t is the state that a step led to, x0 the image that it predicted. The last step is always among them.
    """

    steps: NDArray[np.int64]
    x_t: Array
    x0: Array

    @classmethod
    def empty(cls, num_steps: int, stride: int, shape: Sequence[int]) -> Trajectory:
        """Room for every `stride`-th step, counted back from the last. Raises InputError for a stride below 1."""
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
            raise InputError(
                got=f"trajectory={stride!r}",
                expected="True, or a stride of steps, an integer ≥ 1",
                remedy="pass trajectory=5 to keep every fifth step",
            )
        steps = np.arange(num_steps - 1, -1, -stride)[::-1].copy()
        x_t = np.empty((len(steps), *shape), np.float32)
        return cls(steps, x_t, np.empty_like(x_t))


@dataclass(slots=True)
class Watch:
    """Everybody who looks on during one call. `chunk` makes the observer of one batch of it."""

    stages: Stages
    num_runs: int
    progress: Progress | None = None
    callback: Callback | None = None
    trajectory: Trajectory | None = None
    evaluations: int = 0

    @property
    def needs_x0(self) -> bool:
        return self.callback is not None or self.trajectory is not None

    def chunk(self, first: int, size: int) -> Observer | None:
        if self.progress is None and not self.needs_x0:
            return None
        steps = np.cumsum(self.stages.ends_step) - 1
        places = {} if self.trajectory is None else {int(s): k for k, s in enumerate(self.trajectory.steps)}

        def observe(stage: int, run: Run) -> None:
            self.evaluations += 1
            if self.progress is not None:
                self.progress(self.evaluations, self.num_runs * len(self.stages))
            step = int(steps[stage])
            wanted = self.callback is not None or step in places
            if not (self.needs_x0 and wanted and self.stages.ends_step[stage]):
                return
            # Padding is nobody's sample.
            x_t, x0 = run.state()[:size], run.x0()[:size]
            if self.trajectory is not None and step in places:
                self.trajectory.x_t[places[step], first : first + size] = x_t
                self.trajectory.x0[places[step], first : first + size] = x0
            if self.callback is not None:
                self.callback(StepEvent(step, int(steps[-1]) + 1, first, x_t, x0))

        return observe
