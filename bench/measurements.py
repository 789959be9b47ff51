"""What --measure adds to a contender's facts: throughput, its process (cold start, peak memory), jitter on a GPU.

A process counts whole: interpreter, imports, weights and compilation until the first samples are drawn. The peak is
VmHWM of /proc, which begins with the program; getrusage's ru_maxrss would begin with the parent's memory.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstep.latency.calibration import nearest_rank

if TYPE_CHECKING:
    from skipstep.bench.contenders.workload import Contender, Setup, Workload

_CALLERS = (1, 2, 4)
_THROUGHPUT_SECONDS = 3.0
_PROCESSES = 5
_JITTER_CALLS = 1000
_PROCESS_SECONDS = 300.0


def throughput(draw: Callable[[], object], *, callers: int, seconds: float) -> dict[str, float]:
    """Call `draw` from so many threads for about so long; at least once each. What one raises is raised."""
    start = threading.Barrier(callers + 1)
    times: list[list[float]] = [[] for _ in range(callers)]
    errors: list[BaseException] = []
    deadline = [0.0]

    def call(own: list[float]) -> None:
        start.wait()
        try:
            while not own or time.perf_counter() < deadline[0]:
                begun = time.perf_counter()
                draw()
                own.append(time.perf_counter() - begun)
        except BaseException as error:  # Raised again below, in the caller's thread.
            errors.append(error)

    threads = [threading.Thread(target=call, args=(own,)) for own in times]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    deadline[0] = started + seconds
    start.wait()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    if errors:
        raise errors[0]
    every = [each for own in times for each in own]
    ranks = {f"p{percent}_seconds": nearest_rank(every, percent) for percent in (50, 99)}
    return {"callers": callers, "calls_per_second": len(every) / elapsed, **ranks}


def _throughputs(contender: Contender, workload: Workload, setup: Setup, draw: Callable[[], object]) -> dict[str, Any]:
    if not contender.ours:  # The others are not made to be called from several threads.
        return {}
    return {"throughput": [throughput(draw, callers=each, seconds=_THROUGHPUT_SECONDS) for each in _CALLERS]}


def process_facts(
    model: str,
    contender: str,
    *,
    steps: int,
    batch_size: int,
    threads: int,
    processes: int = _PROCESSES,
    runs: tuple[str, str] = ("auto", "auto"),
) -> tuple[float, int]:
    """Median seconds of a fresh process from its start to its end after one call, and the most bytes that it held.

    `runs`: the backend and the precision of a bundle. Raises RuntimeError with what the process said where it failed.
    """
    command = [sys.executable, "-m", "skipstep.bench.measurements", model, contender]
    command += [str(each) for each in (steps, batch_size, threads, *runs)]
    seconds = []
    for _ in range(1 + processes):  # The first one warms the file cache.
        started = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PROCESS_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"a process took longer than {_PROCESS_SECONDS:g} s") from error
        seconds.append(time.perf_counter() - started)
        if done.returncode != 0:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300])
    return statistics.median(seconds[1:] or seconds), int(done.stdout.split()[-1])


def _process(contender: Contender, workload: Workload, setup: Setup, draw: Callable[[], object]) -> dict[str, Any]:
    subject = workload.subject
    # A process that exported its network first would hold what no deployment holds.
    if contender.needs_export or setup.on_gpu:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = subject.path
        if contender.from_bundle and not subject.is_bundle:
            from skipstep.bench.contenders.engines import build_engine

            engine = build_engine(subject, setup, backend="onnxruntime", loop="stepwise")
            path = Path(folder) / "bundle"
            engine.save(path, license="for measuring alone", name=subject.name)
        seconds, peak = process_facts(
            str(path),
            contender.name,
            steps=workload.steps,
            batch_size=workload.batch_size,
            threads=setup.threads,
            runs=(contender.backend, contender.precision or "auto"),
        )
    return {"cold_start_seconds": seconds, "peak_bytes": peak}


def _jitter(contender: Contender, workload: Workload, setup: Setup, draw: Callable[[], object]) -> dict[str, Any]:
    """How steady the calls of an engine on a GPU are."""
    if not (contender.ours and setup.on_gpu):
        return {}
    times = []
    for _ in range(20 if setup.simulated else _JITTER_CALLS):
        started = time.perf_counter()
        draw()
        times.append(time.perf_counter() - started)
    ranks = {f"p{percent}": nearest_rank(times, percent) for percent in (50, 90, 99)}
    return {"jitter": {"calls": len(times), **ranks, "max": max(times)}}


# By name: facts of one contender at the smallest batch size, with ten steps where the run has them.
MEASUREMENTS: dict[str, Callable[[Any, Any, Any, Callable[[], object]], dict[str, Any]]] = {
    "throughput": _throughputs,
    "process": _process,
    "jitter": _jitter,
}


def _draw_from_bundle(model: str, steps: int, batch_size: int, threads: int, backend: str, precision: str) -> None:
    """As a product does; neither torch nor the benchmark's contenders are imported."""
    import numpy as np

    from skipstep import load

    engine = load(model, num_threads=threads, backend=backend, precision=precision, allow_hard_links=True)
    network = engine.network
    arguments: dict[str, Any] = {} if network.num_classes is None else {"class_labels": [0] * batch_size}
    if network.prompt_shape is not None:
        arguments["prompt_embeds"] = np.zeros((batch_size, *network.prompt_shape), np.float32)
    plan = next(plan for plan in engine.plans.values() if plan.steps == steps)
    engine.sample(plan=plan, seeds=list(range(batch_size)), **arguments)


def _draw(model: str, contender: str, steps: int, batch_size: int, threads: int) -> None:
    import torch

    from skipstep.bench.contenders import contenders_named
    from skipstep.bench.contenders.workload import Setup, Workload
    from skipstep.bench.models import open_subject

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        subject = open_subject(model, folder=Path(folder))
        plan = subject.plan(steps)
        built = contenders_named([contender])[-1].build(subject, Setup((plan,), (batch_size,), threads=threads))
        built.prepare(Workload(subject, plan, batch_size))()


def main() -> None:
    """The measured process: MODEL CONTENDER STEPS BATCH THREADS BACKEND PRECISION."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("contender")
    for name in ("steps", "batch", "threads"):
        parser.add_argument(name, type=int)
    for name in ("backend", "precision"):
        parser.add_argument(name)
    given = parser.parse_args()
    if Path(given.model, "manifest.json").is_file():
        _draw_from_bundle(given.model, given.steps, given.batch, given.threads, given.backend, given.precision)
    else:
        _draw(given.model, given.contender, given.steps, given.batch, given.threads)
    print(peak_bytes())


def peak_bytes() -> int:
    """What this process held at most."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("this system's /proc does not report peak memory")
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
