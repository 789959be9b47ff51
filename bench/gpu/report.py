"""The gate's results as tables for a page, from the committed JSON of its last run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from skipstep.bench.gpu.aims import aim_row
from skipstep.bench.gpu.latency import latency_rows, seconds_per_step
from skipstep.bench.gpu.tasks import AIMS_FILE, CAPTURED, SUMMARY_FILE
from skipstep.bench.markdown import describe_environment, markdown, read_result
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
    summary = read_result(folder / SUMMARY_FILE)
    if summary["dry_run"]:
        raise InputError(
            got=f"the files of a dry run in {folder}",
            expected="those of make gpu on a GPU",
            remedy="remove them, or run make gpu on a machine with a GPU and copy out/gpu there",
        )
    parts = [
        markdown(["aim", "bound", "measured", "met"], [aim_row(aim) for aim in read_result(folder / AIMS_FILE)["aims"]])
    ]
    if any(folder.glob("latency-*.json")):
        parts.append(_latency_table(folder))
    if (folder / "step-kernel.json").exists():
        parts.append(_bandwidth_table(read_result(folder / "step-kernel.json")["cases"]))
    tasks = ", ".join(f"{each['task']} {each['status']}" for each in summary["tasks"])
    parts.append(f"{describe_environment(summary['environment'])}. Parts of the run: {tasks}.")
    return "\n\n".join(parts)


def _latency_table(folder: Path) -> str:
    """One line a network, batch size and contender: ms per step, and against our captured loop."""
    slopes = seconds_per_step(folder)
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in latency_rows(folder):
        found.setdefault((row["model"], row["batch_size"], row["contender"]), {}).update(row)
    rows = []
    for key, row in found.items():
        slope, ours = slopes.get(key), slopes.get((*key[:2], CAPTURED))
        rows.append(
            [
                key[0],
                str(key[1]),
                key[2],
                "" if slope is None else f"{slope * 1e3:.3f}",
                "" if slope is None or ours is None else f"{slope / ours:.2f}×",
                _nodes_per_step(row),
                "" if row["build_seconds"] is None else f"{row['build_seconds']:.1f}",
                f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
            ]
        )
    for path in sorted(folder.glob("latency-*.json")):
        for each in read_result(path)["skipstep"]["absent"]:
            # A cell of Markdown ends at a bar or at a line's end.
            said = f"{each['status']}: {each['reason']}".replace("|", "¦").replace("\n", " ")[:120]
            rows.append([each["model"], str(each["batch_size"]), each["contender"], said, "", "", "", ""])
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


def _nodes_per_step(row: dict[str, Any]) -> str:
    """Of the graph for the row's plan, where the engine reports it; a step graph is one step already."""
    for report in row.get("captures", ()):
        if report["num_nodes"] is not None and report["num_stages"] == row["plan"]["steps"]:
            return str(round(report["num_nodes"] / (report["num_stages"] if report["loop"] == "captured" else 1)))
    return ""


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
