"""`pytest bench --model …`: what it collects, groups, records and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_suite import save_model

from skipstep.bench.results import read_run

ROOT = Path(__file__).parents[2]


def run_suite(*arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", *map(str, arguments), "--threads", "1", "-p", "no:cacheprovider"]
    # A suite that is itself one of several processes would otherwise pass that on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    model = save_model(folder / "my-checkpoint")
    done = run_suite(
        *("bench", "--model", model, "--plans", "1,2", "--batch", "1,2", "--budget", "6"),
        *("--contenders", "textbook,skipstep-torch-stepwise,skipstep-captured"),
        *("--results", folder / "run.json", f"--benchmark-json={folder / 'benchmark.json'}"),
    )
    return done, folder


def test_one_benchmark_a_contender_in_groups_by_case(measured):
    done, folder = measured
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "benchmark.json").read_text())
    groups = {each["group"] for each in found["benchmarks"]}
    assert groups == {f"my-checkpoint, {s} steps, batch {b}, float32" for s in (1, 2) for b in (1, 2)}
    present = 3 if "absent" not in done.stdout else 2
    assert len(found["benchmarks"]) == 4 * present
    assert "node" not in found["machine_info"]


def test_what_it_records_is_what_was_measured_in_turns(measured):
    _, folder = measured
    run = read_run(folder / "run.json")
    benchmarks = json.loads((folder / "benchmark.json").read_text())["benchmarks"]
    case = run.cases[0]
    ours = case.contender("skipstep-torch-stepwise")
    (recorded,) = [
        each
        for each in benchmarks
        if each["group"] == case.name and each["extra_info"]["contender"] == "skipstep-torch-stepwise"
    ]
    assert tuple(recorded["stats"]["data"]) == ours.seconds
    facts = recorded["extra_info"]
    assert facts["plan_key"] == case.plan
    assert facts["ratio_to_textbook"] == ours.ratio
    assert min(ours.seconds) <= facts["p50_seconds"] <= facts["p99_seconds"] == max(ours.seconds)
    assert {"backend", "loop", "nodes_per_step", "bytes_per_step", "torch", "machine_class", "commit"} <= set(facts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plans", "0"), "plans 0; expected positive numbers"),
        (("--plans", "ten"), "no list of integers"),
        (("--contenders", "nobody"), "expected names among textbook"),
        (("--model", "no-such-folder"), "a diffusers folder or a bundle"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    done = run_suite("bench", *arguments)
    assert done.returncode == 4
    assert message in done.stdout + done.stderr
