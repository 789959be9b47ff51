"""Benchmark runs as a finding, one table: `python -m skipstep.bench.finding RUN.json … --command "…" --out FILE`."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from skipstep.bench.record import write_finding
from skipstep.bench.result_files import Run, read_runs

HEADER = ["network", "steps", "batch", "contender", "precision", "median ms", "× textbook", "× diffusers", "error",
          "process to first image, ms", "peak memory, MB"]  # fmt: skip


def table(run: Run) -> list[list[str]]:
    """One line a contender and case. Ratios are medians over rounds; × diffusers is a quotient of two such."""
    ratio = {
        (e.model, e.steps, e.batch_size, e.contender): statistics.median(e.ratios) for e in run.entries if e.ratios
    }
    lines = []
    for entry in sorted(run.entries, key=lambda e: (e.model, e.steps, e.batch_size)):
        case = entry.model, entry.steps, entry.batch_size
        mine, theirs = ratio.get((*case, entry.contender)), ratio.get((*case, "diffusers"))
        lines.append(
            [
                *map(str, case),
                entry.contender,
                entry.precision,
                f"{1e3 * entry.median:.1f}",
                "" if mine is None else f"{mine:.2f}",
                "" if mine is None or theirs is None else f"{mine / theirs:.2f}",
                "" if entry.error is None else f"{entry.error:.1g}",
                "" if entry.cold_start_seconds is None else f"{1e3 * entry.cold_start_seconds:.0f}",
                "" if entry.peak_bytes is None else f"{entry.peak_bytes / 1e6:.0f}",
            ]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="what skipstep bench wrote: each has cases of its own")
    parser.add_argument("--command", required=True, help="with which it was measured")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    runs, _ = read_runs(options.runs)
    measured = {(e.contender, e.model, e.batch_size) for run in runs for e in run.entries}
    absent = [e for run in runs for e in run.absent if (e.contender, e.model, e.batch_size) not in measured]
    told = sorted({f"{e.contender}, {e.model}, batch {e.batch_size}: {e.reason}" for e in absent})
    rows = [row for run in runs for row in table(run)]
    note = "Whole calls, medians over rounds. Without a number: " + ("; ".join(told) or "none") + "."
    write_finding(options.out, command=options.command, header=HEADER, rows=rows, note=note)


if __name__ == "__main__":
    main()
