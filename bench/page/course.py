"""How ratios to the textbook loop moved over commits, and which left the band of the regression gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from skipstep.bench.page.inputs import MachineGroup, identity
from skipstep.bench.page.numbers import geometric_mean
from skipstep.bench.results import Run

# By how much a ratio to the textbook loop may move before the regression gate calls it a change.
BAND: Final = 0.10


@dataclass(frozen=True, slots=True)
class Course:
    """Ratios to the textbook loop over runs, each divided by the first run's: 1 is unchanged.

    `by_batch` holds the geometric mean over the step counts that all runs share; `moved` the cases whose last ratio is
    outside the band: name, first and last ratio. `num_cases` are shared by all runs.
    """

    model: str
    commits: tuple[str, ...]
    num_cases: int
    by_batch: Mapping[int, tuple[float, ...]]
    moved: tuple[tuple[str, float, float], ...]


def courses(group: MachineGroup, name: str) -> list[Course]:
    """How `name`'s ratios moved, a course a model, over the cases that all runs with that model share."""
    found = []
    for model in dict.fromkeys(case.model for case in group.cases()):
        runs = [(run, _ratios(run, model, name)) for run in group.runs]
        runs = [(run, ratios) for run, ratios in runs if ratios]
        if len(runs) < 2:
            continue
        shared = [key for key in runs[-1][1] if all(key in ratios for _, ratios in runs)]
        if not shared:
            continue
        first, last = runs[0][1], runs[-1][1]
        by_batch = {
            batch: tuple(
                geometric_mean([ratios[key] / first[key] for key in shared if key[2] == batch]) for _, ratios in runs
            )
            for batch in sorted({key[2] for key in shared})
        }
        moved = tuple(
            (f"{key[1]} step{'s' if key[1] > 1 else ''}, batch {key[2]}, {key[3]}", first[key], last[key])
            for key in shared
            if not 1 - BAND <= last[key] / first[key] <= 1 + BAND
        )
        commits = tuple(str(run.environment.get("commit", "unknown")) for run, _ in runs)
        found.append(Course(model, commits, len(shared), by_batch, moved))
    return found


def _ratios(run: Run, model: str, name: str) -> dict[tuple[str, int, int, str], float]:
    found = {}
    for case in run.cases:
        contender = case.contender(name)
        if case.model == model and contender is not None and contender.ratio is not None:
            found[identity(case)] = contender.ratio
    return found
