"""The end of a run as a short table: what was ok, how long it took, and the numbers that the aims are about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipstep.bench.gpu.latency import seconds_per_step
from skipstep.bench.gpu.tasks import AIMS_FILE
from skipstep.latency.table import format_table


def print_summary(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Print what a person at the machine wants to know; the files have the rest."""
    rows = [[each["task"], each["status"], f"{each['seconds']:.0f}", each["reason"][:90]] for each in records]
    print("\n" + format_table(["task", "status", "s", ""], rows))
    lines = [[*map(str, key), f"{seconds * 1e3:.3f}"] for key, seconds in seconds_per_step(out).items()]
    if lines:
        print("\n" + format_table(["network", "batch", "contender", "ms per step"], lines))
    aims = json.loads((out / AIMS_FILE).read_text(encoding="utf-8"))["aims"]
    print("\n" + format_table(["aim", "bound", "measured", "met"], [aim_row(aim) for aim in aims]))
    print(f"\nresults in {out}")


def aim_row(aim: Mapping[str, Any]) -> list[str]:
    """An aim as cells: what, its bound, what was measured, and whether that meets it."""
    measured = "–" if aim["measured"] is None else f"{aim['measured']:.3g}{_space(aim['unit'])}"
    met = {True: "yes", False: "no", None: aim["why"]}[aim["met"]]
    return [aim["aim"], f"{aim['sense']} {aim['bound']:g}{_space(aim['unit'])}", measured, met]


def _space(unit: str) -> str:
    return f" {unit}" if unit.isalpha() else unit
