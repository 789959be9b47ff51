"""A benchmark run: models, step counts and batch sizes, a contest each (skipstep.bench.contest), smallest first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from skipstep.bench.contenders import CONTENDERS, contenders_named
from skipstep.bench.contenders.workload import Built, ContenderKind, Setup, Workload
from skipstep.bench.contest import MIN_ROUNDS, Contest
from skipstep.bench.journal import Journal
from skipstep.bench.models import Subject, open_subject
from skipstep.bench.results import Case
from skipstep.errors import InputError


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. `contenders` in order of importance, none for all; `budget_seconds` is for a case, all together.

    Raises InputError for numbers that are not positive, and for unknown contenders.
    """

    models: tuple[str, ...] = ("fashion-mnist",)
    steps: tuple[int, ...] = (10,)
    batch_sizes: tuple[int, ...] = (1,)
    contenders: tuple[str, ...] = ()
    budget_seconds: float = 60.0
    max_rounds: int = 15
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0
    compile_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name, values in {
            "plans": self.steps,
            "batch": self.batch_sizes,
            "budget": (self.budget_seconds,),
            "rounds": (self.max_rounds,),
        }.items():
            if not values or any(value <= 0 for value in values):
                raise InputError(
                    got=f"{name} {', '.join(map(str, values)) or 'none'}",
                    expected="positive numbers",
                    remedy=f"pass e.g. --{name} {'30' if name == 'budget' else '1,10'}",
                )
        object.__setattr__(self, "contenders", self.contenders or tuple(CONTENDERS))
        contenders_named(self.contenders)
        object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(self.batch_sizes))))
        object.__setattr__(self, "models", tuple(dict.fromkeys(self.models)))
        object.__setattr__(self, "max_rounds", max(self.max_rounds, MIN_ROUNDS))
        object.__setattr__(self, "threads", self.threads or torch.get_num_threads())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """The run under way. `case` measures one, or gives the one that the journal holds; cases of one model come
    smallest first, as each tells how long the next will take. A context manager: it holds files until it ends."""

    def __init__(self, options: Options, *, progress: Callable[[str], None] | None = None) -> None:
        self.options = options
        self.progress = progress or (lambda message: None)
        self._folder = TemporaryDirectory(prefix="skipstep-bench-")
        self.kinds = contenders_named(options.contenders)
        self.subjects = {
            subject.name: subject
            for subject in (open_subject(model, folder=Path(self._folder.name)) for model in options.models)
        }
        self.cases: dict[tuple[str, int, int], Case] = {}
        self._journal: Journal | None = None
        self._built: dict[tuple[str, str], tuple[Built, float] | Exception] = {}
        self._threads = torch.get_num_threads()
        torch.set_num_threads(options.threads)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        self._folder.cleanup()

    @property
    def digests(self) -> dict[str, str]:
        """Of the models' weights and configurations, by name."""
        return {name: subject.digest for name, subject in self.subjects.items()}

    def keep_journal(self, journal: Journal) -> None:
        """Go on from what `journal` holds, and keep every case that is measured from here on."""
        self._journal = journal
        self.cases = journal.cases

    def case_keys(self) -> Iterator[tuple[str, int, int]]:
        """(model, steps, batch size) of all cases, in the order in which to measure them."""
        for model in self.subjects:
            for batch_size in self.options.batch_sizes:
                for steps in self.options.steps:
                    yield model, steps, batch_size

    def setup(self, subject: Subject) -> Setup:
        options = self.options
        return Setup(
            tuple(subject.plan(steps) for steps in options.steps),
            options.batch_sizes,
            options.device,
            options.dtype,
            options.threads,
            options.compile_seconds,
        )

    def built(self, kind: ContenderKind, subject: Subject) -> tuple[Built, float]:
        """A contender with its network in hand, and the seconds that took. What its building raised, it raises."""
        key = kind.name, subject.name
        if key not in self._built:
            self.progress(f"build {kind.name} for {subject.name}")
            started = time.perf_counter()
            try:
                self._built[key] = kind.build(subject, self.setup(subject)), time.perf_counter() - started
            except Exception as error:  # Whatever a contender raises is its result; the others go on.
                self._built[key] = error
        found = self._built[key]
        if isinstance(found, Exception):
            raise found
        return found

    def case(self, model: str, steps: int, batch_size: int) -> Case:
        key = model, steps, batch_size
        if key not in self.cases:
            subject = self.subjects[model]
            contest = Contest(
                Workload(subject, subject.plan(steps), batch_size),
                self.setup(subject),
                self.kinds,
                build=lambda kind: self.built(kind, subject),
                predicted={kind.name: self.predicted(model, steps, batch_size, kind.name) for kind in self.kinds},
                budget_seconds=self.options.budget_seconds,
                max_rounds=self.options.max_rounds,
            )
            self.progress(f"{model}, {steps} steps, batch {batch_size}")
            measured = contest.hold()
            self.cases[key] = measured
            if self._journal is not None:
                self._journal.keep(measured)
        return self.cases[key]

    def predicted(self, model: str, steps: int, batch_size: int, contender: str) -> float:
        """Seconds of one call, in proportion to the nearest smaller case that was measured; 0 where none was."""
        smaller = [
            (case.batch_size, case.steps, found.seconds)
            for case in self.cases.values()
            if case.model == model and case.batch_size <= batch_size and case.steps <= steps
            if (found := case.contender(contender)) is not None and found.seconds
        ]
        if not smaller:
            return 0.0
        nearest_batch, nearest_steps, seconds = max(smaller, key=lambda each: each[:2])
        return statistics.median(seconds) * (batch_size / nearest_batch) * (steps / nearest_steps)
