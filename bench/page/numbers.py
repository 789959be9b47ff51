"""What a report says in numbers, worked out from runs: medians, fits, ratios, shares of time, and plans with both.

latency(S) = a + b·S       a: once a call; b: each step
network / steps / call     the median, split by what the network alone leaves over, and that by a of the fit
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from skipstep.bench.fits import fit_line
from skipstep.bench.page.inputs import MachineGroup, is_finite
from skipstep.bench.page.quality import QualityPoint
from skipstep.bench.results import REFERENCE, Case, Contender
from skipstep.latency.calibration import nearest_rank

# The engine that people get if they ask for nothing: the device's whole loop, else the processor's.
OUR_DEFAULTS: Final = ("skipstep-captured", "skipstep-step-graph", "skipstep-onnx")
DIFFUSERS: Final = "diffusers"
# Of a fit, as a share of the medians.
WORST_FIT: Final = 0.10
_FEWEST_POINTS: Final = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """Seconds of a call: `fixed` once, `per_step` for each step. `residual`: the relative error, as rms."""

    fixed: float
    per_step: float
    residual: float

    def seconds(self, steps: float) -> float:
        return self.fixed + self.per_step * steps


@dataclass(frozen=True, slots=True)
class Panel:
    """The cases that differ in their number of steps alone: what one plot shows."""

    model: str
    batch_size: int
    dtype: str
    cases: tuple[Case, ...]

    @property
    def title(self) -> str:
        return f"{self.model}, batch {self.batch_size}" + ("" if self.dtype == "float32" else f", {self.dtype}")

    def measured(self, name: str) -> list[tuple[Case, Contender]]:
        """The cases in which contender `name` has a number, by steps."""
        found = [(case, case.contender(name)) for case in self.cases]
        return [(case, each) for case, each in found if each is not None and each.status == "ok"]

    def medians(self, name: str) -> list[tuple[int, float]]:
        return [(case.steps, median(each)) for case, each in self.measured(name)]

    def ratios(self, name: str) -> list[tuple[int, float]]:
        return [(case.steps, each.ratio) for case, each in self.measured(name) if each.ratio is not None]


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan that a product can take: its time here and what its samples are worth. `estimated`: time from the fit."""

    label: str
    steps: int
    p50: float
    p99: float | None
    quality: QualityPoint
    estimated: bool


@dataclass(frozen=True, slots=True)
class TimeParts:
    """Seconds of one call of the default engine: in the network, in the loop's steps around it, and once a call."""

    steps: int
    network: float
    around: float
    once: float

    @property
    def total(self) -> float:
        return self.network + self.around + self.once


def panels(group: MachineGroup) -> list[Panel]:
    by: dict[tuple[str, str, int], list[Case]] = {}
    for case in group.cases():
        by.setdefault((case.model, case.dtype, case.batch_size), []).append(case)
    return [Panel(model, batch, dtype, tuple(cases)) for (model, dtype, batch), cases in by.items()]


def contender_names(cases: Sequence[Case]) -> list[str]:
    """Names of all that have a number somewhere: the reference first, then in the order of the file."""
    names = dict.fromkeys(each.name for case in cases for each in case.contenders if each.status == "ok")
    return sorted(names, key=lambda name: name != REFERENCE)


def favourite(names: Sequence[str]) -> str | None:
    """Which contender stands for skipstep in headlines."""
    known = [name for name in OUR_DEFAULTS if name in names]
    return next(iter(known + [name for name in names if name.startswith("skipstep")]), None)


def median(contender: Contender) -> float:
    return statistics.median(contender.seconds)


def fit(points: Sequence[tuple[int, float]]) -> Fit | None:
    """The line through medians; None for fewer than three step counts, through which any line would go."""
    if len(points) < _FEWEST_POINTS:
        return None
    return Fit(*fit_line(points))


def fit_of(group: MachineGroup, panel: Panel, name: str) -> Fit | None:
    """The fit that the newest run recorded for a contender, else one through the medians shown.

    None where medians stray from it by more than WORST_FIT: a line is the wrong shape then, or the machine was busy.
    """
    line = _recorded_fit(group, panel, name) or fit(panel.medians(name))
    return line if line is not None and line.residual <= WORST_FIT else None


def _recorded_fit(group: MachineGroup, panel: Panel, name: str) -> Fit | None:
    for run in reversed(group.runs):
        for each in _records(run.measurements.get("fits")):
            of = (each.get("model"), each.get("batch_size"), each.get("contender"), each.get("dtype"))
            found = [each.get(key) for key in ("fixed_seconds", "per_step_seconds", "residual")]
            numbers = [float(value) for value in found if is_finite(value)]
            points = each.get("points")
            if (
                of == (panel.model, panel.batch_size, name, panel.dtype)
                and len(numbers) == len(found)
                and isinstance(points, list)
                and len(points) >= _FEWEST_POINTS
            ):
                return Fit(*numbers)
    return None


def _records(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list | tuple) else []


def compared(panel: Panel, names: Sequence[str]) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """What a panel's ratios refer to, and each contender's by steps: how many times as fast.

    Where nobody took turns with the textbook loop, as on a GPU whose contenders have a process each, medians are
    compared with those of diffusers instead.
    """
    turns = {name: panel.ratios(name) for name in names if name != REFERENCE}
    if any(turns.values()):
        return REFERENCE, {name: points for name, points in turns.items() if points}
    theirs = dict(panel.medians(DIFFUSERS))
    medians = {
        name: [(steps, theirs[steps] / seconds) for steps, seconds in panel.medians(name) if steps in theirs]
        for name in names
        if name != DIFFUSERS
    }
    return DIFFUSERS, {name: points for name, points in medians.items() if points}


def speedups(panel: Panel, name: str, against: str) -> list[float]:
    """By case: how many times as fast as another contender, from the ratios that both have to the reference."""
    theirs = {case.steps: each.ratio for case, each in panel.measured(against)}
    pairs = [(each.ratio, theirs.get(case.steps)) for case, each in panel.measured(name)]
    return [ours / other for ours, other in pairs if ours is not None and other is not None]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def choices(group: MachineGroup, panel: Panel, name: str, quality: Sequence[QualityPoint]) -> list[Choice]:
    """Evaluated plans with their time in `panel`: measured where the very plan was run, else from the fit.

    A plan's key is a hash of all that changes its result, so equal keys are the same plan. The fit is asked for nothing
    outside the step counts that were run.
    """
    measured = {case.plan: each for case, each in panel.measured(name)}
    of_plan = {point.plan: point for point in quality}
    line = fit_of(group, panel, name)
    counts = [case.steps for case in panel.cases]
    found = []
    for point in of_plan.values():
        if (contender := measured.get(point.plan)) is not None:
            p99 = nearest_rank(contender.seconds, 99)
            found.append(Choice(point.label, point.steps, median(contender), p99, point, estimated=False))
        elif line is not None and min(counts) <= point.steps <= max(counts):
            seconds = line.seconds(point.steps)
            found.append(Choice(point.label, point.steps, seconds, None, point, estimated=True))
    # Estimates alone would be a curve that nobody measured.
    found.sort(key=lambda each: (each.p50, each.quality.distance))
    return found if any(not each.estimated for each in found) else []


def cold_start(group: MachineGroup) -> Mapping[str, Any] | None:
    """Seconds from process start to first image: the newest run's own, else those of a file of their own."""
    for found in (*(run.measurements.get("cold_start") for run in reversed(group.runs)), group.cold_start):
        if isinstance(found, Mapping) and isinstance(seconds := found.get("median_seconds"), Mapping):
            numbers = (seconds.get("bundle"), seconds.get("diffusers"), found.get("ratio_to_diffusers"))
            if all(map(is_finite, numbers)):
                return found
    return None


def time_parts(group: MachineGroup, panel: Panel, name: str) -> list[TimeParts]:
    """The parts of each case of `panel` for which the network's own time is known."""
    line = fit_of(group, panel, name)
    parts = []
    for case, contender in panel.measured(name):
        total = median(contender)
        share = _share_outside(group, case, total)
        if share is None:
            continue
        # Where it is negative, the network alone took longer: noise.
        outside = min(max(share, 0.0), 1.0) * total
        once = 0.0 if line is None else min(max(line.fixed, 0.0), outside)
        parts.append(TimeParts(case.steps, total - outside, outside - once, once))
    return parts


def _share_outside(group: MachineGroup, case: Case, total: float) -> float | None:
    """Of the case itself, else by the seconds of one run of the network alone, which a GPU's run holds apart."""
    if case.outside_network is not None:
        return case.outside_network
    for run in reversed(group.runs):
        for each in _records(run.measurements.get("networks")):
            seconds = each.get("seconds")
            if (each.get("model"), each.get("batch_size")) == (case.model, case.batch_size) and is_finite(seconds):
                return 1.0 - case.steps * seconds / total
    return None
