"""What plans are worth: the tables of skipstep evaluate, as a report needs them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from skipstep.errors import InputError

_SOLVERS: Final = {
    "heun": "Heun",
    "rk4": "Runge-Kutta 4",
    "dpm_solver_2": "DPM-Solver-2",
    "dpm_solver_pp_2m": "DPM-Solver++ 2M",
}


@dataclass(frozen=True, slots=True)
class QualityPoint:
    """One row of the evaluation: what a plan's samples are worth. `distance` is the proxy Fréchet distance; `noisy`
    plans add noise on the way."""

    plan: str
    label: str
    noisy: bool
    steps: int
    samples: int
    distance: float
    recognised: float


def read_quality(folder: Path) -> tuple[QualityPoint, ...]:
    """quality.csv (step counts, by eta) and solvers.csv (by solver) of skipstep evaluate; the latter may be absent."""
    points = [
        QualityPoint(
            plan=row["plan_key"],
            label=f"DDIM, η = {eta:g}" if (eta := _float(row["eta"])) is not None else "DDPM's larger noise (σ̂)",
            noisy=eta != 0.0,
            **_quality_of(row, "steps"),
        )
        for row in _rows(folder / "quality.csv")
    ]
    if (folder / "solvers.csv").exists():
        known = {point.plan for point in points}
        points += [
            QualityPoint(
                plan=row["plan_key"],
                label=_SOLVERS.get(row["solver"], row["solver"]),
                noisy=False,
                **_quality_of(row, "evaluations"),
            )
            for row in _rows(folder / "solvers.csv")
            if row["plan_key"] not in known and row["solver"] != "ddim"
        ]
    return tuple(points)


def _quality_of(row: Mapping[str, str], steps: str) -> dict[str, Any]:
    return {
        "steps": int(row[steps]),
        "samples": int(row["samples"]),
        "distance": float(row["proxy_frechet"]),
        "recognised": float(row["agreement"]),
    }


def _rows(path: Path) -> list[dict[str, str]]:
    needed = {"plan_key", "samples", "proxy_frechet", "agreement"}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not needed <= set(rows[0]):
            raise ValueError(f"no rows with {', '.join(sorted(needed))}")
        for row in rows:
            numbers = [float(row[key]) for key in ("samples", "proxy_frechet", "agreement")]
            numbers.append(int(row["steps"] if "steps" in row else row["evaluations"]))
            if not all(map(math.isfinite, numbers)):
                raise ValueError("a number that is not finite")
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise InputError(
            got=f"{path}, which is no table of an evaluation ({error})",
            expected="what skipstep evaluate writes",
            remedy="run skipstep evaluate again, or name its folder with --evaluation",
        ) from error
    return rows


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
