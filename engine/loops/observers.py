"""Observers of a call: its progress, a callback per step, and a trajectory, kept in memory allocated beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from skipstep.calls.trajectory import Callback, Progress, StepEvent, Trajectory
from skipstep.loops.contract import Array, Observer, Run
from skipstep.plans.stages import Stages

# Changes the state after a step: (step, first sample of the batch, x_t [n, …]) -> x_t.
Blend = Callable[[int, int, Array], Array]


@dataclass(slots=True)
class Observers:
    """All observers of one call, and what changes the state between its steps. `chunk` makes the observer of the batch
    that starts at sample `first`."""

    stages: Stages
    num_runs: int
    progress: Progress | None = None
    callback: Callback | None = None
    trajectory: Trajectory | None = None
    blend: Blend | None = None
    evaluations: int = 0

    @property
    def needs_x0(self) -> bool:
        return self.callback is not None or self.trajectory is not None

    def chunk(self, first: int, size: int) -> Observer:
        steps = np.cumsum(self.stages.ends_step) - 1
        places = {} if self.trajectory is None else {int(s): k for k, s in enumerate(self.trajectory.steps)}

        def observe(stage: int, run: Run) -> None:
            self.evaluations += 1
            if self.progress is not None:
                self.progress(self.evaluations, self.num_runs * len(self.stages))
            step = int(steps[stage])
            if self.blend is not None and self.stages.ends_step[stage]:
                state = run.state()
                state[:size] = self.blend(step, first, state[:size])
                run.set_state(state)
            wanted = self.callback is not None or step in places
            if not (self.needs_x0 and wanted and self.stages.ends_step[stage]):
                return
            # The rest of the batch is padding.
            x_t, x0 = run.state()[:size], run.x0()[:size]
            if self.trajectory is not None and step in places:
                self.trajectory.x_t[places[step], first : first + size] = x_t
                self.trajectory.x0[places[step], first : first + size] = x0
            if self.callback is not None:
                self.callback(StepEvent(step, int(steps[-1]) + 1, first, x_t, x0))

        return observe
