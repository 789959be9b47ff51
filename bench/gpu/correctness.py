"""Correctness: the suite's tests that use the GPU, and what they found as JSON.

    kernels  step kernel against float64 and its NumPy twin for all flags and dtypes; Philox bits; cubins
    engine   captured, step by step and stepwise loops bit for bit; replay; batch invariance; NaN; threads

A group is right only if something passed and nothing failed: tests that were all skipped show nothing.
"""

from __future__ import annotations

import importlib.util
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Final

import pytest

from skipstep.bench.gpu.tasks import Verdict

# Patterns below the checkout. What a dry run takes of them is little, and runs without a GPU.
GROUPS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "kernels": (
        ("tests/kernels/test_*.py", "tests/export/test_cubins.py", "tests/cuda/test_cuda_probe.py"),
        ("tests/kernels/test_step_kernel.py", "-k", "initial_noise_has_the_bits"),
    ),
    "engine": (
        ("tests/cuda/test_cuda*.py", "tests/loops/test_captured*.py", "tests/cuda/test_*.py"),
        ("tests/plans/test_schedule.py", "-k", "linear"),
    ),
}
# Tests without the mark use no GPU: the suite runs them elsewhere.
_SELECTED: Final = "gpu and not slow"
# Compiling kernels takes most of the time, each worker's on a core of its own.
_WORKERS: Final = 8
_SECONDS_PER_TEST: Final = 80
_MAX_FAILURES: Final = 20
_MAX_CHARACTERS: Final = 2000


class Recorder:
    """A pytest plugin that keeps outcomes, what failures said, and the seconds by file."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.skipped: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.location[0]] += report.duration
        if report.failed:
            self._failed(report.nodeid, report.longreprtext)
        elif report.skipped:
            self.outcomes["skipped"] += 1
            self.skipped[str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else "expected to fail"] += 1
        elif report.when == "call":
            self.outcomes["passed"] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed(report.nodeid, report.longreprtext)

    def _failed(self, name: str, said: str) -> None:
        self.outcomes["failed"] += 1
        if len(self.failures) < _MAX_FAILURES:
            self.failures.append({"test": name, "said": said[-_MAX_CHARACTERS:]})


def run_tests(arguments: list[str], *, workers: int = 0) -> tuple[dict[str, Any], Verdict]:
    """Run pytest in this process; the results, and what follows from them."""
    recorder = Recorder()
    options = ["-q", "-p", "no:cacheprovider"]
    if workers and importlib.util.find_spec("xdist"):
        options += ["-n", str(workers), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", str(_SECONDS_PER_TEST)]
    started = time.perf_counter()
    status = pytest.main([*options, *arguments], plugins=[recorder])
    results = {
        "arguments": arguments,
        "exit_status": int(status),
        "seconds": round(time.perf_counter() - started, 2),
        "outcomes": {name: recorder.outcomes[name] for name in ("passed", "failed", "skipped")},
        "failures": recorder.failures,
        "skipped": dict(recorder.skipped),
        "seconds_by_file": {name: round(seconds, 2) for name, seconds in recorder.seconds.items()},
    }
    counts = ", ".join(f"{count} {name}" for name, count in recorder.outcomes.items()) or "no tests"
    if status != pytest.ExitCode.OK or recorder.outcomes["failed"]:
        return results, Verdict("failed", f"pytest ended with {int(status)}: {counts}")
    if not recorder.outcomes["passed"]:
        return results, Verdict("failed", f"nothing was tested: {counts}")
    return results, Verdict("ok", counts)


def check_group(name: str, *, dry_run: bool) -> tuple[dict[str, Any], Verdict]:
    """One group's tests, below the current folder."""
    patterns, few = GROUPS[name]
    if dry_run:
        return run_tests(list(few))
    files = sorted(str(path) for pattern in patterns for path in Path().glob(pattern))
    if not files:
        return {"arguments": list(patterns)}, Verdict(
            "failed", f"no file matches {', '.join(patterns)} below {Path.cwd()}"
        )
    return run_tests([*files, "-m", _SELECTED], workers=_WORKERS)
