"""What a benchmark run found: the one format that is written, compared, plotted and put into tables.

A run is a list of cases (network, steps, batch size, dtype); a case a list of contenders that took turns in one
process. A contender has numbers only if its output was right. Ratios are formed within a turn: they survive machines
whose speed wanders, which absolute times do not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

from skipstep.errors import InputError

SCHEMA: Final = 1
# The contender that all ratios refer to: plain PyTorch, as the papers have it.
REFERENCE: Final = "textbook"

Status = Literal["ok", "absent", "wrong", "failed", "skipped"]
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to draw the samples of a case.

    status   "ok"; "absent": this machine lacks what it needs; "wrong": its samples are off by more than its tolerance;
             "failed": it raised; "skipped": it would have taken longer than the case may. `reason` says more.
    seconds  of each turn, whole calls with all work finished. Empty unless "ok".
    ratio    how many times as fast as the reference: the median over turns of reference seconds over its own.
    error    largest difference from the float32 reference's samples, over their largest magnitude; bound: `tolerance`.
    """

    name: str
    status: Status
    reason: str = ""
    backend: str = ""
    loop: str = ""
    seconds: tuple[float, ...] = ()
    ratio: float | None = None
    error: float | None = None
    tolerance: float | None = None
    build_seconds: float | None = None
    warmup_seconds: float | None = None
    peak_memory_bytes: int | None = None
    nodes_per_step: int | None = None
    bytes_per_step: int | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """Contenders side by side. `plan` is its key; `outside_network` the share of the default engine's time that as
    many runs of its network alone leave over."""

    model: str
    steps: int
    batch_size: int
    dtype: str
    plan: str
    contenders: tuple[Contender, ...]
    outside_network: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.steps} steps, batch {self.batch_size}, {self.dtype}"

    def contender(self, name: str) -> Contender | None:
        return next((each for each in self.contenders if each.name == name), None)


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run. `environment` is skipstep.bench.record.environment(); `options` what was asked for.

    `measurements` are what is no case: accuracy by precision, throughput under load, cold start, fits, by name.
    """

    environment: Mapping[str, Any]
    options: Mapping[str, Any]
    cases: tuple[Case, ...]
    measurements: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def machine_class(self) -> str:
        """What must be equal for two runs to be compared."""
        return str(self.environment.get("machine_class", "unknown"))


def write_run(path: Path, run: Run) -> None:
    """Write a run, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(asdict(run), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_run(path: Path) -> Run:
    """Read what `write_run` wrote. Raises InputError for anything else, and for another schema's."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(contents, dict) or "schema" not in contents or "cases" not in contents:
        raise _unreadable(path, "no benchmark run")
    if contents["schema"] != SCHEMA:
        raise InputError(
            got=f"{path} of schema {contents['schema']!r}",
            expected=f"schema {SCHEMA}, which this version of skipstep writes",
            remedy="measure again with this version",
        )
    try:
        cases = tuple(_case(each) for each in contents.pop("cases"))
        return Run(cases=cases, **_only(Run, contents))
    except (TypeError, KeyError, AttributeError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error


def _case(value: Mapping[str, Any]) -> Case:
    contenders = []
    for each in value["contenders"]:
        if each["status"] not in STATUSES:
            raise KeyError(f"status {each['status']!r}")
        contenders.append(Contender(**{**_only(Contender, each), "seconds": tuple(map(float, each["seconds"]))}))
    return Case(**{**_only(Case, value), "contenders": tuple(contenders)})


def _only(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    known = {each.name for each in fields(kind)}
    unknown = set(value) - known
    if unknown:
        raise KeyError(f"unknown {', '.join(sorted(unknown))}")
    return dict(value)


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        got=f"{path}, which is no benchmark result ({why})",
        expected="a JSON file that skipstep bench wrote",
        remedy="measure again with skipstep bench --out",
    )
