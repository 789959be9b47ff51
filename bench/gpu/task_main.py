"""One task, in the process that the gate started for it. What comes of it is a file of results and a verdict.

A task that raises leaves no verdict; what it printed is its report.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from skipstep.bench.gpu.tasks import TASKS, Verdict
from skipstep.bench.record import environment, write_whole


def run_task(name: str, out: Path, *, dry_run: bool, plant: str = "") -> Verdict:
    """Do it. `plant` is what a dry run shall do wrong: "raise", "hang" or "wrong"."""
    if plant == "raise":
        raise RuntimeError("planted")
    if plant == "hang":
        time.sleep(3600)
    if name.startswith("latency-"):
        from skipstep.bench.gpu.latency import measure_latency

        (task,) = [each for each in TASKS if each.name == name]
        return measure_latency(task, out, dry_run=dry_run, spoil=plant == "wrong")
    if name in ("kernels", "engine"):
        # Before all else that would import triton: the suite decides whether it is interpreted.
        from skipstep.bench.gpu.correctness import check_group

        results, verdict = check_group(name, dry_run=dry_run)
    elif name == "memory-check":
        from skipstep.bench.gpu.memory_check import check_memory

        results, verdict = check_memory(dry_run=dry_run)
    else:
        from skipstep.bench.gpu.device import bench_device

        device = bench_device(simulated=dry_run)
        if name == "proofs":
            from skipstep.bench.gpu.proofs import prove

            results, verdict = prove(device)
        else:
            from skipstep.bench.gpu.step_bandwidth import measure_bandwidth

            results, verdict = {"cases": measure_bandwidth(device)}, Verdict("ok")
    write_whole(out, {"environment": environment(simulated=dry_run), "dry_run": dry_run, **asdict(verdict), **results})
    return verdict


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[task.name for task in TASKS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--verdict", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--plant", default="")
    options = parser.parse_args(arguments)
    # The gate ends a task with SIGTERM when its time is up; as an interrupt, it writes what has been measured.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    verdict = run_task(options.name, options.out, dry_run=options.dry_run, plant=options.plant)
    write_whole(options.verdict, asdict(verdict))


if __name__ == "__main__":
    main()
