"""Run the gate: `python -m skipstep.bench.gpu --out DIR [--dry-run]`, from a checkout's top folder.

Exit status 0 if everything that decides is ok or absent with a reason, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from skipstep.bench.gpu.aims import print_summary, write_aims
from skipstep.bench.gpu.process import EndedProcess, run_limited
from skipstep.bench.gpu.tasks import BUDGET, SUMMARY_FILE, TASKS, Task, Verdict, limit_for, passed
from skipstep.bench.record import environment, gpu_state, write_whole
from skipstep.cuda.probe import cuda_device
from skipstep.errors import DeviceUnavailableError


class Gate:
    """One run of `tasks`, with faults by task in `plants`. Its summary is written again after every task, so an
    interrupted run says how far it came."""

    def __init__(
        self,
        out: Path,
        *,
        dry_run: bool,
        cache: Path,
        budget: float = BUDGET,
        tasks: Sequence[Task] = TASKS,
        plants: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.verdicts: dict[str, Verdict] = {}
        self._out, self._dry_run, self._tasks, self._plants = out, dry_run, tasks, plants
        self._deadline = time.monotonic() + budget
        self._records: list[dict[str, Any]] = []
        self._environment = environment(simulated=dry_run)
        self._state_before = gpu_state()
        self._variables = {
            # pytest-benchmark writes no result where it finds the variables of a test process around it.
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "PYTHONUNBUFFERED": "1",
            # Kept between runs on the same machine: what compiled once is there the next time.
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        }
        if dry_run:
            # Threads that wait for each other take longer than networks this small.
            self._variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(self) -> bool:
        """Do all tasks, in order; whether they passed."""
        self._out.mkdir(parents=True, exist_ok=True)
        for file in {*(task.file for task in self._tasks), SUMMARY_FILE}:
            (self._out / file).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="skipstep-gate-") as folder:
            for index, task in enumerate(self._tasks):
                self._do(task, self._tasks[index + 1 :], Path(folder))
                self._write_summary()
        print_summary(self._out, self._records)
        return passed(self._tasks, self.verdicts)

    def _do(self, task: Task, later: Sequence[Task], folder: Path) -> None:
        red = [name for name in task.needs if self.verdicts[name].status != "ok"]
        if red:
            self._record(task, Verdict("not run", f"needs {' and '.join(red)} to be ok"), EndedProcess(0, 0.0, ""), 0.0)
            return
        limit = limit_for(later, remaining=self._deadline - time.monotonic())
        print(f"{task.name} … (at most {limit:.0f} s)", flush=True)
        verdict = folder / f"{task.name}.verdict"
        command = [sys.executable, "-m", "skipstep.bench.gpu.task_main", task.name]
        command += ["--out", str(self._out / task.file), "--verdict", str(verdict)]
        command += ["--dry-run"] * self._dry_run + ["--plant", self._plants.get(task.name, "")]
        ended = run_limited(command, seconds=limit, environment=self._variables, log=folder / f"{task.name}.log")
        self._record(task, _verdict(ended, verdict, limit), ended, limit)

    def _record(self, task: Task, verdict: Verdict, ended: EndedProcess, limit: float) -> None:
        self.verdicts[task.name] = verdict
        record = {"task": task.name, "status": verdict.status, "reason": verdict.reason, "decides": task.decides}
        record |= {"seconds": round(ended.seconds, 1), "limit_seconds": round(limit, 1)}
        if verdict.status in ("failed", "timed out"):
            record["tail"] = ended.tail
            print(ended.tail, flush=True)
        print(f"{task.name}: {verdict.status}, {ended.seconds:.0f} s {verdict.reason[:200]}", flush=True)
        self._records.append(record)

    def _write_summary(self) -> None:
        write_aims(self._out, self._environment)
        summary = {
            "environment": self._environment,
            "dry_run": self._dry_run,
            "complete": len(self.verdicts) == len(self._tasks),
            "passed": passed(self._tasks, self.verdicts),
            "gpu_before": self._state_before,
            "gpu_after": gpu_state(),
            "tasks": self._records,
        }
        write_whole(self._out / SUMMARY_FILE, summary)


def _verdict(ended: EndedProcess, file: Path, limit: float) -> Verdict:
    if ended.status is None:
        return Verdict("timed out", f"stopped after {limit:.0f} s; what it had measured is kept")
    if ended.status != 0 or not file.exists():
        last = ended.tail.strip().splitlines()[-1:]
        return Verdict("failed", f"its process ended with {ended.status}: {' '.join(last)[:300]}")
    return Verdict(**json.loads(file.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the JSON files")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for everything (default {BUDGET:.0f})")
    parser.add_argument("--cache", type=Path, default=Path("build/gpu-cache"), help="what compilers keep between runs")
    parser.add_argument("--dry-run", action="store_true", help="walk the same parts on a CPU, to test the gate itself")
    parser.add_argument(
        "--plant", action="append", default=[], metavar="TASK=raise|hang|wrong", help="a fault, in a dry run only"
    )
    options = parser.parse_args(arguments)
    plants = dict(each.split("=", 1) for each in options.plant)
    if plants and not options.dry_run:
        parser.error("--plant is for --dry-run")
    if not options.dry_run:
        try:
            cuda_device(remedy="run make gpu where nvidia-smi lists a GPU, or give --dry-run to test the gate itself")
        except DeviceUnavailableError as error:
            print(f"make gpu: {error}", file=sys.stderr)
            return 2
    gate = Gate(
        options.out.absolute(),
        dry_run=options.dry_run,
        budget=options.budget,
        cache=options.cache.absolute(),
        plants=plants,
    )
    return 0 if gate.run() else 1


if __name__ == "__main__":
    raise SystemExit(main())
