"""What the latency tasks found, as one benchmark run (skipstep.bench.results): written by each, merged by the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipstep.bench.fits import fits_as_json
from skipstep.bench.gpu.provenance import gate_environment
from skipstep.bench.gpu.tasks import Verdict
from skipstep.bench.results import Case, Contender, Run, read_run, write_run

_LISTS = ("captures", "jitter", "networks")


@dataclass(slots=True)
class Found:
    """By (network, steps, batch size) and contender; `captures`, `jitter` and `networks` become measurements.

    `networks`: seconds of the network alone, replayed as a graph. `plans`: keys by (network, steps).
    """

    dtype: str
    contenders: dict[tuple[str, int, int], dict[str, Contender]] = field(default_factory=dict)
    plans: dict[tuple[str, int], str] = field(default_factory=dict)
    captures: list[dict[str, Any]] = field(default_factory=list)
    jitter: list[dict[str, Any]] = field(default_factory=list)
    networks: list[dict[str, Any]] = field(default_factory=list)

    def put(self, model: str, batch_size: int, results: dict[int, Contender]) -> None:
        for steps, contender in results.items():
            self.contenders.setdefault((model, steps, batch_size), {})[contender.name] = contender

    def has(self, model: str, batch_size: int, name: str) -> bool:
        return any(key[0] == model and key[2] == batch_size and name in held for key, held in self.contenders.items())

    def cases(self) -> tuple[Case, ...]:
        return tuple(
            Case(model, steps, batch_size, self.dtype, self.plans.get((model, steps), ""), tuple(held.values()))
            for (model, steps, batch_size), held in self.contenders.items()
        )

    def verdict(self) -> Verdict:
        """Failed unless all are ok or absent, with what the others said."""
        said = {
            f"{each.name} {each.status}: {each.reason}": None
            for held in self.contenders.values()
            for each in held.values()
            if each.status not in ("ok", "absent")
        }
        return Verdict("failed", "; ".join(said)) if said else Verdict("ok")


def write_found(path: Path, found: Found, *, dry_run: bool) -> None:
    """Write what there is so far."""
    measurements = {name: getattr(found, name) for name in _LISTS}
    write_run(path, Run(gate_environment(dry_run=dry_run), {"dry_run": dry_run}, found.cases(), measurements))


def merge_runs(runs: Sequence[Run]) -> Run:
    """One run of them all: contenders of the same case side by side, and a line through each one's step counts."""
    contenders: dict[tuple[str, int, int, str], tuple[Contender, ...]] = {}
    plans: dict[tuple[str, int, int, str], str] = {}
    for run in runs:
        for case in run.cases:
            key = case.model, case.steps, case.batch_size, case.dtype
            contenders[key] = contenders.get(key, ()) + case.contenders
            plans[key] = plans.get(key) or case.plan
    cases = tuple(Case(*key, plans[key], held) for key, held in contenders.items())
    measurements: dict[str, Any] = {
        name: [entry for run in runs for entry in run.measurements.get(name, ())] for name in _LISTS
    }
    return Run(runs[-1].environment, runs[-1].options, cases, {**measurements, "fits": fits_as_json(cases)})


def merge_files(path: Path, parts: Sequence[Path]) -> None:
    """Write the merged run of those parts that are there."""
    runs = [read_run(part) for part in parts if part.exists()]
    if runs:
        write_run(path, merge_runs(runs))
