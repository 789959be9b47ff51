"""Compare two git revisions of skipstep itself: `python -m skipstep.bench.revisions BEFORE [AFTER] --out FILE`.

Each revision is installed into a temporary folder and runs the bundle that it ships, through the public API alone. In
every round both get a fresh process; the two take turns at each case, in alternating order, and ratios are formed
within a round: a machine whose speed wanders slows both alike.

    latency       milliseconds of a call of ten steps, by batch size and guidance scale
    throughput    calls per second with several threads that call one engine
    start         milliseconds from the start of the process to its first image, and processor time until then
    peak memory   MiB that the process held at most (VmHWM): after its first image, and after the latency cases
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipstep.bench.record import write_json

CASES = (
    *(f"latency batch={batch} guidance={scale}" for batch in (1, 4, 16) for scale in (1, 2)),
    "peak_mib after_latency=1",
    *(f"throughput threads={threads}" for threads in (1, 2, 4, 8)),
)
FIRST = ("start_ms", "start_cpu_ms", "peak_mib first_image=1")
# Runs with nothing but the revision's own package on its path: imports nothing that only one revision has.
_WORKER = r"""
import json, pathlib, statistics, sys, threading, time
import skipstep
bundle = pathlib.Path(skipstep.__file__).parent / "demo" / "fashion-mnist.bundle"
engine = skipstep.load(bundle, allow_hard_links=True)
def draw(batch=1, guidance=1):
    options = {} if guidance == 1 else {"guidance_scale": float(guidance)}
    engine.sample(steps=10, seeds=list(range(batch)), class_labels=[i % 10 for i in range(batch)], **options)
def peak_mib():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
def latency(batch, guidance):
    draw(batch, guidance)
    times = [time.perf_counter()]
    while len(times) < 4 or times[-1] - times[0] < seconds:
        draw(batch, guidance)
        times.append(time.perf_counter())
    return 1e3 * statistics.median(b - a for a, b in zip(times, times[1:]))
def throughput(threads):
    counts, start = [0] * threads, threading.Barrier(threads + 1)
    def call(index):
        start.wait()
        while not counts[index] or time.perf_counter() < deadline:
            draw()
            counts[index] += 1
    callers = [threading.Thread(target=call, args=(index,)) for index in range(threads)]
    [caller.start() for caller in callers]
    begun = time.perf_counter()
    deadline = begun + 2 * seconds
    start.wait()
    [caller.join() for caller in callers]
    return sum(counts) / (time.perf_counter() - begun)
seconds = float(sys.argv[2])
draw()
first = 1e3 * (time.monotonic() - float(sys.argv[1]))
print(json.dumps([first, 1e3 * time.process_time(), peak_mib()]), flush=True)
for line in sys.stdin:
    kind, *facts = line.split()
    numbers = [int(fact.split("=")[1]) for fact in facts]
    print(json.dumps(peak_mib() if kind == "peak_mib" else globals()[kind](*numbers)), flush=True)
"""


def _start(installed: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", _WORKER, str(time.monotonic()), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": ""}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _answer(worker: subprocess.Popen[str], case: str = "") -> Any:
    assert worker.stdin is not None
    assert worker.stdout is not None
    if case:
        print(case, file=worker.stdin, flush=True)
    if not (line := worker.stdout.readline()):
        raise SystemExit("the process of a revision ended; its error stands above")
    return json.loads(line)


def install(repository: Path, revision: str, folder: Path) -> tuple[str, Path]:
    """The revision's commit, and the folder that it is installed in."""
    commit = subprocess.check_output(["git", "rev-parse", f"{revision}^{{commit}}"], cwd=repository, text=True).strip()
    subprocess.run(["git", "archive", "--output", f"{folder}.tar", commit], cwd=repository, check=True)
    shutil.unpack_archive(f"{folder}.tar", folder / "source", filter="data")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--no-build-isolation", "--target", str(folder / "installed"), str(folder / "source")]
    subprocess.run(pip, check=True)
    return commit, folder / "installed"


def compare(installed: Sequence[Path], *, rounds: int, seconds: float, cases: Sequence[str] = CASES) -> dict[str, Any]:
    """Values of each round by case, as [before, after], their medians, and the ratios after/before."""
    values: dict[str, list[list[float]]] = {}
    for round_index in range(-1, rounds):
        order = (0, 1) if round_index % 2 == 0 else (1, 0)
        taken: dict[str, list[float]] = {name: [0.0, 0.0] for name in (*FIRST, *cases)}
        with contextlib.ExitStack() as stack:
            workers: dict[int, subprocess.Popen[str]] = {}
            for which in order:
                workers[which] = _start(installed[which], seconds)
                stack.callback(workers[which].communicate)
                for name, value in zip(FIRST, _answer(workers[which]), strict=True):
                    taken[name][which] = value
            if round_index < 0:  # Its processes warmed the file cache and wrote compiled modules.
                continue
            for case in cases:
                for which in order:
                    taken[case][which] = _answer(workers[which], case)
        for name, pair in taken.items():
            values.setdefault(name, []).append(pair)
    found: dict[str, Any] = {}
    for name, pairs in values.items():
        ratios = [after / before for before, after in pairs]
        medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
        found[name] = {"rounds": pairs, "medians": medians, "ratios": ratios, "median_ratio": statistics.median(ratios)}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=7, help="(default: 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a latency case of a round (default: 1)")
    parser.add_argument("--start-only", action="store_true", help="no calls after the first image")
    parser.add_argument("--repository", type=Path, default=Path(), help="the checkout (default: the current folder)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="skipstep-revisions-") as name:
        before, old = install(options.repository, options.before, Path(name) / "before")
        after, new = install(options.repository, options.after, Path(name) / "after")
        cases = compare(
            [old, new],
            rounds=options.rounds,
            seconds=options.seconds,
            cases=() if options.start_only else CASES,
        )
    write_json(options.out, {"commits": {"before": before, "after": after}, "cases": cases})
    for case, found in cases.items():
        print(f"{case:34} {found['medians'][0]:9.2f} {found['medians'][1]:9.2f} ratio {found['median_ratio']:6.3f}")


if __name__ == "__main__":
    main()
