"""An interrupted run is continued: what a result file holds is kept, if nothing that it depends on has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipstep.bench.options import CaseKey
from skipstep.errors import InputError

# A result of another commit, machine or command is measured again as a whole.
_EQUAL = ("schema", "machine", "commit", "versions", "options")


class KeptResults:
    """The benchmarks of a result file, by case and contender; none where `facts` differ from the file's.

    Raises InputError for a file that is no result. A file that does not exist yet holds nothing.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.benchmarks: dict[tuple[CaseKey, str], dict[str, Any]] = {}
        self.digests: dict[str, str] = {}
        if not path.exists():
            return
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            before = result["skipstep"]
            if [before.get(name) for name in _EQUAL] != json.loads(json.dumps([facts[name] for name in _EQUAL])):
                return
            for each in result["benchmarks"]:
                found = each["extra_info"]
                case = CaseKey(found["model"], found["plan"]["steps"], found["batch_size"])
                self.benchmarks[case, found["contender"]] = each
            self.digests = before["digests"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                got=f"{path}, which cannot be continued ({type(error).__name__}: {error})",
                expected="a result that skipstep bench --out wrote",
                remedy="leave out --resume, and the file is written anew",
            ) from error

    def holds(self, case: CaseKey, contender: str, digest: str) -> bool:
        """Whether this was measured, with a model of these weights."""
        return (case, contender) in self.benchmarks and self.digests.get(case.model) == digest
