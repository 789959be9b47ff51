"""What an evaluation costs: milliseconds by the rows of the network's batch, from whole calls that were measured.

ms(rows) = p50 of a call that evaluates so many rows E times, over E; linear between the sizes measured
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from skipstep.latency.calibration import Calibration
from skipstep.plans.plan import Plan

# A larger batch must raise the rows per millisecond by more than this share: less is the noise of a measurement.
LEAST_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class Cost:
    """`typical` and `cautious` milliseconds of an evaluation of `rows` rows, sorted: p50 and p99 of whole calls.

    `batch_sizes`: the only ones that are evaluated, ascending; others cost what the next does. Empty: any.
    """

    rows: tuple[int, ...]
    typical: tuple[float, ...]
    cautious: tuple[float, ...]
    batch_sizes: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, calibration: Calibration | None, plans: Mapping[str, Plan], batch_sizes: tuple[int, ...] = ()
    ) -> Cost | None:
        """None where fewer than two sizes were measured: one says nothing about what a larger batch costs."""
        found: dict[int, tuple[float, float]] = {}
        for kind, latency in ({} if calibration is None else calibration.latencies).items():
            plan = plans.get(kind.plan)
            if plan is None or any(flags.unguided for flags in plan.stage_flags):
                continue  # Of unknown length, or of evaluations of two sizes.
            rows = kind.batch_size * (2 if kind.guided else 1)
            each = (latency.p50_ms / plan.num_evaluations, latency.p99_ms / plan.num_evaluations)
            # The plan with the least: what a call costs beside its evaluations weighs the least in the longest.
            found[rows] = min(each, found.get(rows, each))
        if len(found) < 2:
            return None
        sizes = sorted(found)
        typical, cautious = zip(*(found[size] for size in sizes), strict=True)
        return cls(tuple(sizes), typical, cautious, batch_sizes)

    def ms(self, rows: int, *, cautious: bool = False) -> float:
        """Beyond the largest size measured the milliseconds of a row stay as they are there."""
        rows = next((size for size in self.batch_sizes if size >= rows), rows)
        known = self.cautious if cautious else self.typical
        place = bisect_left(self.rows, rows)
        if place == len(self.rows):
            return known[-1] * rows / self.rows[-1]
        if place == 0:
            return known[0]
        low, high = self.rows[place - 1 : place + 1]
        return known[place - 1] + (known[place] - known[place - 1]) * (rows - low) / (high - low)

    def paying_rows(self, most: int) -> int:
        """The smallest batch of at most `most` rows that evaluates almost as many rows a millisecond as the best."""
        rate = {rows: rows / self.ms(rows) for rows in range(1, most + 1)}
        return next(rows for rows in rate if rate[rows] >= (1.0 - LEAST_GAIN) * max(rate.values()))
