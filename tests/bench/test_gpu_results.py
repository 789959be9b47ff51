"""What the GPU gate makes of its measurements: proofs, the memory checker's report, aims and the page."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from skipstep.bench.gpu import memory_check, proofs
from skipstep.bench.gpu.aims import hold_against_aims, write_aims
from skipstep.bench.gpu.device import Trace
from skipstep.bench.gpu.report import NOT_RUN, gpu_tables
from skipstep.bench.gpu.tasks import CAPTURED, EAGER, REPLAYED
from skipstep.bench.gpu.wheels import lacking
from skipstep.bench.record import environment, write_whole
from skipstep.errors import InputError

ROOT = Path(__file__).parents[2]

REPORT = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at {kernel}+0x90 in memory_check.py:24
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f0000400000 is out of bounds
"""


@pytest.mark.parametrize(
    ("kernels", "status", "says"),
    [
        (["planted_write_kernel"], "ok", "only the planted write"),
        (["planted_write_kernel", "ddim_step_kernel"], "failed", "ddim_step_kernel"),
        ([], "failed", "planted write was not reported"),
    ],
)
def test_a_memory_checker_must_find_the_planted_write_and_nothing_else(tmp_path, monkeypatch, kernels, status, says):
    tool = tmp_path / memory_check.TOOL
    said = "".join(REPORT.format(kernel=kernel) for kernel in kernels)
    # Its probe works; the kernels themselves would need the device.
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{said}Version 2025.3.1\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts, verdict = memory_check.check_memory(dry_run=False)
    assert (verdict.status, facts["version"]) == (status, "Version 2025.3.1")
    assert says in verdict.reason
    assert facts["reports"] == dict(Counter(kernels))


def test_a_memory_checker_that_does_not_work_here_is_absent_and_says_why(tmp_path, monkeypatch):
    tool = tmp_path / memory_check.TOOL
    tool.write_text("#!/bin/sh\necho '========= Device not supported'\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _, verdict = memory_check.check_memory(dry_run=False)
    assert verdict.status == "absent"
    assert "Device not supported" in verdict.reason


@pytest.mark.parametrize(
    ("functions", "says"),
    [
        ({"cudaGraphLaunch": 1, "cudaMemcpyAsync": 2, "cudaEventSynchronize": 1}, ""),
        ({"cudaGraphLaunch": 20, "cudaEventSynchronize": 1}, "20 graph launches"),
        ({"cuGraphLaunch": 1, "cuLaunchKernelEx": 2, "cudaLaunchKernel": 1}, "3 kernels launched outside"),
        ({"cudaGraphLaunch": 1, "cudaStreamSynchronize": 2, "cudaEventSynchronize": 1}, "waited 3 times"),
    ],
)
def test_proofs_count_launches_and_waits(functions, says):
    facts = {**proofs.count(Trace(functions, 61)), "functions": functions, "refused": "", "same_result": True}
    verdict = proofs.judge(facts)
    assert verdict.status == ("failed" if says else "ok")
    assert says in verdict.reason


def test_a_proof_without_a_trace_proves_nothing():
    facts = {**proofs.count(Trace({}, 0)), "functions": {}, "refused": "", "same_result": True}
    assert proofs.judge(facts).status == "absent"
    assert proofs.judge({**facts, "refused": "called a synchronizing operation"}).status == "failed"
    assert proofs.judge({**facts, "same_result": False}).status == "failed"


def write_measured(folder: Path, *, ours: float, eager: float, replayed: float) -> None:
    """Medians that lie on lines of so many seconds per step; the 256×256 network is 1 ms a step, and 0.99 alone."""

    def benchmark(model: str, name: str, steps: int, seconds: float, **facts: object) -> dict:
        captures = [{"num_nodes": 300 * steps, "num_stages": steps, "loop": "captured"}]
        extra = {"model": model, "contender": name, "batch_size": 1, "plan": {"steps": steps}, "build_seconds": 1.0}
        return {"stats": {"data": [seconds * steps] * 3}, "extra_info": {**extra, "captures": captures, **facts}}

    benchmarks = [
        benchmark("cifar10-architecture", name, steps, seconds)
        for name, seconds in {CAPTURED: ours, EAGER: eager, REPLAYED: replayed}.items()
        for steps in (10, 20, 50)
    ]
    large = "celebahq256-architecture"
    benchmarks += [benchmark(large, CAPTURED, steps, 1e-3) for steps in (10, 20, 50)]
    benchmarks += [benchmark(large, REPLAYED, 50, 1e-3, network_seconds=0.99e-3)]
    absent = {"model": large, "contender": "skipstep-tensorrt", "batch_size": 1, "status": "absent", "reason": "a | b"}
    write_whole(folder / "latency-all.json", {"benchmarks": benchmarks, "skipstep": {"absent": [absent]}})


def test_the_aims_are_held_against_what_was_measured(tmp_path):
    assert {aim.met for aim in hold_against_aims(tmp_path)} == {None}
    write_measured(tmp_path, ours=0.3e-3, eager=2.4e-3, replayed=0.6e-3)
    write_whole(
        tmp_path / "step-kernel.json",
        {"cases": [{"bytes": 1 << 30, "step_against_copy": 0.95}, {"bytes": 4096, "step_against_copy": 0.2}]},
    )
    write_whole(tmp_path / "proofs.json", {"graph_launches": 1, "kernel_launches": 0, "waits": 2})
    found = [(round(aim.measured, 3), aim.met) for aim in hold_against_aims(tmp_path)]
    assert found == [
        (0.3, True),
        (8.0, False),
        (2.0, True),
        (1.01, False),
        (95.0, True),
        (1.0, True),
        (0.0, True),
        (2.0, False),
    ]


def test_the_page_shows_a_run_and_says_where_there_is_none(tmp_path):
    assert gpu_tables(tmp_path) == NOT_RUN
    folder = tmp_path / "gpu"
    facts = {"gpu": "NVIDIA H200", "cpu": "x", "cores": 16, "commit": "abc"}
    record = {"task": "kernels", "status": "ok"}
    write_whole(folder / "summary.json", {"environment": facts, "dry_run": False, "tasks": [record]})
    write_measured(folder, ours=0.3e-3, eager=2.4e-3, replayed=0.6e-3)
    case = {"state_bytes": 1 << 30, "dtype": "float16", "eta": 0.0, "guided": False}
    write_whole(folder / "step-kernel.json", {"cases": [{**case, "bytes": 3 << 30, "step_against_copy": 0.93}]})
    write_aims(folder, facts)
    page = gpu_tables(tmp_path)
    assert "| cifar10-architecture | 1 | diffusers | 2.400 | 8.00× | 300 |" in page
    assert "absent: a ¦ b" in page
    assert "| CIFAR-10 UNet at batch 1, a step | at most 0.4 ms | 0.3 ms | yes |" in page
    assert "| 1 GiB | 93% |" in page
    assert "NVIDIA H200, 16 cores" in page
    assert "kernels ok" in page
    write_whole(folder / "summary.json", {"environment": facts, "dry_run": True, "tasks": []})
    with pytest.raises(InputError, match="dry run"):
        gpu_tables(tmp_path)


def test_the_committed_results_make_a_page():
    assert gpu_tables(ROOT / "bench" / "results")


def test_only_what_is_lacking_is_installed():
    wheels = [Path("NumPy-9.9-cp312-cp312-any.whl"), Path("no_such_package-1.0-py3-none-any.whl")]
    assert lacking(wheels) == [wheels[1]]
    named = [line.split("=")[0].split(">")[0] for line in (ROOT / ".ci" / "gpu-wheels.txt").read_text().splitlines()]
    assert not {"torch", "triton", "numpy"} & set(named)


def test_the_commit_travels_without_git(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment(simulated=True)["commit"] == "unknown"
    (tmp_path / ".gpu-wheels").mkdir()
    (tmp_path / ".gpu-wheels" / "COMMIT").write_text("0123abc\n")
    assert environment(simulated=True)["commit"] == "0123abc"
    monkeypatch.setenv("GATE_COMMIT", "feed123")
    assert environment(simulated=True)["commit"] == "feed123"


def test_numbers_that_are_none_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_whole(tmp_path / "x.json", {"seconds": float("nan")})
    assert list(tmp_path.iterdir()) == []
