"""What the report says in numbers, worked out from runs: panels, fits, shares of time, and plans with their quality.

latency(S) = a + b·S                         a: once a call; b: each step
outside the network = 1 - network / ours     the median over rounds
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from skipstep.bench.fits import Fit, fit_line
from skipstep.bench.result_files import REFERENCE, Entry, Run
from skipstep.errors import InputError

DIFFUSERS: Final = "diffusers"
NETWORK: Final = "network"
# The first of these that was measured is what skipstep runs by default on that device.
_DEFAULTS: Final = ("skipstep-captured", "skipstep-step-graph", "skipstep-stepwise", "skipstep")
# A plot shows ours and the first four of these; all others are in the tables.
_DRAWN: Final = (REFERENCE, DIFFUSERS, "onnxruntime", "openvino", "diffusers-compile", "skipstep-compiled", NETWORK)
_MOST_OTHERS: Final = 4
# What the name of a panel does not say.
_USUAL: Final = ("float32", "ddim", "cpu")
# Of a fit, as a share of the medians.
_WORST_FIT: Final = 0.10
_NAMES: Final = {"heun": "Heun", "rk4": "Runge-Kutta 4", "dpm_solver_2": "DPM-Solver-2",
                 "dpm_solver_pp_2m": "DPM-Solver++ 2M", "ddpm": "DDPM's larger noise (σ̂)"}  # fmt: skip
# Of what skipstep evaluate writes: the file, and the tables whose plans have the usual spacing.
ROWS: Final = "rows.json"
_TABLES: Final = ("steps and η", "solvers")


@dataclass(frozen=True, slots=True)
class Panel:
    """The entries that differ in contender and number of steps alone, ordered by steps: what one plot shows.

    `subject` names the network, and the precision, the solver and the device where they are not the usual ones.
    """

    subject: str
    batch_size: int
    entries: tuple[Entry, ...]

    @property
    def title(self) -> str:
        return f"{self.subject}, batch {self.batch_size}"

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(entry.contender for entry in self.entries))

    @property
    def ours(self) -> str | None:
        return next((name for name in _DEFAULTS if name in self.names), None)

    def drawn(self) -> list[str]:
        """At most four contenders and ours, each with more than one number of steps; none without ours."""
        names = [name for name in self.names if len(self.of(name)) > 1]
        others = [name for name in dict.fromkeys((*_DRAWN, *names)) if name in names and name != self.ours]
        return [*others[:_MOST_OTHERS], self.ours] if self.ours in names else []

    def of(self, name: str | None) -> dict[int, Entry]:
        """One contender's entries by steps."""
        return {entry.steps: entry for entry in self.entries if entry.contender == name}

    def fit(self, name: str | None) -> Fit | None:
        """The line through a contender's medians, by relative least squares.

        None for fewer than three medians, and where they stray from the line by more than a tenth.
        """
        found = self.of(name)
        if len(found) < 3:
            return None
        line = fit_line([(steps, entry.median) for steps, entry in found.items()])
        return line if line.residual <= _WORST_FIT else None

    def faster(self, name: str | None, against: str = REFERENCE) -> dict[int, float]:
        """How many times as fast as another contender, by steps: of each, the median of its ratios to the textbook
        loop's calls in the same rounds."""
        mine, others = (
            {s: statistics.median(entry.ratios) for s, entry in self.of(each).items() if entry.ratios}
            for each in (name, against)
        )
        return {s: mine[s] / others[s] for s in mine if s in others}


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Each case once, as the newest run has it."""
    groups: dict[tuple[str, int], dict[tuple[str, str], Entry]] = {}
    for entry in (entry for run in runs for entry in run.entries):
        unusual = [each for each in (entry.precision, entry.solver, entry.device) if each not in _USUAL]
        subject = ", ".join([entry.model, *unusual])
        groups.setdefault((subject, entry.batch_size), {})[entry.contender, entry.key] = entry
    subjects = list(dict.fromkeys(subject for subject, _ in groups))
    ordered = sorted(groups.items(), key=lambda item: (subjects.index(item[0][0]), item[0][1]))
    return [Panel(*key, tuple(sorted(of.values(), key=lambda entry: entry.steps))) for key, of in ordered]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


@dataclass(frozen=True, slots=True)
class Quality:
    """A row of skipstep evaluate: what a plan's samples are worth."""

    key: str
    label: str
    steps: int
    samples: int
    distance: float
    recognised: float


def read_quality(folder: Path) -> list[Quality]:
    """The plans by step count, eta and solver, without guidance, of a folder that skipstep evaluate wrote."""
    path = folder / ROWS
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"].values()
        found = [_quality(row) for row in rows if row.get("table") in _TABLES and row["guidance"] == 1.0]
        if not found or not all(math.isfinite(each.distance + each.recognised) for each in found):
            raise ValueError("no rows, or a number that is not finite")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        got, remedy = f"{path}, which is no table of an evaluation ({error})", "run it again, or correct --evaluation"
        raise InputError(got=got, expected="what skipstep evaluate writes", remedy=remedy) from error
    return found


def _quality(row: dict[str, Any]) -> Quality:
    label = _NAMES.get(row["solver"]) or f"DDIM, η = {row['eta']:g}"
    recognised = row["recognised"]["value"] if row["recognised"] else 0.0
    return Quality(row["key"], label, row["evaluations"], row["samples"], row["frechet"]["value"], recognised)


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan that can be taken: its time here and its quality. `p99` is None where the time is estimated by the fit."""

    quality: Quality
    p50: float
    p99: float | None


def choices(panel: Panel, quality: Sequence[Quality]) -> list[Choice]:
    """Evaluated plans with our time: measured where that plan was run, else from the fit, within the step counts of
    the panel. Estimates alone would be a curve that was never measured."""
    found = panel.of(panel.ours)
    timed, line = {entry.key: entry for entry in found.values()}, panel.fit(panel.ours)
    plans = []
    for point in quality:
        if (entry := timed.get(point.key)) is not None:
            plans.append(Choice(point, entry.median, entry.percentile(99)))
        elif line is not None and min(found) <= point.steps <= max(found):
            plans.append(Choice(point, line.fixed + line.per_step * point.steps, None))
    plans.sort(key=lambda each: (each.p50, each.quality.distance))
    return plans if any(each.p99 is not None for each in plans) else []


def efficient(plans: Sequence[Choice]) -> list[Choice]:
    """The plans, sorted by time, that are better than all faster ones."""
    best: list[Choice] = []
    for each in plans:
        if not best or each.quality.distance < best[-1].quality.distance:
            best.append(each)
    return best
