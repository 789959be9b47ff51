"""The processor: what compiled code depends on, how much of it this process may use, how a batch is divided over it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import threading
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

# Of /proc/cpuinfo: the model, and the instructions that it has (flags on x86, Features on ARM).
_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU part", "Features")
# With two threads every batch that was measured is faster in two parts (bench/results/README.md). More were not tried.
_FEW_THREADS = 4


@lru_cache(maxsize=1)
def processor() -> str:
    """What the first processor says of its model and its instructions, as sha256; equal for equal processors."""
    return hashlib.sha256("\n".join(_described()).encode()).hexdigest()


def has_vnni() -> bool:
    """Whether it adds products of 8 bits in 32. Other processors than x86 are taken to."""
    flags = {word for line in _described() if line.startswith("flags=") for word in line[6:].split()}
    return not flags or bool(flags & {"avx512_vnni", "avx_vnni"})


@lru_cache(maxsize=1)
def _described() -> list[str]:
    found = [platform.machine()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if not line.strip():
                    break
                name, _, value = line.partition(":")
                if name.strip() in _FIELDS:
                    found.append(f"{name.strip()}={' '.join(sorted(value.split()))}")
    except OSError:
        found.append(platform.processor())
    return found


def cpus() -> set[int]:
    """The CPUs that the process may run on: its affinity, which taskset, numactl and a container's cpuset set."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


@lru_cache(maxsize=1)
def thread_limit(root: Path = Path("/")) -> int | None:
    """How many threads a runtime should compute with where this process may not use the whole machine; None where it
    may. A runtime counts the machine's cores, and does not know of a container's limit.

    Affinity: a thread for each core of it, however many CPUs that core counts as. A quota of CPU time: rounded down,
    since a thread more would be stopped for part of every period, and the others would wait for it.
    """
    mine = cpus()
    quota = _quota(root)
    if quota is None and len(mine) >= (os.cpu_count() or 1):
        return None
    cores = _num_cores(mine, root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def num_threads(asked: int | None) -> int:
    """How many threads a runtime computes with: as many as were asked for, or one for each core that it may use."""
    return asked or thread_limit() or _num_cores(cpus(), Path("/"))


def _num_cores(mine: set[int], root: Path) -> int:
    return len(
        {_read(root / f"sys/devices/system/cpu/cpu{each}/topology/thread_siblings_list") or each for each in mine}
    )


class Splits:
    """Into how many parts a batch is divided, by its rows: the network is evaluated on all of them at once.

        1 part     one run, each of whose operators is divided over all threads
        p parts    p runs side by side, each on a p-th of the rows and threads: none waits at every operator

    Numbers are the same, and which form is faster is measured: `measured` holds what `calibrate` found. What was not
    measured is divided by threads where these are few; many would each read all weights for a row or two. With as many
    `calls` at once as threads, nothing is divided: each call has a thread of its own.
    `num_threads`: of a backend that can divide; 1 of any other.
    """

    def __init__(self) -> None:
        self.num_threads = 1
        self.measured: dict[int, int] = {}
        self._calls = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A call that is being drawn."""
        with self._lock:
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1

    @contextlib.contextmanager
    def undivided(self) -> Iterator[None]:
        """Batches stay whole: only then does it show that a network mixes the samples of a batch."""
        threads, self.num_threads = self.num_threads, 1
        try:
            yield
        finally:
            self.num_threads = threads

    @property
    def crowded(self) -> bool:
        return 1 < self.num_threads <= self._calls

    def parts(self, rows: int) -> int:
        by_rule = self.num_threads if self.num_threads <= _FEW_THREADS and rows % self.num_threads == 0 else 1
        whole = self.num_threads == 1 or self.crowded
        return 1 if whole else min(rows, self.measured.get(rows) or by_rule)

    def choices(self, rows: int) -> list[int]:
        """The numbers of parts to measure: those that divide rows and threads evenly. All others are slower."""
        return [parts for parts in range(1, rows + 1) if self.num_threads % parts == rows % parts == 0]

    @staticmethod
    def slices(rows: int, parts: int) -> list[slice]:
        """The rows of each part: as many, or one more in some."""
        ends = [rows * part // parts for part in range(parts + 1)]
        return [slice(begin, end) for begin, end in pairwise(ends)]


def _quota(root: Path) -> float | None:
    """CPUs' worth of time that control groups leave this process: the least of its group's and those above."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mounts = [""] if not controllers else [controllers, "cpu"] if "cpu" in controllers.split(",") else []
        for mount in mounts:
            top = root / "sys/fs/cgroup" / mount
            # In a container the path may be the host's: the group itself is then at the top.
            below = Path(group.strip("/"))
            for folder in (top / below, *(top / each for each in below.parents)):
                limits += _limits(folder)
    return min(limits, default=None)


def _limits(folder: Path) -> list[float]:
    both = _read(folder / "cpu.max").split() or [
        _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    # "max" and -1 are no limit.
    return [int(both[0]) / int(both[1])] if len(both) == 2 and all(each.isdecimal() for each in both) else []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
