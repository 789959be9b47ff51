"""Benchmark results as pytest-benchmark writes them, with skipstep's facts, read and checked.

benchmarks[i].stats.data     seconds of each round
benchmarks[i].extra_info     model, contender, plan, batch size, device, precision, error, ratios, …
skipstep                     machine, commit, versions, and the contenders without a number, with reasons
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from skipstep.errors import InputError
from skipstep.latency.calibration import nearest_rank

SCHEMA: Final = 1
REFERENCE: Final = "textbook"


@dataclass(frozen=True, slots=True)
class Load:
    """Calls from several threads at once."""

    callers: int
    calls_per_second: float
    p50_seconds: float
    p99_seconds: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One contender in one case. `ratios`: seconds of the textbook loop over its own, of each round."""

    schema: int
    model: str
    contender: str
    steps: int
    solver: str
    key: str
    batch_size: int
    device: str
    precision: str
    data: tuple[float, ...]
    ratios: tuple[float, ...] = ()
    error: float | None = None
    tolerance: float | None = None
    build_seconds: float | None = None
    peak_bytes: float | None = None
    cold_start_seconds: float | None = None
    throughput: tuple[Load, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.data)

    def percentile(self, percent: int) -> float:
        return nearest_rank(self.data, percent)


@dataclass(frozen=True, slots=True)
class Absence:
    """A contender without a number, and why."""

    model: str
    contender: str
    steps: int
    batch_size: int
    reason: str
    status: str = "absent"


@dataclass(frozen=True, slots=True)
class Run:
    """One result file. Runs of the same `machine` may be compared."""

    schema: int
    machine: str
    cores: int
    commit: str
    datetime: str
    absent: tuple[Absence, ...]
    entries: tuple[Entry, ...]
    versions: dict  # type: ignore[type-arg]
    note: str = ""
    command: str = ""
    processor: str = ""
    options: dict = dataclasses.field(default_factory=dict)  # type: ignore[type-arg]
    digests: dict = dataclasses.field(default_factory=dict)  # type: ignore[type-arg]


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs among `paths`, oldest first, and a note for each file that is something else.

    Raises InputError where there is no run, and for files that are unreadable, damaged or of another schema.
    """
    runs, notes = [], []
    for path in paths:
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _malformed(f"{path}, which cannot be read ({error})") from error
        if isinstance(contents, dict) and "benchmarks" in contents and "skipstep" in contents:
            runs.append(_run(contents, str(path)))
        else:
            notes.append(f"{path} is not used: it is no result of skipstep bench")
    if not runs:
        raise _malformed(f"{len(paths)} files without a benchmark run")
    return sorted(runs, key=lambda run: run.datetime), notes


def _run(contents: dict[str, Any], where: str) -> Run:
    try:
        entries = [{**b["stats"], **b["extra_info"]["plan"], **b["extra_info"]} for b in contents["benchmarks"]]
        processor = contents.get("machine_info", {}).get("cpu", {}).get("brand_raw")
        facts = {**contents["skipstep"], "datetime": contents.get("datetime"), "processor": processor}
    except (TypeError, KeyError, AttributeError) as error:
        raise _malformed(f"{where} without a part ({type(error).__name__}: {error})") from error
    run: Run = _read(Run, {**facts, "entries": entries}, where)
    if other := {run.schema, *(entry.schema for entry in run.entries)} - {SCHEMA}:
        raise _malformed(f"schema {other.pop()} in {where}")
    if not all(entry.data and min(entry.data + entry.ratios) > 0 for entry in run.entries):
        raise _malformed(f"seconds or ratios that are not positive in {where}")
    return run


def _read(hint: Any, value: Any, where: str) -> Any:
    """A value of the hinted type. What a dataclass has no field for is ignored; null is a field's default."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints, fields = typing.get_type_hints(hint), dataclasses.fields(hint)
        given = [
            f.name
            for f in fields
            if value.get(f.name) is not None or f.default is f.default_factory is dataclasses.MISSING
        ]
        return hint(**{name: _read(hints[name], value.get(name), f"{where}, {name}") for name in given})  # type: ignore[operator]
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_read(typing.get_args(hint)[0], each, where) for each in value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if hint in (str, dict):
        good = isinstance(value, hint)
    else:
        good = number and (hint in (float, float | None) or (hint is int and isinstance(value, int) and value > 0))
    if not good:
        raise _malformed(f"{value!r:.60} in {where}")
    return value


def _malformed(got: str) -> InputError:
    return InputError(
        got=got,
        expected=f"JSON of schema {SCHEMA} that skipstep bench wrote",
        remedy="correct the path, or measure again with skipstep bench --out",
    )
