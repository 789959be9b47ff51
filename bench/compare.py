"""The regression gate: a run against a baseline of the same machine class, by ratios to the textbook loop.

    ratio r     of a round: seconds of the textbook loop / seconds of the contender, next to each other in one process
    slowdown    median(r before) / median(r now) − 1: how much more of the textbook's time a call takes than it did
    interval    95 % of what the slowdown would have been with other rounds (bootstrap: rounds drawn again with
                replacement, on both sides, from a fixed seed, so the same two files give the same verdict)

A contender is slower if its slowdown is beyond the limit, and its interval above zero: both large, and more than the
noise between rounds can explain. A slowdown beyond the limit whose interval reaches zero is unclear.

Rounds of one process cannot show how one process differs from the next (where its memory lies, which threads got which
core). So a contender that may be slower, because its slowdown is beyond half the limit or its interval reaches the
limit, is measured once more in another process with more rounds. That second measurement alone decides: the first was
picked for looking bad.

Ratios survive a machine that is slow, not one whose cores are all taken: threads that wait for each other at every
layer then lose more than others do, torch's most of all: on two cores with ten processes waiting for them, ratios rise
to fifteen times what they are. If the textbook loop took several times what it took in the baseline, there is no
verdict.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from skipstep.bench.result_files import REFERENCE, Absence, Entry, Run, read_runs
from skipstep.errors import InputError

LIMIT: Final = 0.10
# The contenders that may fail the gate for being slower. Others are compared and listed.
GATED: Final = ("skipstep*",)
MIN_ROUNDS: Final = 3
# How much slower or faster the textbook loop may be than in the baseline: processors of one class differ by less.
MACHINE_FACTOR: Final = 3.0
_RESAMPLES: Final = 2000
_SEED: Final = 0

Verdict = Literal["slower", "unclear", "steady", "faster", "broken", "skipped", "lost", "new", "unmeasured"]


@dataclass(frozen=True, slots=True)
class Change:
    """One contender of one case, before and now.

    slower, unclear, steady, faster   see the module; `slowdown` and `interval` are set for these alone.
    broken       it had numbers, and now it fails or its samples are wrong; `reason` says which.
    skipped      it is gated, had numbers, and would now exceed the budget: what the gravest slowdown looks like.
    lost, new    only the baseline, only the result has numbers for it; not a failure.
    unmeasured   both have numbers, but there are no ratios to compare; `reason` says why.
    `gated`: slower is a failure. `again`: the numbers are those of the second measurement.
    """

    case: str
    contender: str
    verdict: Verdict
    gated: bool = False
    ratio_before: float | None = None
    ratio_now: float | None = None
    slowdown: float | None = None
    interval: tuple[float, float] | None = None
    rounds: int = 0
    again: bool = False
    reason: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict in ("broken", "skipped") or (self.verdict == "slower" and self.gated)

    def suspicious(self, limit: float) -> bool:
        """Whether it may be slower, so that another measurement is worth its time."""
        if self.slowdown is None or self.interval is None:
            return self.verdict in ("skipped", "unmeasured")
        return self.slowdown > limit / 2 or self.interval[1] > limit


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every contender that either run has numbers for. `differences` are versions and settings that are not equal,
    as (name, before, now); `only_before` and `only_now` name the cases that the other run lacks."""

    limit: float
    baseline_commit: str
    result_commit: str
    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_now: tuple[str, ...]
    differences: tuple[tuple[str, str, str], ...]

    @property
    def failures(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.failed)

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Case:
    """What a run says of one case: the contenders with numbers, and those without."""

    name: str
    entries: dict[str, Entry]
    absent: dict[str, Absence]

    def status(self, contender: str) -> str:
        """ "ok", a status of skipstep.bench.session, or "" for a contender that was not measured."""
        if contender in self.entries:
            return "ok"
        return self.absent[contender].status if contender in self.absent else ""


def cases_of(run: Run) -> dict[str, Case]:
    """By name, in the run's order. Raises InputError for a contender that is measured twice in a case."""
    found: dict[str, Case] = {}
    measured: tuple[Entry | Absence, ...] = (*run.entries, *run.absent)
    for each in measured:
        name = f"{each.model}, {each.steps} steps, batch {each.batch_size}"
        case = found.setdefault(name, Case(name, {}, {}))
        if case.status(each.contender):
            raise InputError(
                got=f"a run with {each.contender} ({name}) twice",
                expected="each contender once in a case",
                remedy="measure it again in one run",
            )
        if isinstance(each, Entry):
            case.entries[each.contender] = each
        else:
            case.absent[each.contender] = each
    return found


def compare_runs(
    baseline: Run,
    result: Run,
    *,
    limit: float = LIMIT,
    gated: Sequence[str] = GATED,
    measure_again: Callable[[Case], Case] | None = None,
) -> Comparison:
    """Compare case by case. `gated` are patterns of contenders' names; `measure_again` measures a case of `result` once
    more, with more rounds. Raises InputError for runs of different machine classes, and for runs that have no gated
    contender in common."""
    _check_comparable(baseline, result, limit)
    before, now = cases_of(baseline), cases_of(result)
    changes: list[Change] = []
    for name in [name for name in before if name in now]:
        found = compare_cases(before[name], now[name], limit=limit, gated=gated)
        if measure_again is not None and any(each.gated and each.suspicious(limit) for each in found):
            found = compare_cases(before[name], measure_again(now[name]), limit=limit, gated=gated, again=True)
        changes += found
    comparison = Comparison(
        limit,
        baseline.commit,
        result.commit,
        tuple(changes),
        tuple(name for name in before if name not in now),
        tuple(name for name in now if name not in before),
        _differences(baseline, result),
    )
    if comparison.passed and not any(each.gated and each.slowdown is not None for each in changes):
        why = "".join(f"; {each.contender}: {each.reason}" for each in changes if each.gated and each.reason)
        raise InputError(
            got=f"runs without a contender in common that could be compared and is named {' or '.join(gated)}{why}",
            expected="at least one: a gate that guards nothing must not pass",
            remedy="measure the same models, plans, batch sizes and contenders as the baseline on a machine that does "
            "nothing else, or make a new baseline",
        )
    return comparison


def compare_cases(
    before: Case, now: Case, *, limit: float = LIMIT, gated: Sequence[str] = GATED, again: bool = False
) -> list[Change]:
    """One change for each contender that has numbers in either."""
    changes = []
    for name in dict.fromkeys([*before.entries, *now.entries]):
        old, new, status = before.entries.get(name), now.entries.get(name), now.status(name)
        is_gated = any(fnmatchcase(name, pattern) for pattern in gated)
        facts: dict[str, Any] = {}
        if old is None:
            facts["verdict"] = "new"
        elif new is None:
            broken = status in ("failed", "wrong") or (status == "skipped" and is_gated)
            facts["verdict"] = ("skipped" if status == "skipped" else "broken") if broken else "lost"
            facts["reason"] = f"{status}: {now.absent[name].reason}" if status else "not measured"
        elif name == REFERENCE or not (old.ratios or new.ratios):
            continue
        elif reason := _no_comparison(old, new):
            facts |= {"verdict": "unmeasured", "reason": reason}
        else:
            facts = _judged(old.ratios, new.ratios, limit)
        changes.append(Change(now.name, name, gated=is_gated, again=again, **facts))
    return changes


def slowdown_interval(before: Sequence[float], now: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the slowdown over resampled rounds; `before` and `now` are the ratios of single rounds."""
    rng = np.random.default_rng(_SEED)
    medians = [
        np.median(np.asarray(ratios)[rng.integers(0, len(ratios), (_RESAMPLES, len(ratios)))], axis=1)
        for ratios in (before, now)
    ]
    low, high = np.quantile(medians[0] / medians[1] - 1.0, (0.025, 0.975))
    return float(low), float(high)


def baseline_path(baseline: Path, machine_class: str) -> Path:
    """Where the baseline of that machine class is: `baseline` itself where it names a JSON file, else a file in that
    folder whose name is the class in small letters and digits, with dashes for all else."""
    if baseline.suffix == ".json":
        return baseline
    return baseline / (re.sub(r"[^a-z0-9]+", "-", machine_class.lower()).strip("-") + ".json")


def read_baseline(baseline: Path, result: Run, *, result_path: Path) -> Run:
    """The stored baseline for that result. Raises InputError where there is none, with the command that makes it."""
    path = baseline_path(baseline, result.machine)
    if not path.exists():
        raise InputError(
            got=f"no baseline {path} for the machine class {result.machine!r}",
            expected="a run that was stored on a machine of this class",
            remedy=f"store this result as the baseline: skipstep compare {baseline} {result_path} --accept",
        )
    return read_run(path)


def read_run(path: Path) -> Run:
    """One run. Raises InputError for anything else."""
    (run,), _ = read_runs([path])
    return run


def _judged(before: Sequence[float], now: Sequence[float], limit: float) -> dict[str, Any]:
    ratio_before, ratio_now = statistics.median(before), statistics.median(now)
    slowdown = ratio_before / ratio_now - 1.0
    low, high = slowdown_interval(before, now)
    verdict: Verdict = "steady"
    if slowdown > limit:
        verdict = "slower" if low > 0.0 else "unclear"
    elif 1.0 + slowdown < 1.0 / (1.0 + limit) and high < 0.0:
        verdict = "faster"
    return {
        "verdict": verdict,
        "ratio_before": ratio_before,
        "ratio_now": ratio_now,
        "slowdown": slowdown,
        "interval": (low, high),
        "rounds": len(now),
    }


def _no_comparison(before: Entry, now: Entry) -> str:
    """Why the ratios of these rounds are not to be compared; empty where they are."""
    if min(len(before.ratios), len(now.ratios)) < MIN_ROUNDS:
        return f"fewer than {MIN_ROUNDS} rounds beside the {REFERENCE} loop"
    textbook = [
        statistics.median(ratio * own for ratio, own in zip(each.ratios, each.data, strict=True))
        for each in (before, now)
    ]
    factor = textbook[1] / textbook[0]
    if not 1.0 / MACHINE_FACTOR <= factor <= MACHINE_FACTOR:
        return f"the {REFERENCE} loop took {factor:.2g} times as long as in the baseline: is the machine busy?"
    return ""


def _check_comparable(baseline: Run, result: Run, limit: float) -> None:
    if not 0.0 < limit < 1.0:
        raise InputError(got=f"a limit of {limit:.0%}", expected="between 0 and 100 %", remedy="leave it at 10 %")
    if baseline.machine != result.machine:
        raise InputError(
            got=f"a result of the machine class {result.machine!r} and a baseline of {baseline.machine!r}",
            expected="one machine class: even ratios differ between processors",
            remedy="compare with a baseline of this class; keep them in a folder, and the right one is found there",
        )


def _differences(baseline: Run, result: Run) -> tuple[tuple[str, str, str], ...]:
    """What may explain a change that the code does not."""
    before, now = _facts(baseline), _facts(result)
    return tuple(
        (name, before.get(name, "none"), now.get(name, "none"))
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    )


def _facts(run: Run) -> dict[str, str]:
    facts = {name: str(value) for name, value in run.versions.items()}
    facts |= {name: str(value) for name, value in run.options.items() if name in ("threads", "device")}
    return facts | {f"digest of {model}": str(digest)[:16] for model, digest in run.digests.items()}
