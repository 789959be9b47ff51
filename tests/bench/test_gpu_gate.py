"""The GPU gate without a GPU: a dry run of all of it, faults planted in its tasks, and what it makes of numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from skipstep.bench.architectures import ARCHITECTURES
from skipstep.bench.contenders import CONTENDERS
from skipstep.bench.gpu import memory_check, proofs
from skipstep.bench.gpu.__main__ import Gate, main
from skipstep.bench.gpu.aims import hold_against_aims, write_aims
from skipstep.bench.gpu.correctness import GROUPS
from skipstep.bench.gpu.device import Trace
from skipstep.bench.gpu.latency import latency_rows, seconds_per_step
from skipstep.bench.gpu.process import run_limited
from skipstep.bench.gpu.report import NOT_RUN, gpu_tables
from skipstep.bench.gpu.tasks import BUDGET, CAPTURED, EAGER, REPLAYED, TASKS, Task, limit_for
from skipstep.bench.gpu.wheels import lacking
from skipstep.bench.record import environment, write_whole
from skipstep.errors import DeviceUnavailableError, InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The whole gate, as make gpu runs it but for --dry-run."""
    folder = tmp_path_factory.mktemp("gate")
    command = [
        sys.executable,
        "-m",
        "skipstep.bench.gpu",
        "--dry-run",
        "--out",
        folder / "out",
        "--cache",
        folder / "c",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ended, folder / "out"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_does_everything_and_passes(dry_run):
    ended, out = dry_run
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = read(out / "summary.json")
    assert summary["complete"]
    assert summary["passed"]
    statuses = {each["task"]: each["status"] for each in summary["tasks"]}
    assert list(statuses) == [task.name for task in TASKS]
    assert set(statuses.values()) <= {"ok", "absent"}
    # What a machine without the tool or the library may lack, and nothing else.
    assert {name for name, status in statuses.items() if status == "absent"} <= {"memory-check", "latency-tensorrt"}
    for task in TASKS:
        assert f"{task.name}  " in ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_file_of_a_dry_run_says_where_it_comes_from(dry_run):
    _, out = dry_run
    names = {task.file for task in TASKS} | {"aims.json", "summary.json"}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        contents = read(out / name)
        if name.startswith("latency-"):
            facts = contents["skipstep"]
            assert facts["machine"].startswith("dry run on ")
            assert facts["versions"]["torch"] == torch.__version__
            continue
        facts = contents["environment"]
        assert facts["machine_class"].startswith("dry run on ")
        assert facts["commit"]
        assert facts["torch"] == torch.__version__
    for name, keys in {
        "kernels.json": {"status", "outcomes", "failures", "skipped", "seconds_by_file"},
        "engine.json": {"status", "outcomes", "failures", "skipped", "seconds_by_file"},
        "memory-check.json": {"status", "reason"},
        "proofs.json": {"status", "functions", "graph_launches", "kernel_launches", "waits", "refused", "same_result"},
        "step-kernel.json": {"status", "cases"},
        "aims.json": {"aims"},
    }.items():
        assert keys <= set(read(out / name)), name
    assert read(out / "kernels.json")["outcomes"]["passed"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_contender_of_a_dry_run_is_checked_and_timed(dry_run):
    _, out = dry_run
    rows = list(latency_rows(out))
    expected = {name for task in TASKS for name in task.contenders}
    absent = {each["contender"] for path in out.glob("latency-*.json") for each in read(path)["skipstep"]["absent"]}
    assert {row["contender"] for row in rows} | absent == expected
    assert absent <= {"skipstep-tensorrt"}
    assert {row["batch_size"] for row in rows} == {1, 2}
    for row in rows:
        assert row["plan"]["key"]
        # The fewest steps are checked.
        assert (row["error"] is None) == (row["plan"]["steps"] != 2)
        assert row["error"] is None or 0 <= row["error"] <= row["tolerance"]
    assert {(1, CAPTURED), (2, EAGER)} <= {key[1:] for key in seconds_per_step(out)}
    [jitter] = [row["jitter"] for row in rows if "jitter" in row and row["contender"] == CAPTURED]
    assert 0 < jitter["p50"] <= jitter["p90"] <= jitter["p99"] <= jitter["max"]
    assert {row["contender"] for row in rows if "network_seconds" in row} == {REPLAYED}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_step_kernel_is_measured_beside_a_copy(dry_run):
    _, out = dry_run
    cases = read(out / "step-kernel.json")["cases"]
    assert {(case["dtype"], case["eta"], case["guided"]) for case in cases} == {
        (dtype, eta, guided)
        for dtype in ("float16", "bfloat16", "float32")
        for eta, guided in ((0.0, False), (1.0, False), (0.0, True))
    }
    # State in and out in float32, the network's two tensors in its dtype, twice where it is guided.
    [half] = [c for c in cases if c["dtype"] == "float16" and not c["guided"] and c["eta"] == 0]
    assert half["bytes"] == 3 * half["state_bytes"]
    assert all(case["step_against_copy"] > 0 for case in cases)


@pytest.mark.slow
def test_planted_faults_are_reported_and_fail_the_gate(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    tasks = (
        Task("kernels", 60),
        Task("step-kernel", 60, needs=("kernels",)),
        Task("latency-skipstep", 120),
        Task("proofs", 3),
    )
    plants = {"kernels": "raise", "latency-skipstep": "wrong", "proofs": "hang"}
    budget = sum(task.seconds for task in tasks[:-1])
    gate = Gate(tmp_path / "out", dry_run=True, cache=tmp_path / "c", tasks=tasks, plants=plants, budget=budget)
    # What the earlier ones left would let the last hang for minutes.
    monkeypatch.setattr("skipstep.bench.gpu.__main__.limit_for", lambda later, remaining: 120.0 if later else 3.0)
    assert gate.run() is False
    assert {name: verdict.status for name, verdict in gate.verdicts.items()} == {
        "kernels": "failed",
        "step-kernel": "not run",
        "latency-skipstep": "failed",
        "proofs": "timed out",
    }
    assert "RuntimeError: planted" in gate.verdicts["kernels"].reason
    assert "skipstep-captured] wrong: samples are off by" in gate.verdicts["latency-skipstep"].reason
    summary = read(tmp_path / "out" / "summary.json")
    assert not summary["passed"]
    assert "RuntimeError: planted" in summary["tasks"][0]["tail"]
    # No number for what is not correct.
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name not in ("aims.json", "summary.json")] == []


def test_without_a_gpu_it_says_what_to_do(tmp_path, capsys, monkeypatch):
    def no_device(*, remedy: str) -> None:
        raise DeviceUnavailableError(got="a machine without a CUDA driver", expected="a CUDA device", remedy=remedy)

    monkeypatch.setattr("skipstep.bench.gpu.__main__.cuda_device", no_device)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "Remedy: run make gpu where nvidia-smi lists a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_limits_together_stay_below_ten_minutes():
    # Something is left for starting twelve processes and writing the summary.
    assert sum(task.seconds for task in TASKS) + 10 <= BUDGET <= 540
    # However long each takes of what it may, the last one ends within the budget.
    remaining = BUDGET
    for index in range(len(TASKS)):
        limit = limit_for(TASKS[index + 1 :], remaining=remaining)
        assert TASKS[index].seconds - 1e-9 <= limit <= remaining
        remaining -= limit
    assert remaining >= 0


def test_a_task_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    script = "import subprocess, sys, time\nprint('begun', flush=True)\n"
    script += f"subprocess.Popen([sys.executable, '-c', {WRITES_LATE!r}, {str(tmp_path / 'late')!r}])\ntime.sleep(60)"
    ended = run_limited([sys.executable, "-c", script], seconds=2, environment=os.environ, log=tmp_path / "log")
    assert ended.status is None
    assert ended.seconds < 20
    assert "begun" in ended.tail
    time.sleep(4)
    assert not (tmp_path / "late").exists()


WRITES_LATE = "import sys, time; time.sleep(5); open(sys.argv[1], 'w')"


@pytest.mark.parametrize(
    ("test", "status", "outcomes"),
    [
        ("def test_a(): pass", "ok", {"passed": 1, "failed": 0, "skipped": 0}),
        ("def test_a(): pass\ndef test_b(): assert 1 == 2", "failed", {"passed": 1, "failed": 1, "skipped": 0}),
        ("import pytest\ndef test_a(): pytest.skip('no GPU')", "failed", {"passed": 0, "failed": 0, "skipped": 1}),
        ("import nothing_of_that_name", "failed", {"passed": 0, "failed": 1, "skipped": 0}),
    ],
)
def test_a_group_of_tests_is_right_only_if_some_passed_and_none_failed(tmp_path, test, status, outcomes):
    (tmp_path / "test_it.py").write_text(test)
    script = "import json, sys\nfrom skipstep.bench.gpu.correctness import run_tests\n"
    script += "results, verdict = run_tests(['test_it.py'])\n"
    script += "open('found.json', 'w').write(json.dumps([verdict.status, verdict.reason, results]))"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    found, _, results = json.loads((tmp_path / "found.json").read_text())
    assert (found, results["outcomes"]) == (status, outcomes)
    assert len(results["failures"]) == outcomes["failed"]
    if outcomes["skipped"]:
        assert "no GPU" in next(iter(results["skipped"]))


def test_the_groups_name_tests_that_there_are():
    for patterns, few in GROUPS.values():
        assert [path for pattern in patterns for path in ROOT.glob(pattern)]
        assert (ROOT / few[0]).exists()


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


def test_a_proof_that_nobody_could_look_at_is_none():
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


def test_tasks_and_contenders_fit_together():
    names = [name for task in TASKS for name in task.contenders]
    assert len(set(names)) == len(names)
    assert {CAPTURED, EAGER, REPLAYED} <= set(names) <= set(CONTENDERS)
    # No benchmark number of ours where the kernels or the engine are red.
    for task in TASKS:
        assert bool(task.contenders) == bool(task.models) == task.name.startswith("latency-")
        if any(name.startswith("skipstep") for name in task.contenders):
            assert set(task.needs) == {"kernels", "engine"}
    # TensorRT's builds take the time that is left.
    assert (TASKS[-1].name, TASKS[-1].decides) == ("latency-tensorrt", False)


def test_the_correctness_tasks_run_the_tests_that_use_the_gpu():
    """Collected as on a machine with a GPU: kernel tests, one architecture of those compiled, no slow test."""
    code = "import torch; torch.cuda.is_available = lambda: True\n"
    code += "from skipstep.bench.gpu.correctness import check_group\n"
    code += "import pytest, sys\nrun = pytest.main\n"
    code += "def collect(arguments, plugins): return run([*without_workers(arguments), '--collect-only'], plugins)\n"
    code += "def without_workers(given): return given[: given.index('-n')] + given[given.index('-n') + 4 :]\n"
    code += "pytest.main = collect\nfor group in sys.argv[1:]: print('group', group); check_group(group, dry_run=False)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-c", code, *GROUPS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    found = {}
    for text in done.stdout.split("group ")[1:]:
        group, *lines = text.splitlines()
        found[group] = [line for line in lines if "::" in line]
    assert [line for line in found["kernels"] if "test_aot" in line] == [
        "tests/kernels/test_aot.py::test_generated_code[device]"
    ]
    assert sum("test_step_kernel" in line for line in found["kernels"]) > 20
    assert sum("test_cuda.py" in line for line in found["engine"]) > 10
    assert not [line for line in found["engine"] if "test_cuda_driver" in line]


@pytest.mark.parametrize(("name", "millions"), [("cifar10", 35.7), ("celeba64", 78.7), ("celebahq256", 113.7)])
def test_networks_have_the_sizes_that_were_published(name, millions):
    with torch.device("meta"):
        unet, _ = ARCHITECTURES[f"{name}-architecture"]()
    assert sum(parameter.numel() for parameter in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


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
