"""How many threads a runtime gets: affinity, and control groups in trees of files like the kernel's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from skipstep.backends import processor
from skipstep.backends.processor import thread_limit

# Eight CPUs, of which two at a time are one core.
SIBLINGS = {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}\n" for n in range(8)}
V2 = "sys/fs/cgroup"
V1 = {"proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n0::/\n"}
INNER = {"proc/self/cgroup": "0::/a/b\n"}


def quota_v1(folder: str, quota: int, period: int = 100000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function from files and the process's CPUs to the thread limit of a machine with eight CPUs."""

    def made(files: dict[str, str], mine: range = range(8)) -> int | None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr("os.cpu_count", lambda: 8)
        monkeypatch.setattr(processor, "cpus", lambda: set(mine))
        return thread_limit.__wrapped__(tmp_path)

    return made


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "300000 100000\n"}, 3),
        # More than the process's CPUs are worth is no limit of its own.
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "6400000 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "50000 100000\n"}, 1),
        # Of nested groups the narrowest counts, wherever it is.
        ({**INNER, f"{V2}/a/b/cpu.max": "max 100000\n", f"{V2}/a/cpu.max": "200000 100000\n"}, 2),
        ({**INNER, f"{V2}/a/b/cpu.max": "300000 100000\n", f"{V2}/a/cpu.max": "700000 100000\n"}, 3),
        # The host's path, of which the container sees only the end.
        ({**INNER, f"{V2}/cpu.max": "150000 50000\n"}, 3),
        ({**V1, **quota_v1(f"{V2}/cpu,cpuacct/docker/a", -1)}, None),
        ({**V1, **quota_v1(f"{V2}/cpu,cpuacct/docker/a", 200000)}, 2),
        ({**V1, **quota_v1(f"{V2}/cpu", 40000, 10000)}, 4),
        # A quota in the memory controller's folder is none.
        ({**V1, **quota_v1(f"{V2}/memory", 100000)}, None),
        ({**V1, f"{V2}/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "200000\n"}, None),
    ],
)
def test_quotas_of_both_versions_of_control_groups(machine, files, expected):
    assert machine(files) == expected


def test_affinity_counts_cores_and_not_their_halves(machine):
    assert machine(SIBLINGS, range(8)) is None
    assert machine(SIBLINGS, range(3)) == 3
    assert machine(SIBLINGS, range(2, 8)) == 4


def test_without_topology_each_cpu_is_a_core_and_the_quota_counts_too(machine):
    assert machine({}, range(6)) == 6
    assert machine({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "200000 100000\n"}, range(6)) == 2


@pytest.mark.skipif(not hasattr(processor.os, "sched_setaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_process_on_one_cpu_computes_with_one_thread(name):
    """Of the process that may run on one of the machine's CPUs: the threads that a session adds, counted."""
    if len(processor.cpus()) < 2:
        pytest.skip("one CPU")
    pytest.importorskip(name)
    code = f"""
import os, sys
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
import skipstep
from skipstep.demo import SHIPPED_BUNDLE
engine = skipstep.load(SHIPPED_BUNDLE, allow_hard_links=True, backend={name!r})
engine.sample(steps=4, seeds=1, class_labels=0)
assert engine.identity().threads == 1, engine.identity()
if {name!r} == "openvino":
    from skipstep.backends.openvino_library import settings
    assert settings("float32", None)["INFERENCE_NUM_THREADS"] == 1
    assert settings("float32", 2)["INFERENCE_NUM_THREADS"] == 2
else:
    from skipstep.backends.onnxruntime import make_session
    before = len(os.listdir("/proc/self/task"))
    graph = open(SHIPPED_BUNDLE / "network" / "step.onnx", "rb").read()
    one = make_session(graph)
    between = len(os.listdir("/proc/self/task"))
    two = make_session(graph, num_threads=2)
    # The thread that calls is the first of those that compute.
    assert (between - before, len(os.listdir("/proc/self/task")) - between) == (0, 1)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


def test_this_machine_s_own_limit_is_within_its_cpus():
    limit = thread_limit()
    assert limit is None or 1 <= limit <= len(processor.cpus())
    assert processor._quota(Path("/")) is None or processor._quota(Path("/")) > 0
