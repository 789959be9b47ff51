"""Latency tasks: the benchmark of skipstep.bench in this process, with device=cuda and chosen contenders.

Contenders are checked at the fewest steps and timed without the textbook loop beside them, whose time the gate does not
have; the line a + b·S through the step counts tells fixed and per-step costs apart (skipstep.bench.fits).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from skipstep.bench.fits import fit_line
from skipstep.bench.gpu.correctness import run_tests
from skipstep.bench.gpu.tasks import Task, Verdict
from skipstep.bench.markdown import read_result

# All divide the thousand timesteps of training: of other grids diffusers pairs the timesteps wrongly.
STEPS: Final = "10,20,50"
DRY_STEPS: Final = "2,4,5"
_DRY_MODELS: Final = ("tiny-architecture@1,2",)
_SECONDS_PER_CASE: Final = 1.0
_MAX_ROUNDS: Final = 50


def measure_latency(task: Task, out: Path, *, dry_run: bool, spoil: bool = False) -> Verdict:
    """Measure the task's contenders and write the benchmark's JSON to `out`. `spoil` makes their samples wrong, to
    test the check. Interrupted, it writes what has been measured."""
    arguments = ["--pyargs", "skipstep.bench", "-c", os.devnull, "--rootdir", os.getcwd(), "--import-mode=importlib"]
    arguments += ["--contenders", ",".join(task.contenders), "--measure", "jitter", "--unpaired", "--benchmark-quiet"]
    if dry_run:
        arguments += ["--simulated", "wrong" if spoil else "yes", "--plans", DRY_STEPS, "--budget", "1e-9"]
    else:
        arguments += ["--device", "cuda", "--dtype", "float16", "--plans", STEPS, "--budget", str(_SECONDS_PER_CASE)]
    for model in _DRY_MODELS if dry_run else task.models:
        arguments += ["--model", model]
    results, verdict = run_tests([*arguments, "--rounds", str(_MAX_ROUNDS), f"--benchmark-json={out}"])
    if results["failures"]:
        said = [f"{each['test']} {each['said'].strip().splitlines()[-1]}" for each in results["failures"]]
        return Verdict("failed", "; ".join(said))
    skipped = list(results["skipped"])
    if skipped and not results["outcomes"]["passed"] and all("absent: " in each for each in skipped):
        return Verdict("absent", "; ".join(skipped))
    return verdict


def latency_rows(results: Path) -> Iterator[dict[str, Any]]:
    """The facts of every contender in the latency files of a run, with the `median` of its seconds."""
    for path in sorted(results.glob("latency-*.json")):
        for each in read_result(path)["benchmarks"]:
            yield {**each["extra_info"], "median": statistics.median(each["stats"]["data"])}


def seconds_per_step(results: Path) -> dict[tuple[str, int, str], float]:
    """The slope of each line through the step counts, by network, batch size and contender."""
    points: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for row in latency_rows(results):
        key = row["model"], row["batch_size"], row["contender"]
        points.setdefault(key, []).append((row["plan"]["steps"], row["median"]))
    return {key: fit_line(found).per_step for key, found in points.items() if len({steps for steps, _ in found}) > 1}
