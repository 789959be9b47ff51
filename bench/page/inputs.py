"""What a report is made of: files told apart by their contents, runs grouped by the class of their machine.

Results of different machine classes are never mixed: each class is a group, and a group a section of the page. Within a
group the newest run of a case is the one that is shown; older ones serve for the course over commits.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeGuard

from skipstep.bench.page.quality import QualityPoint, read_quality
from skipstep.bench.results import Case, Run, read_run
from skipstep.errors import InputError

# What a page has a place for, by keys that only files of that kind have.
_USED: Final[Mapping[str, tuple[str, ...]]] = {
    "cold start": ("environment", "median_seconds", "ratio_to_diffusers", "steps"),
    "step bandwidth": ("environment", "cases"),
    "step code": ("environment", "kernels"),
}
# Other results of skipstep, which have tables or pages of their own.
_LEFT_ASIDE: Final[Mapping[str, tuple[str, ...]]] = {
    "pytest-benchmark": ("machine_info", "benchmarks"),
    "aims": ("aims",),
    "of another measurement": ("environment",),
}


@dataclass(frozen=True, slots=True)
class MachineGroup:
    """Runs that may be compared, oldest first, and what else was measured on that machine."""

    machine_class: str
    runs: tuple[Run, ...]
    cold_start: Mapping[str, Any] | None = None
    bandwidth: Mapping[str, Any] | None = None

    def cases(self) -> tuple[Case, ...]:
        """Each case once, as the newest run has it; by model, dtype, batch size and steps."""
        newest = {identity(case): case for run in self.runs for case in run.cases}
        models = list(dict.fromkeys(case.model for case in newest.values()))
        return tuple(
            sorted(
                newest.values(), key=lambda case: (models.index(case.model), case.dtype, case.batch_size, case.steps)
            )
        )


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """Everything that was read. `quality`: the evaluation's rows; `notes`: which files were left aside, and why."""

    groups: tuple[MachineGroup, ...]
    quality: tuple[QualityPoint, ...] = ()
    kernels: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = field(default=())


def identity(case: Case) -> tuple[str, int, int, str]:
    """What makes two cases of different runs the same case."""
    return case.model, case.steps, case.batch_size, case.dtype


def read_inputs(paths: Sequence[Path], *, evaluation: Path | None = None) -> ReportInputs:
    """Read result files and, from the folder `evaluation`, the tables of skipstep evaluate.

    Raises InputError for no files, none with a run, and files that are unreadable, damaged or of an unknown kind.
    """
    if not paths:
        raise InputError(
            got="no result files",
            expected="at least one that skipstep bench wrote",
            remedy="measure first: skipstep bench --out results.json",
        )
    runs: list[Run] = []
    others: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in _USED}
    notes = []
    for path in paths:
        kind, contents = _kind(path)
        if kind is None:
            run = read_run(path)
            _check(path, run)
            runs.append(run)
        elif kind in _USED:
            others[kind].append(contents)
        else:
            notes.append(f"{path} is left aside: no benchmark run ({kind})")
    if not runs:
        raise InputError(
            got=f"{len(paths)} files, none of them a benchmark run",
            expected="at least one that skipstep bench wrote",
            remedy="measure first: skipstep bench --out results.json",
        )
    runs = in_order_of_commits(runs)
    groups = []
    for name in dict.fromkeys(run.machine_class for run in runs):
        of_class = tuple(run for run in runs if run.machine_class == name)
        groups.append(
            MachineGroup(
                name,
                of_class,
                cold_start=_of_machine(others["cold start"], of_class),
                bandwidth=_of_machine(others["step bandwidth"], of_class),
            )
        )
    listed = [contents["kernels"] for contents in others["step code"] if isinstance(contents["kernels"], list)]
    kernels = [kernel for each in listed for kernel in each if isinstance(kernel, Mapping)]
    quality = () if evaluation is None else read_quality(evaluation)
    return ReportInputs(tuple(groups), quality, tuple(kernels), tuple(notes))


def in_order_of_commits(runs: Sequence[Run]) -> list[Run]:
    """Oldest commit first where this repository knows all of them; otherwise as they came."""
    times = [_commit_time(str(run.environment.get("commit", ""))) for run in runs]
    if None in times:
        return list(runs)
    return [run for _, run in sorted(zip(times, runs, strict=True), key=lambda pair: pair[0] or 0)]


def _commit_time(commit: str) -> int | None:
    # The name comes from a file: only a hash may reach the command line.
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        return None
    command = ("git", "show", "--no-patch", "--format=%ct", commit, "--")
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _kind(path: Path) -> tuple[str | None, Mapping[str, Any]]:
    """The kind of a file that is no run, and its contents; None for a run and for whatever read_run shall refuse."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            got=f"{path}, which cannot be read ({error})",
            expected="a JSON file that skipstep bench wrote",
            remedy="correct the path, or measure again with skipstep bench --out",
        ) from error
    if isinstance(contents, dict) and "schema" not in contents:
        for kind, keys in {**_USED, **_LEFT_ASIDE}.items():
            if all(key in contents for key in keys):
                return kind, contents
    return None, {}


def _of_machine(results: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> Mapping[str, Any] | None:
    """The last of `results` that came from the machine of `runs`. Older files name no class, but GPU, CPU and cores."""

    def machine(facts: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(facts.get(key) for key in ("gpu", "cpu", "cores"))

    environments = [run.environment for run in runs]
    fitting = [
        each
        for each in results
        if isinstance(facts := each.get("environment"), Mapping)
        and any(
            facts["machine_class"] == here.get("machine_class")
            if "machine_class" in facts
            else machine(facts) == machine(here)
            for here in environments
        )
    ]
    return fitting[-1] if fitting else None


def _check(path: Path, run: Run) -> None:
    """What a page computes with must be a number of the right kind, whoever wrote the file."""

    def require(good: bool, where: str, expected: str) -> None:
        if not good:
            raise InputError(
                got=f"{path} with a wrong {where}", expected=expected, remedy="measure again with skipstep bench --out"
            )

    require(
        isinstance(run.environment, Mapping)
        and isinstance(run.options, Mapping)
        and isinstance(run.measurements, Mapping),
        "environment, options or measurements",
        "JSON objects",
    )
    for case in run.cases:
        require(
            all(isinstance(text, str) for text in (case.model, case.dtype, case.plan)), "model, dtype or plan", "text"
        )
        require(_is_count(case.steps) and _is_count(case.batch_size), "steps or batch_size", "integers from 1 up")
        require(case.outside_network is None or is_finite(case.outside_network), "outside_network", "a number or null")
        for each in case.contenders:
            texts = (each.name, each.reason, each.backend, each.loop)
            require(all(isinstance(text, str) for text in texts), "contender's name, reason, backend or loop", "text")
            require(all(is_finite(s) and s > 0 for s in each.seconds), "seconds", "positive numbers")
            require(
                (each.status == "ok") == bool(each.seconds), "seconds", "some where, and only where, the status is ok"
            )
            require(
                each.ratio is None or (is_finite(each.ratio) and each.ratio > 0), "ratio", "a positive number or null"
            )
            for name in ("error", "tolerance", "build_seconds", "warmup_seconds", "peak_memory_bytes"):
                require(getattr(each, name) is None or is_finite(getattr(each, name)), name, "a number or null")
            for name in ("nodes_per_step", "bytes_per_step"):
                require(getattr(each, name) is None or is_finite(getattr(each, name)), name, "a number or null")


def is_finite(value: object) -> TypeGuard[float]:
    """A number that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
