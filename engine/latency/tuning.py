"""Measuring an engine where it runs: how long its plans take, and how the step is best launched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from skipstep.calls.trajectory import Progress
from skipstep.editing.edit import ImageEditing
from skipstep.errors import InputError
from skipstep.kernels.layout import StepFlags
from skipstep.latency.calibration import Calibration
from skipstep.latency.measure import calibrate as measure_latencies
from skipstep.plans.plan import Plan

if TYPE_CHECKING:
    from skipstep.kernels.autotune import TunedLaunch


class Tuning(ImageEditing):
    """The methods of `Engine` that measure it. What they find stays with the engine, and goes into its bundle."""

    def calibrate(
        self,
        *,
        repeats: int = 100,
        max_seconds: float = 120.0,
        plans: Iterable[int | Plan] | None = None,
        batch_sizes: Iterable[int] | None = None,
        progress: Progress | None = None,
    ) -> Calibration:
        """Measure whole calls, p50, p90 and p99, of every plan and batch size on this device.

        What was measured before and is not now stays. `Engine.save` writes it into the bundle.
        """
        fresh = measure_latencies(
            self,
            self.identity(),
            repeats=repeats,
            max_seconds=max_seconds,
            plans=plans,
            batch_sizes=batch_sizes,
            progress=progress,
        )
        return self._keep(fresh)

    def autotune(self, *, repeats: int = 20) -> tuple[TunedLaunch, ...]:
        """On a GPU: measure how the step is best launched for each batch size (skipstep.kernels.autotune), and record
        the graphs anew. The choice is kept with `calibration`, so that `Engine.save` writes it. Raises InputError."""
        if self._lane is None:
            raise InputError(
                got=f"autotune on {self.device}", expected="an engine on a GPU", remedy="leave it out on the CPU"
            )
        from skipstep.kernels import autotune
        from skipstep.loops.captured import CudaLoop

        self._lifecycle.check()
        loops = [loop for loop in self.loops.values() if isinstance(loop, CudaLoop)]
        flags = next((plan.stage_flags[0] for plan in self.plans.values()), StepFlags())
        cases = dict.fromkeys(case for loop in loops for case in loop.launch_cases())
        tuned = tuple(autotune.tune_on_device(case, flags, repeats=repeats) for case in cases)
        self._keep(Calibration(self.identity(), {}, tuned))
        for loop in loops:
            loop.forget()
        self.prepare()
        return tuned

    def _keep(self, fresh: Calibration) -> Calibration:
        held = self.calibration
        self.calibration = held.updated_by(fresh) if held is not None and held.identity == fresh.identity else fresh
        return self.calibration
