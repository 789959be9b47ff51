from __future__ import annotations

import argparse
import importlib
import re
import shlex
import time
from pathlib import Path

import pytest

from skipstep.bench import planted
from skipstep.bench.compare import compare_runs
from skipstep.bench.record import write_json
from skipstep.commands.main import COMMANDS
from skipstep.errors import InputError

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / "bench" / "ci" / "github-workflow.yml"


@pytest.fixture(scope="module")
def trial():
    return planted.Trial(steps=(1,))


def test_a_run_holds_both_contenders_in_turn_and_can_be_compared(trial):
    run = trial.run(rounds=3)
    assert [case.steps for case in run.cases] == [1]
    assert [(each.name, len(each.seconds)) for each in run.cases[0].contenders] == [
        ("textbook", 3),
        (planted.ENGINE, 3),
    ]
    comparison = compare_runs(run, run)
    assert comparison.passed
    record = planted.as_record(comparison, slowed=False)
    assert record["cases"][0]["slowdown"] == 0.0
    assert not record["cases"][0]["measured_again"]


class Clock:
    """Time that passes when it is spent, so that verdicts do not depend on what else the machine does."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("skipstep.bench.timing.time", clock)
    monkeypatch.setattr("skipstep.bench.planted.time", clock)
    return clock


def test_each_pair_holds_an_unchanged_run_that_passes_and_a_slowed_one_that_fails(trial, clock, monkeypatch):
    draws = {"textbook": lambda: clock.sleep(0.03), planted.ENGINE: lambda: clock.sleep(0.01)}
    monkeypatch.setitem(trial.draws, 1, draws)
    baseline = trial.run(rounds=9)
    unchanged, slow = planted.judged_pair(trial, baseline, 5)
    assert (unchanged["slowed"], unchanged["passed"]) == (False, True)
    assert (slow["slowed"], slow["passed"]) == (True, False)
    assert unchanged["cases"][0]["slowdown"] == pytest.approx(0.0, abs=1e-3)
    assert slow["cases"][0]["slowdown"] == pytest.approx(0.15, abs=1e-3)
    # What looks slow was measured again, still slowed.
    assert [each["cases"][0]["measured_again"] for each in (unchanged, slow)] == [False, True]
    assert slow["cases"][0]["turns"] == 5 * planted.MORE_TURNS


def test_a_busy_machine_is_neither_a_pass_nor_a_catch(trial, clock, monkeypatch):
    monkeypatch.setitem(trial.draws, 1, {name: lambda: clock.sleep(0.01) for name in ("textbook", planted.ENGINE)})
    baseline = trial.run(rounds=9)
    monkeypatch.setitem(trial.draws, 1, {name: lambda: clock.sleep(0.05) for name in ("textbook", planted.ENGINE)})
    pair = planted.judged_pair(trial, baseline, 5)
    assert [run["passed"] for run in pair] == [None, None]
    assert all("is the machine busy?" in run["refused"] for run in pair)


def test_planted_work_is_work_not_sleep():
    started, used = time.perf_counter(), time.process_time()
    assert planted.slowed(lambda: 7, 0.05)() == 7
    assert time.perf_counter() - started >= 0.05
    # A busy machine takes the core away at times; sleep would use none of it.
    assert time.process_time() - used > 0.005


def test_the_table_counts_verdicts(tmp_path):
    def record(slowed, slowdown):
        verdict = "slower" if slowdown > 0.1 else "steady"
        case = {"case": "10 steps", "verdict": verdict, "slowdown": slowdown, "measured_again": slowed}
        return {"slowed": slowed, "passed": verdict == "steady", "cases": [case]}

    result = {"planted": 0.15, "limit": 0.1, "pairs": 2, "rounds": 7, "more_turns": 3}
    result |= {"failed_runs": {"slowed": 2, "unchanged": 0}, "refused_runs": 0}
    result["runs"] = [record(False, 0.01), record(True, 0.14), record(False, -0.02), record(True, 0.16)]
    write_json(tmp_path / "planted-slowdown.json", result)
    table = planted.planted_table(tmp_path)
    assert "| unchanged | 10 steps | -0.5% (-2.0% … +1.0%) | 0 of 2 | 0 of 2 |" in table
    assert "| 15% slower | 10 steps | +15.0% (+14.0% … +16.0%) | 2 of 2 | 2 of 2 |" in table
    assert "failed 2 of 2 slowed runs and 0 of 2 unchanged ones" in table


def test_a_missing_result_names_its_command(tmp_path):
    with pytest.raises(InputError, match=r"python -m skipstep\.bench\.planted --out"):
        planted.planted_table(tmp_path)


def test_the_workflow_asks_for_no_more_than_it_needs():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert not re.search(r"\$\{\{[^}]*secrets", WORKFLOW.read_text())
    steps = workflow["jobs"]["latency"]["steps"]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions)
    assert all("run" in step or "uses" in step for step in steps)


def test_every_command_of_the_workflow_and_the_makefile_exists_with_its_options():
    commands = list(workflow_commands()) + list(makefile_commands())
    assert [words[0] for words in commands].count("compare") == 4
    assert {words[0] for words in commands} == {"bench", "compare", "report"}
    for name, *arguments in commands:
        assert name in COMMANDS
        module = importlib.import_module(f"skipstep.commands.{name}")
        parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
        module.add_options(parser)
        parser.parse_args(arguments)


def workflow_commands():
    """The words of each command after `skipstep`, with the values that the workflow gives its variables."""
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(WORKFLOW.read_text())
    for step in workflow["jobs"]["latency"]["steps"]:
        command = step.get("run", "")
        for variable, value in workflow["env"].items():
            command = command.replace(f"${variable}", value)
        words = shlex.split(command)
        if words[:1] == ["skipstep"]:
            yield words[1:]


def makefile_commands():
    text = (ROOT / "Makefile").read_text()
    cases = re.search(r"^GATE_CASES := (.*)$", text, re.MULTILINE)
    assert cases is not None
    for target in ("bench-compare", "bench-baseline"):
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
        assert recipe is not None
        for line in recipe[1].splitlines():
            yield shlex.split(line.replace("$(GATE_CASES)", cases[1]).replace("$(BIN)/", ""))[1:]
