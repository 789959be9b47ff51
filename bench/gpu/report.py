"""The gate's results as tables for a page, from the committed JSON of its last run on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from skipstep.bench.gpu.aims import seconds_per_step
from skipstep.bench.gpu.summary import aim_row
from skipstep.bench.gpu.tasks import AIMS_FILE, CAPTURED, LATENCY_FILE, SUMMARY_FILE
from skipstep.bench.markdown import describe_environment, markdown
from skipstep.bench.results import Contender, Run, read_run
from skipstep.errors import InputError

# Below the folder of committed results.
FOLDER: Final = "gpu"
NOT_RUN: Final = "`make gpu` has not yet run on a GPU: there are no numbers to show."


def gpu_tables(results: Path) -> str:
    """Aims, latencies and the step kernel's bandwidth of the run in `results`/gpu; a sentence where there is none.

    Raises InputError for a dry run's files: their numbers mean nothing.
    """
    folder = results / FOLDER
    if not (folder / SUMMARY_FILE).exists():
        return NOT_RUN
    summary = _read(folder / SUMMARY_FILE)
    if summary["dry_run"]:
        raise InputError(
            got=f"the files of a dry run in {folder}",
            expected="those of make gpu on a GPU",
            remedy="remove them, or run make gpu on a machine with a GPU and copy out/gpu there",
        )
    parts = [markdown(["aim", "bound", "measured", "met"], [aim_row(aim) for aim in _read(folder / AIMS_FILE)["aims"]])]
    if (folder / LATENCY_FILE).exists():
        parts.append(_latency_table(read_run(folder / LATENCY_FILE)))
    if (folder / "step-kernel.json").exists():
        parts.append(_bandwidth_table(_read(folder / "step-kernel.json")["cases"]))
    tasks = ", ".join(f"{each['task']} {each['status']}" for each in summary["tasks"])
    parts.append(f"{describe_environment(summary['environment'])}. Parts of the run: {tasks}.")
    return "\n\n".join(parts)


def _latency_table(run: Run) -> str:
    """One line a network, batch size and contender: ms per step, and against our captured loop."""
    slopes = seconds_per_step(run)
    rows = []
    for case in run.cases:
        steps = [each.steps for each in run.cases if (each.model, each.batch_size) == (case.model, case.batch_size)]
        if case.steps != max(steps):
            continue
        ours = slopes.get((case.model, case.batch_size, CAPTURED))
        for contender in case.contenders:
            slope = slopes.get((case.model, case.batch_size, contender.name))
            rows.append(
                [
                    case.model,
                    str(case.batch_size),
                    contender.name,
                    _said(contender) if slope is None else f"{slope * 1e3:.3f}",
                    "" if slope is None or ours is None else f"{slope / ours:.2f}×",
                    "" if contender.nodes_per_step is None else str(contender.nodes_per_step),
                    "" if contender.build_seconds is None else f"{contender.build_seconds + _warm_up(contender):.1f}",
                    "" if contender.peak_memory_bytes is None else f"{contender.peak_memory_bytes / 2**20:.0f}",
                ]
            )
    header = [
        "network",
        "batch",
        "contender",
        "ms per step",
        "time against ours",
        "kernels per step",
        "build, s",
        "MiB",
    ]
    return markdown(header, rows)


def _said(contender: Contender) -> str:
    # A cell of Markdown ends at a bar or at a line's end.
    return f"{contender.status}: {contender.reason}".replace("|", "¦").replace("\n", " ")[:120]


def _warm_up(contender: Contender) -> float:
    return contender.warmup_seconds or 0.0


def _bandwidth_table(cases: list[dict[str, Any]]) -> str:
    """One line a size: what share of a copy's bandwidth the step reaches, by dtype and variant."""
    variants = list(dict.fromkeys((case["dtype"], case["eta"], case["guided"]) for case in cases))
    rows = []
    for size in dict.fromkeys(case["state_bytes"] for case in cases):
        of_size = {(c["dtype"], c["eta"], c["guided"]): c for c in cases if c["state_bytes"] == size}
        shares = [of_size[variant].get("step_against_copy") if variant in of_size else None for variant in variants]
        rows.append([_size(size), *("–" if share is None else f"{share:.0%}" for share in shares)])
    header = [f"{dtype}, η = {eta:g}{', guided' if guided else ''}" for dtype, eta, guided in variants]
    return markdown(["state", *header], rows)


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= scale:
            return f"{num_bytes // scale} {unit}"
    return f"{num_bytes >> 10} KiB"


def _read(path: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return contents
