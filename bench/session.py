"""What the cases of one benchmark run share: its options, opened models, built contenders, reference samples.

A contender that cannot be measured in a case is recorded as absent, with a status and the reason:

    absent     this machine or model lacks what the contender needs
    skipped    it would exceed the budget
    failed     it raised
    wrong      its samples differ from the float32 textbook loop's by more than its tolerance
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from skipstep.bench.contenders import REFERENCE, contenders_named
from skipstep.bench.contenders.workload import BuiltContender, Contender, Draw, Samples, Setup, Workload, to_numpy
from skipstep.bench.gate import described, golden_error, largest_difference
from skipstep.bench.measurements import MEASUREMENTS
from skipstep.bench.models import Subject, open_subject, subject_name
from skipstep.bench.options import CaseKey, Options
from skipstep.bench.resume import KeptResults

SCHEMA = 1
# Fewer rounds are no measurement.
MIN_ROUNDS = 3
# Before a call is timed, threads that the last one left waiting for more work fall asleep: of two libraries in one
# process, the idle one would otherwise take a core from the other.
REST_SECONDS = 0.1


class Absent(Exception):
    """A contender has no number in a case. `failed`: something is broken; otherwise it is only not available."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "wrong")


@dataclass(frozen=True)
class CheckedContender:
    """A contender whose samples were right, ready to be timed for so many `rounds`."""

    draw: Callable[[], object]
    rounds: int
    facts: Callable[[Sequence[float]], dict[str, Any]]
    before_round: Callable[[], None]


class BenchSession:
    """A context manager: it sets torch's threads and holds files until it ends."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.contenders = contenders_named(options.contenders)
        self._models = {subject_name(model): (model, sizes) for model, sizes in options.sized_models()}
        self._folder = TemporaryDirectory(prefix="skipstep-bench-")
        self._subjects: dict[str, Subject] = {}
        self._built: dict[tuple[str, str], tuple[BuiltContender, float] | Exception] = {}
        self._reference: tuple[CaseKey, Samples] | None = None
        self._textbook: tuple[CaseKey, Draw] | None = None
        self._seconds: dict[tuple[CaseKey, str], float] = {}
        self._absent: dict[tuple[CaseKey, str], Absent] = {}
        self.kept: KeptResults | None = None
        # Rows of the table that is printed at the end: case, contender, milliseconds, ratio, error.
        self.rows: list[list[str]] = []
        self._threads = torch.get_num_threads()

    def __enter__(self) -> BenchSession:
        torch.set_num_threads(self.options.threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        torch.set_num_threads(self._threads)
        self._folder.cleanup()

    def case_keys(self) -> list[CaseKey]:
        """All cases, smallest first: each tells how long the next will take."""
        return [
            CaseKey(model, steps, batch_size)
            for model, (_, sizes) in self._models.items()
            for batch_size in sizes
            for steps in self.options.steps
        ]

    def record(self, case: CaseKey, contender: str, absent: Absent) -> None:
        self._absent[case, contender] = absent

    def facts(self) -> dict[str, Any]:
        """What a result says of the whole run."""
        absent = [
            {"model": case.model, "contender": name, "steps": case.steps, "batch_size": case.batch_size}
            | {"status": found.status, "reason": found.reason}
            for (case, name), found in self._absent.items()
        ]
        options = {
            "models": self.options.models,
            "plans": self.options.steps,
            "batch": self.options.batch_sizes,
            "contenders": self.options.contenders,
            "budget": self.options.budget_seconds,
            "rounds": self.options.max_rounds,
            "measure": self.options.measure,
            "device": self.options.device,
            "dtype": self.options.dtype,
            "threads": self.options.threads,
        }
        digests = {name: subject.digest for name, subject in self._subjects.items()}
        return {"schema": SCHEMA, "absent": absent, "options": options, "digests": digests}

    def resume(self, kept: KeptResults) -> None:
        self.kept = kept
        for key, each in kept.benchmarks.items():
            # From what a case took, the time of larger ones is predicted.
            self._seconds[key] = statistics.median(each["stats"]["data"])

    def is_kept(self, case: CaseKey, contender: str) -> bool:
        """Whether the result that this run continues holds the case."""
        return self.kept is not None and self.kept.holds(case, contender, self.subject(case.model).digest)

    @contextlib.contextmanager
    def checked(self, case: CaseKey, name: str) -> Iterator[CheckedContender]:
        """A contender that may be timed in this case. Raises Absent, also for what the block raises."""
        contender = next(each for each in self.contenders if each.name == name)
        try:
            yield self._check(case, contender)
        except Absent:
            raise
        except Exception as error:  # Whatever a contender raises is its result; the others go on.
            raise Absent("failed", described(error)) from error

    def subject(self, model: str) -> Subject:
        if model not in self._subjects:
            self._subjects[model] = open_subject(self._models[model][0], folder=Path(self._folder.name))
        return self._subjects[model]

    def setup(self, model: str) -> Setup:
        options, subject = self.options, self.subject(model)
        return Setup(
            tuple(subject.plan(steps) for steps in options.steps),
            self._models[model][1],
            options.device,
            options.dtype,
            options.threads,
            options.compile_seconds,
            simulated=bool(options.simulated),
        )

    def _check(self, case: CaseKey, contender: Contender) -> CheckedContender:
        setup, subject = self.setup(case.model), self.subject(case.model)
        if reason := contender.lacks(subject, setup):
            raise Absent("absent", reason)
        if self.options.paired:
            self._fit_budget(self._predicted(case, contender.name) + self._predicted(case, REFERENCE))
        workload = Workload(subject, subject.plan(case.steps), case.batch_size)
        fresh = (contender.name, subject.name) not in self._built
        built, build_seconds = self._build(contender, subject)
        drawing = built.prepare(workload)

        def draw() -> Any:
            drawn = drawing()
            setup.accelerator.synchronize()
            return drawn + 1 if self.options.simulated == "wrong" else drawn

        first = draw()
        error, tolerance = self._gate(case, contender, workload, first)
        seconds = _timed(draw)
        self._seconds[case, contender.name] = seconds
        textbook = self._paired_with(case, contender, workload)
        a_round = seconds
        if self.options.paired:
            a_round += (_timed(textbook) if textbook else 0.0) + 2 * REST_SECONDS
            self._fit_budget(a_round)
        beside: list[float] = []

        def before_round() -> None:
            for call in (textbook, None) if self.options.paired else ():
                time.sleep(REST_SECONDS)
                if call is not None:
                    beside.append(_timed(call))

        def facts(data: Sequence[float]) -> dict[str, Any]:
            ratios = [1.0] * len(data) if contender.name == REFERENCE else _ratios(beside, data)
            found = {**self._facts(case, workload, contender, build_seconds, error, tolerance), "ratios": ratios}
            self.rows.append(_row(case, contender, data, ratios, error))
            if fresh and setup.on_gpu:
                found["peak_bytes"] = setup.accelerator.peak_bytes()
            return {**found, **built.facts(workload), **self._measured(case, workload, contender, draw)}

        rounds = max(MIN_ROUNDS, min(int(self.options.budget_seconds / a_round), self.options.max_rounds))
        return CheckedContender(draw, rounds, facts, before_round)

    def _facts(self, case: CaseKey, workload: Workload, contender: Contender, *numbers: float | None) -> dict[str, Any]:
        plan, setup = workload.plan, self.setup(case.model)
        build_seconds, error, tolerance = numbers
        return {
            "schema": SCHEMA,
            "model": case.model,
            "contender": contender.name,
            "plan": {"steps": case.steps, "solver": plan.solver, "key": plan.key},
            "batch_size": case.batch_size,
            "device": setup.accelerator.name if setup.on_gpu else "cpu",
            "precision": contender.precision or self.options.dtype,
            "threads": self.options.threads,
            "error": error,
            "tolerance": tolerance,
            "build_seconds": build_seconds,
        }

    def _measured(self, case: CaseKey, workload: Workload, contender: Contender, draw: Draw) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        steps = min((s for s in self.options.steps if s >= 10), default=self.options.steps[-1])
        if (case.steps, case.batch_size) == (steps, self._models[case.model][1][0]):
            for name in self.options.measure:
                facts |= MEASUREMENTS[name](contender, workload, self.setup(case.model), draw)
        return facts

    def _close(self, other_than: str = "") -> None:
        for key in [key for key in self._built if key[1] != other_than]:
            built = self._built.pop(key)
            if not isinstance(built, Exception):
                built[0].close()

    def _build(self, contender: Contender, subject: Subject) -> tuple[BuiltContender, float]:
        key = contender.name, subject.name
        if key not in self._built:
            self._close(other_than=subject.name)
            setup = self.setup(subject.name)
            setup.accelerator.forget_peak()
            started = time.perf_counter()
            try:
                built = contender.build(subject, setup)
                setup.accelerator.synchronize()
                self._built[key] = built, time.perf_counter() - started
            except Exception as error:  # The next case needs not try again.
                self._built[key] = error
        found = self._built[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _gate(
        self, case: CaseKey, contender: Contender, workload: Workload, drawn: Any
    ) -> tuple[float | None, float | None]:
        """(error, tolerance); raises Absent where the samples are wrong."""
        if not contender.draws:
            return None, None
        fewest = replace(case, steps=self.options.steps[0])
        if not self.options.paired and case != fewest:
            # What was wrong at the fewest steps gets no number at others.
            if wrong := self._absent.get((fewest, contender.name)):
                raise Absent(wrong.status, wrong.reason)
            if (fewest, contender.name) in self._seconds:
                return None, contender.tolerance_for(self.setup(case.model))
        if workload.subject.is_bundle:
            return golden_error(workload)
        error = largest_difference(to_numpy(drawn), self._reference_for(case, workload), contender)
        tolerance = contender.tolerance_for(self.setup(case.model))
        if not error <= tolerance:  # NaN is not.
            raise Absent("wrong", f"samples are off by {error:.2g} of their size, {tolerance:g} is allowed")
        return error, tolerance

    def _reference_for(self, case: CaseKey, workload: Workload) -> Samples:
        """The textbook loop's samples in float32."""
        if self._reference is None or self._reference[0] != case:
            setup = replace(self.setup(case.model), dtype="float32")
            built = contenders_named([REFERENCE])[0].build(workload.subject, setup)
            self._reference = case, to_numpy(built.prepare(workload)())
        return self._reference[1]

    def _paired_with(self, case: CaseKey, contender: Contender, workload: Workload) -> Draw | None:
        """The textbook loop in the run's own precision, for a round's ratio; none for itself and for bundles."""
        if not self.options.paired or contender.name == REFERENCE or workload.subject.is_bundle:
            return None
        if self._textbook is None or self._textbook[0] != case:
            built, _ = self._build(contenders_named([REFERENCE])[0], workload.subject)
            drawing, synchronize = built.prepare(workload), self.setup(case.model).accelerator.synchronize
            self._textbook = case, lambda: (drawing(), synchronize())
        return self._textbook[1]

    def _fit_budget(self, a_round: float) -> None:
        needed = (MIN_ROUNDS + 1) * a_round
        if needed > self.options.budget_seconds:
            raise Absent(
                "skipped", f"the case would take {needed:.0f} s, and its budget is {self.options.budget_seconds:g} s"
            )

    def _predicted(self, case: CaseKey, contender: str) -> float:
        """Seconds of one call, in proportion to the nearest smaller case that was measured; 0 where none was."""
        smaller = [
            (each.batch_size, each.steps, seconds)
            for (each, name), seconds in self._seconds.items()
            if (each.model, name) == (case.model, contender)
            if each.batch_size <= case.batch_size and each.steps <= case.steps
        ]
        if not smaller:
            return 0.0
        batch_size, steps, seconds = max(smaller)
        return seconds * (case.batch_size / batch_size) * (case.steps / steps)


def _row(
    case: CaseKey, contender: Contender, data: Sequence[float], ratios: Sequence[float], error: float | None
) -> list[str]:
    numbers = (
        f"{statistics.median(data) * 1e3:.3f}" if data else "",
        f"{statistics.median(ratios):.2f}" if ratios else "",
    )
    return [case.group, contender.name, *numbers, "" if error is None else f"{error:.1g}"]


def _ratios(textbook: Sequence[float], own: Sequence[float]) -> list[float]:
    return [t / o for t, o in zip(textbook, own, strict=True)] if textbook and own else []


def _timed(draw: Callable[[], object]) -> float:
    started = time.perf_counter()
    draw()
    return time.perf_counter() - started
