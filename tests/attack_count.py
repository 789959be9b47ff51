"""How many cases an attack tried, by class: what `make fuzz` commits beside its command."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

TRIED: Counter[str] = Counter()
# Where the counts go, if all of it passed.
RESULT = "SKIPSTEP_ATTACKS"


def tried(what: str, cases: int = 1) -> None:
    TRIED[what] += cases


def write_counts() -> None:
    from skipstep.bench.record import write_finding

    rows = [[what, f"{cases:,}", "0"] for what, cases in TRIED.items()]
    note = "Cases of `make fuzz`. A failure is another exception, a changed argument, a wrong result or a hang."
    header = ["attack", "cases", "failures"]
    write_finding(Path(os.environ[RESULT]), command="make fuzz", header=header, rows=rows, note=note)
