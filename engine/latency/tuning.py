"""Measuring an engine where it runs: how long its plans take, and how the step is best launched.

Functions over an engine, which are methods of `skipstep.Engine`. What they find stays with the engine, and
`Engine.save` writes it into the bundle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from skipstep.calls.trajectory import Progress
from skipstep.errors import check_callable, check_integer
from skipstep.kernels.layout import StepFlags
from skipstep.latency.calibration import Calibration, stored_calibration
from skipstep.latency.identity import DeviceIdentity
from skipstep.latency.measure import calibrate as measure_latencies
from skipstep.loops.contract import Loop, Sampler
from skipstep.plans.plan import Plan
from skipstep.reporting import LOGGER

if TYPE_CHECKING:
    from skipstep.kernels.autotune import TunedLaunch


class Tunable(Sampler, Protocol):
    """An engine that keeps its calibration, and can record its loops again."""

    backend: str
    precision: str
    calibration: Calibration | None

    def identity(self) -> DeviceIdentity: ...
    def prepare(self) -> None: ...


def calibrate(
    engine: Tunable,
    *,
    repeats: int = 100,
    max_seconds: float = 120.0,
    plans: Iterable[int | Plan] | None = None,
    batch_sizes: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure whole calls, p50, p90 and p99, of every plan and batch size on this device (skipstep.latency.measure).

    On the CPU it first finds out whether a batch is best evaluated as a whole or in parts, one for each core. What was
    measured before and is not measured now stays.
    """
    fresh = measure_latencies(
        engine,
        engine.identity(),
        repeats=repeats,
        max_seconds=max_seconds,
        plans=plans,
        batch_sizes=batch_sizes,
        progress=progress,
    )
    return _keep(engine, fresh)


def autotune(engine: Tunable, *, repeats: int = 20, progress: Progress | None = None) -> tuple[TunedLaunch, ...]:
    """On a GPU: measure how the step is best launched for each batch size (skipstep.kernels.autotune), and record the
    graphs again. The launches are kept with `calibration`. progress(done, total) counts the batch sizes. Raises
    InputError on the CPU."""
    repeats = check_integer("repeats", repeats, low=1, high=1_000_000)
    check_callable("progress", progress, "done, total")
    engine.runner.check()
    cases = list(engine.runner.loop.launch_cases())
    from skipstep.cuda.device import CAPTURE_LOCK
    from skipstep.kernels import autotune as measured

    flags = next((plan.stage_flags[0] for plan in engine.plans.values()), StepFlags())
    tuned: list[TunedLaunch] = []
    device = engine.runner.loop.device
    for case in cases:
        LOGGER.info("tune the step for %s", case)
        tuned.append(measured.tune_on_device(case, flags, device=device, lock=CAPTURE_LOCK, repeats=repeats))
        if progress is not None:
            progress(len(tuned), len(cases))
    _use(_keep(engine, Calibration(engine.identity(), {}, tuple(tuned))), engine.runner.loop)
    engine.prepare()
    return tuple(tuned)


def use_stored(calibrations: bytes, identity: DeviceIdentity, loop: Loop) -> Calibration | None:
    """This device's calibration of a bundle's, and the loop made to run as was found best. Raises BundleError."""
    found = stored_calibration(calibrations, identity)
    if found is not None:
        _use(found, loop)
    return found


def _use(calibration: Calibration, loop: Loop) -> None:
    loop.use_launches({each.case: each.launch for each in calibration.launches})
    if loop.splits is not None:
        loop.splits.measured.update(calibration.splits)


def _keep(engine: Tunable, fresh: Calibration) -> Calibration:
    held = engine.calibration
    kept = held.updated_by(fresh) if held is not None and held.identity == fresh.identity else fresh
    engine.calibration = kept
    return kept
