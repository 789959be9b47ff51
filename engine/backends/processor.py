"""The processor, as compiled code depends on it, and how much of it this process may use."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import lru_cache
from pathlib import Path

# Of /proc/cpuinfo: the model, and the instructions that it has (flags on x86, Features on ARM).
_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU part", "Features")


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
    cores = {_read(root / f"sys/devices/system/cpu/cpu{each}/topology/thread_siblings_list") or each for each in mine}
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


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
