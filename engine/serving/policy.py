"""Which samples the next evaluation takes. A function of the jobs, their costs and the time: it holds nothing.

Every sample is a job, under way or not yet begun; a job that is not chosen keeps its state and its stage. In order:

1. jobs that were passed over `patience` times, the first that arrived first: they stay in front until they are done;
2. jobs that can still meet their deadline, the earliest deadline first;
3. the others, the first that arrived first.

The first is chosen, and others join while a larger batch evaluates more rows a millisecond (Cost.paying_rows) and as
long as no chosen job would miss its deadline by the longer evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from skipstep.errors import DeadlineError, InputError
from skipstep.latency.deadline import MARGIN
from skipstep.serving.cost import Cost

PATIENCE = 64


@dataclass(slots=True, eq=False)
class Job:
    """One sample. `rows` of the network that each of its stages evaluates, 1 or 2; `stage` is the next one.

    `arrival` numbers the jobs; `deadline` is in seconds of the clock, infinite where there is none; `passed` counts the
    evaluations since its arrival that went without it.
    """

    arrival: int
    rows: Sequence[int]
    deadline: float = math.inf
    stage: int = 0
    passed: int = 0

    @property
    def width(self) -> int:
        return self.rows[self.stage]

    @property
    def remaining(self) -> int:
        return len(self.rows) - self.stage


AnyJob = TypeVar("AnyJob", bound=Job)


@dataclass(frozen=True, slots=True)
class Policy:
    """At most `max_rows` rows an evaluation. Without a cost all join, and deadlines only say who comes first.

    `limit`: the rows up to which joining pays; one job alone may need more.
    """

    max_rows: int
    cost: Cost | None = None
    patience: int = PATIENCE
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        limit = self.max_rows if self.cost is None else self.cost.paying_rows(self.max_rows)
        object.__setattr__(self, "limit", limit)

    def choose(self, jobs: Iterable[AnyJob], now: float) -> list[AnyJob]:
        """The jobs of the next evaluation, in order; empty only where there are none."""
        chosen: list[AnyJob] = []
        rows = 0
        for job in self.order(jobs, now):
            joined = rows + job.width
            if chosen and (
                joined > self.limit or (job.passed < self.patience and self._harms(chosen, rows, joined, now))
            ):
                continue
            chosen.append(job)
            rows = joined
            if rows >= self.limit:
                break
        return chosen

    def order(self, jobs: Iterable[AnyJob], now: float) -> list[AnyJob]:
        def rank(job: Job) -> tuple[int, float, int]:
            if job.passed >= self.patience:
                return 0, job.arrival, 0
            if job.deadline < math.inf and self._ms_left(job, now) >= self._ms(job.width):
                return 1, job.deadline, job.arrival
            return 2, job.arrival, 0

        return sorted(jobs, key=rank)

    def admit(self, jobs: Sequence[Job], new: Sequence[Job], now: float) -> None:
        """Raise DeadlineError where a new job's deadline cannot be met, or only by breaking one that holds so far, and
        InputError for a deadline without a cost."""
        if all(job.deadline == math.inf for job in new):
            return
        if self.cost is None:
            raise InputError(
                got="deadline_ms= for a batcher that does not know what an evaluation costs",
                expected="an engine that was calibrated at two batch sizes at least",
                remedy="call engine.calibrate(batch_sizes=[1, 2, 4, 8, 16]), and make the batcher after that",
            )
        before, after = self.finish_times(jobs, now), self.finish_times([*jobs, *new], now)
        needed = {job: (1.0 + MARGIN) * (after[job] - now) for job in new}
        late = any(now + needed[job] > job.deadline for job in new)
        if late or any(before[job] <= job.deadline < after[job] for job in jobs):
            raise DeadlineError(
                got=f"{1e3 * (min(job.deadline for job in new) - now):.1f} ms left for {len(new)} samples, with "
                f"{len(jobs)} under way",
                expected=f"at least {1e3 * max(needed.values()):.1f} ms, by p99 and a margin of {MARGIN:.0%}"
                if late
                else "deadlines of accepted requests that still hold",
                remedy="allow more time, choose a plan of fewer steps, or submit it when there is less to do",
            )

    def finish_times(self, jobs: Iterable[Job], now: float) -> dict[Job, float]:
        """When each job is expected to be done if nothing else arrives, in seconds of the clock; cautious.

        A job waits at most until the evaluations before it in the order have been shared out, and then takes part in
        every one. Without a cost an evaluation takes no time.
        """
        ordered = self.order(jobs, now)
        widths = [job.width for job in ordered]
        slots = min(max([self.limit, *widths]), sum(widths)) or 1
        seconds = 0.0 if self.cost is None else 1e-3 * self.cost.ms(slots, cautious=True)
        times, before = {}, 0
        for job in ordered:
            times[job] = now + seconds * (before / slots + job.remaining)
            before += sum(job.rows[job.stage :])
        return times

    def most_passed(self, num_jobs: int, longest: int) -> int:
        """No job is passed over more often while at most `num_jobs` are there, of at most `longest` evaluations.

        After `patience` only earlier arrivals are in front of it, and an evaluation takes at least limit // 2 of those.
        """
        return self.patience + math.ceil((num_jobs - 1) * longest / max(1, self.limit // 2))

    def _ms(self, rows: int) -> float:
        return 0.0 if self.cost is None else self.cost.ms(rows)

    def _harms(self, chosen: Iterable[Job], rows: int, joined: int, now: float) -> bool:
        """Whether one of them meets its deadline with evaluations of so many rows, and with more does not."""
        return any(self._ms(rows) <= self._ms_left(job, now) < self._ms(joined) for job in chosen)

    def _ms_left(self, job: Job, now: float) -> float:
        """What each remaining evaluation may take."""
        return 1e3 * (job.deadline - now) / job.remaining
