"""What an interrupted run has measured so far: kept beside the result, whole after every case.

A journal is a run that is not finished, in the format of runs. It goes on only where everything is as it was: options,
models, commit, machine and versions. Numbers of different settings do not belong in one table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipstep.bench.results import Case, Run, read_run, write_run
from skipstep.errors import InputError

CaseKey = tuple[str, int, int]


def journal_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial.json")


class Journal:
    """Cases by (model, steps, batch size) and measurements by name. `path` None keeps them in memory alone."""

    def __init__(
        self, path: Path | None, *, environment: Mapping[str, Any], options: Mapping[str, Any], resume: bool = False
    ) -> None:
        """With `resume` go on with what is there; without, begin anew.

        Raises InputError for a journal of other settings, which names what differs, and for one that cannot be read.
        """
        self.path = path
        self.environment = _as_read(environment)
        self.options = _as_read(options)
        self.cases: dict[CaseKey, Case] = {}
        self.measurements: dict[str, Any] = {}
        if path is not None and resume and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        kept = read_run(path)
        now = {**self.environment, **self.options}
        then = {**kept.environment, **kept.options}
        changed = [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
        if changed:
            differences = ", ".join(f"{name} {then.get(name)!r}, now {now.get(name)!r}" for name in changed)
            raise InputError(
                got=f"{path}, measured with other settings: {differences}",
                expected="the settings of this run",
                remedy="repeat the command that was interrupted, or leave --resume out to begin anew",
            )
        self.cases = {(case.model, case.steps, case.batch_size): case for case in kept.cases}
        self.measurements = dict(kept.measurements)

    def keep(self, case: Case) -> None:
        self.cases[case.model, case.steps, case.batch_size] = case
        self._write()

    def keep_measurement(self, name: str, value: Any) -> None:
        self.measurements[name] = _as_read(value)
        self._write()

    def run(self) -> Run:
        return Run(self.environment, self.options, tuple(self.cases.values()), dict(self.measurements))

    def _write(self) -> None:
        if self.path is not None:
            write_run(self.path, self.run())

    def discard(self) -> None:
        """The result has been written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _as_read(value: Any) -> Any:
    """As JSON gives it back: tuples are lists there."""
    return json.loads(json.dumps(value))
