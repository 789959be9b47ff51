"""The GPU gate without a GPU: a dry run of all of it, faults planted in its tasks, and what it makes of numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from skipstep.bench.architectures import ARCHITECTURES
from skipstep.bench.contenders import CONTENDERS
from skipstep.bench.gpu.__main__ import Gate, main
from skipstep.bench.gpu.correctness import GROUPS
from skipstep.bench.gpu.latency import latency_rows, seconds_per_step
from skipstep.bench.gpu.process import run_limited
from skipstep.bench.gpu.tasks import BUDGET, CAPTURED, EAGER, REPLAYED, TASKS, Task, limit_for
from skipstep.errors import DeviceUnavailableError

ROOT = Path(__file__).parents[2]


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
    ended = run_limited([sys.executable, "-c", script], seconds=1, environment=os.environ, log=tmp_path / "log")
    assert ended.status is None
    assert ended.seconds < 20
    assert "begun" in ended.tail
    time.sleep(2)
    assert not (tmp_path / "late").exists()


WRITES_LATE = "import sys, time; time.sleep(2.5); open(sys.argv[1], 'w')"


def test_a_group_of_tests_is_right_only_if_some_passed_and_none_failed(tmp_path):
    groups = [
        ("def test_a(): pass", "ok", {"passed": 1, "failed": 0, "skipped": 0}),
        ("def test_a(): pass\ndef test_b(): assert 1 == 2", "failed", {"passed": 1, "failed": 1, "skipped": 0}),
        ("import pytest\ndef test_a(): pytest.skip('no GPU')", "failed", {"passed": 0, "failed": 0, "skipped": 1}),
        ("import nothing_of_that_name", "failed", {"passed": 0, "failed": 1, "skipped": 0}),
    ]
    for place, (test, *_) in enumerate(groups):
        (tmp_path / f"test_{place}.py").write_text(test)
    script = "import json\nfrom skipstep.bench.gpu.correctness import run_tests\n"
    script += f"found = [run_tests([f'test_{{place}}.py']) for place in range({len(groups)})]\n"
    script += "open('found.json', 'w').write(json.dumps([[verdict.status, results] for results, verdict in found]))"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    for (test, *expected), (status, results) in zip(
        groups, json.loads((tmp_path / "found.json").read_text()), strict=True
    ):
        assert [status, results["outcomes"]] == expected, test
        assert len(results["failures"]) == results["outcomes"]["failed"]
        assert ["no GPU" in reason for reason in results["skipped"]] == [True] * results["outcomes"]["skipped"]


def test_the_groups_name_tests_that_there_are():
    for patterns, few in GROUPS.values():
        assert [path for pattern in patterns for path in ROOT.glob(pattern)]
        assert (ROOT / few[0]).exists()


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


@pytest.mark.slow
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
        "tests/kernels/test_aot.py::test_generated_code[device]",
        "tests/kernels/test_aot.py::test_generated_code_of_samples_at_their_own_stages_and_in_other_orders[device]",
        "tests/kernels/test_aot.py::test_generated_code_of_norms[device]",
    ]
    assert sum("test_step_kernel" in line for line in found["kernels"]) > 20
    assert sum("test_cuda.py" in line for line in found["engine"]) > 10
    assert not [line for line in found["engine"] if "test_cuda_driver" in line]


@pytest.mark.parametrize(("name", "millions"), [("cifar10", 35.7), ("celeba64", 78.7), ("celebahq256", 113.7)])
def test_networks_have_the_sizes_that_were_published(name, millions):
    with torch.device("meta"):
        unet, _ = ARCHITECTURES[f"{name}-architecture"]()
    assert sum(parameter.numel() for parameter in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
