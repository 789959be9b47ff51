"""Quality against milliseconds: which of an engine's plans are worth their time.

A function over an engine, which is a method of `skipstep.Engine`. A plan is dominated where another takes no more time
and its images are no further from the converged ones, and one of the two is less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skipstep.errors import InputError, check_flag, check_integer
from skipstep.latency.calibration import RunKind
from skipstep.latency.table import format_table
from skipstep.plans.fit import Quality
from skipstep.plans.plan import Plan

if TYPE_CHECKING:
    from skipstep.latency.tuning import Tunable


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """A plan, its latencies here in ms, and its distance to the converged images, None where it was not measured."""

    plan: Plan
    p50_ms: float
    p99_ms: float
    rmse: float | None
    dominated: bool


@dataclass(frozen=True, slots=True)
class Pareto:
    """The plans that were timed, the fastest first."""

    points: tuple[ParetoPoint, ...]
    batch_size: int
    guided: bool

    def __iter__(self) -> Iterator[ParetoPoint]:
        return iter(self.points)

    def __str__(self) -> str:
        rows = [
            (
                str(each.plan.steps),
                str(each.plan.num_evaluations),
                each.plan.solver,
                f"{each.p50_ms:.2f}",
                f"{each.p99_ms:.2f}",
                "not measured" if each.rmse is None else f"{each.rmse:.4f}",
                "dominated" if each.dominated else "",
            )
            for each in self.points
        ]
        header = ("steps", "evaluations", "solver", "p50, ms", "p99, ms", "RMSE to the converged image", "")
        guidance = "with guidance" if self.guided else "without guidance"
        return f"{format_table(header, rows)}\nwhole calls at batch {self.batch_size}, {guidance}"


def pareto(engine: Tunable, *, batch_size: int = 1, guided: bool = False) -> Pareto:
    """Quality against milliseconds, of this engine's plans that were timed at `batch_size`, with or without guidance.

    Latencies are those of `calibrate`, qualities those of `tune` (skipstep.plans.fit.Quality); qualities of another
    guidance scale than that of most plans count as not measured. Raises InputError where no plan was timed so.
    """
    batch_size = check_integer("batch_size", batch_size, low=1)
    guided = check_flag("guided", guided)
    held = engine.calibration
    timed = []
    for plan in engine.plans.values():
        latency = None if held is None else held.latencies.get(RunKind(plan.key, batch_size, guided))
        if latency is not None:
            timed.append((plan, latency))
    if not timed:
        raise InputError(
            got=f"pareto of an engine without latencies at batch {batch_size}, {'guided' if guided else 'unguided'}",
            expected="plans that were timed on this device",
            remedy=f"call engine.calibrate(batch_sizes=[{batch_size}]) first",
        )
    qualities = [plan.quality for plan, _ in timed if isinstance(plan.quality, Quality)]
    scales = [quality.guidance_scale for quality in qualities]
    usual = max(scales, key=scales.count, default=None)

    def rmse(plan: Plan) -> float | None:
        quality = plan.quality
        return quality.rmse if isinstance(quality, Quality) and quality.guidance_scale == usual else None

    known = [(latency.p50_ms, found) for plan, latency in timed if (found := rmse(plan)) is not None]
    points = []
    for plan, latency in sorted(timed, key=lambda each: (each[1].p50_ms, each[0].key)):
        own = rmse(plan)
        dominated = own is not None and any(
            ms <= latency.p50_ms and other <= own and (ms, other) != (latency.p50_ms, own) for ms, other in known
        )
        points.append(ParetoPoint(plan, latency.p50_ms, latency.p99_ms, own, dominated))
    return Pareto(tuple(points), batch_size, guided)
