"""The checks of a case, the budget and what a result holds; the pytest plugin and `skipstep bench` from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from bench_suite import nap_contender, save_model

from skipstep.bench import contenders
from skipstep.bench.compare import cases_of, read_run
from skipstep.bench.measure_again import measuring_again
from skipstep.bench.measurements import process_facts, throughput
from skipstep.bench.options import Options
from skipstep.bench.resume import KeptResults
from skipstep.bench.session import Absent, BenchSession
from skipstep.commands.main import main
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def options(model):
    def make(**changes):
        given = {"models": (model,), "steps": (2,), "contenders": ("textbook",), "threads": 1, "max_rounds": 3}
        return Options(**{**given, "budget_seconds": 20.0, **changes})

    return make


@pytest.fixture
def register(monkeypatch):
    """Add contenders of a test's own to the list."""

    def add(*added):
        for each in added:
            monkeypatch.setitem(contenders.CONTENDERS, each.name, each)

    return add


def measured(options):
    """By (steps, contender): its facts with its seconds, or why it has none."""
    found = {}
    with BenchSession(options) as session:
        for case in session.case_keys():
            for contender in session.contenders:
                try:
                    with session.checked(case, contender.name) as checked:
                        data = []
                        for _ in range(checked.rounds):
                            checked.before_round()
                            started = time.perf_counter()
                            checked.draw()
                            data.append(time.perf_counter() - started)
                        found[case.steps, contender.name] = {**checked.facts(data), "data": data}
                except Absent as absent:
                    session.record(case, contender.name, absent)
                    found[case.steps, contender.name] = absent
        found["run"] = session.facts()
    return found


def test_right_samples_get_numbers_and_ratios_within_a_round(options, register):
    register(nap_contender("twin"), nap_contender("slow", seconds=0.2))
    found = measured(options(contenders=("textbook", "twin", "slow", "skipstep", "network")))
    for name in ("textbook", "twin", "slow", "skipstep"):
        facts = found[2, name]
        assert len(facts["data"]) == len(facts["ratios"]) == 3
        assert facts["error"] <= facts["tolerance"]
        assert facts["plan"]["steps"] == 2
        assert (facts["device"], facts["precision"], facts["threads"], facts["batch_size"]) == ("cpu", "float32", 1, 1)
    assert found[2, "textbook"]["ratios"] == [1.0] * 3
    assert max(found[2, "slow"]["ratios"]) < 0.6
    # It draws no samples that could be checked.
    assert found[2, "network"]["error"] is None
    assert found["run"]["absent"] == []
    assert len(found["run"]["digests"]["tiny"]) == 64


def test_whatever_is_not_right_gets_a_reason_instead_of_a_number(options, register):
    register(
        nap_contender("off", change=lambda x: x + 1),
        nap_contender("nan", change=lambda x: x * np.nan),
        nap_contender("small", change=lambda x: x[:, :, :4]),
        nap_contender("crashes", change=lambda x: 1 / 0),
        nap_contender("late", fails_at=4),
        nap_contender("unbuilt", build_error=OSError("no such library")),
        nap_contender("elsewhere", reason="no such machine"),
    )
    names = ("off", "nan", "small", "crashes", "late", "unbuilt", "elsewhere", "diffusers")
    found = measured(options(contenders=names))
    status = {name: found[2, name].status for name in names[:-1]}
    assert status == {
        **dict.fromkeys(("off", "nan", "small"), "wrong"),
        **dict.fromkeys(("crashes", "late", "unbuilt"), "failed"),
        "elsewhere": "absent",
    }
    assert found[2, "diffusers"]["data"]
    assert [found[2, name].failed for name in ("off", "late", "elsewhere")] == [True, True, False]
    assert "ZeroDivisionError" in found[2, "crashes"].reason
    assert found[2, "unbuilt"].reason == "OSError: no such library"
    assert "is allowed" in found[2, "off"].reason
    assert {each["contender"]: each["status"] for each in found["run"]["absent"]} == status


def test_what_would_exceed_the_budget_is_skipped(options, register):
    register(nap_contender("quick"), nap_contender("slow", seconds=0.4))
    found = measured(options(contenders=("quick", "slow"), steps=(1, 20), budget_seconds=6.0))
    assert found[1, "slow"]["data"]
    assert found[20, "slow"].status == "skipped"
    assert "budget is 6 s" in found[20, "slow"].reason
    assert found[20, "quick"]["data"]
    # Known only when it has been tried.
    assert measured(options(contenders=("slow",), budget_seconds=1.0))[2, "slow"].status == "skipped"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (0,)}, "plans 0; expected positive"),
        ({"batch_sizes": ()}, "batch none"),
        ({"budget_seconds": -1.0}, r"budget -1\.0"),
        ({"contenders": ("unknown",)}, "unknown; expected names among textbook"),
        ({"measure": ("nothing",)}, "measurements nothing; expected names among throughput, process"),
        ({"models": ("no-such-folder",)}, "a diffusers folder or a bundle"),
    ],
)
def test_bad_options(options, changes, message):
    with pytest.raises(InputError, match=message):
        options(**changes)


def test_a_model_may_name_its_own_batch_sizes(options, model):
    cases = BenchSession(options(models=(f"{model}@4,2", "tiny-architecture"), batch_sizes=(1,))).case_keys()
    assert [(case.model, case.batch_size) for case in cases] == [("tiny", 2), ("tiny", 4), ("tiny-architecture", 1)]


def test_a_bundle_is_compared_with_its_golden_samples(options):
    found = measured(options(models=(str(SHIPPED_BUNDLE),), contenders=("textbook", "skipstep")))
    assert found[2, "textbook"].status == "absent"
    assert found[2, "skipstep"]["ratios"] == []
    assert found[2, "skipstep"]["error"] < found[2, "skipstep"]["tolerance"]


def test_throughput_counts_the_calls_of_all_threads():
    found = throughput(lambda: time.sleep(0.02), callers=4, seconds=0.3)
    assert 60 < found["calls_per_second"] < 200
    assert 0.02 <= found["p50_seconds"] <= found["p99_seconds"]
    with pytest.raises(ZeroDivisionError):
        throughput(lambda: 1 / 0, callers=2, seconds=0.1)


@pytest.mark.slow
def test_peak_memory_is_the_process_s_own():
    """A child begins with its parent's peak in getrusage's eyes; this process holds torch, a bundle's does not."""
    ballast = np.ones(1 << 28, np.uint8)
    facts = {"steps": 10, "batch_size": 1, "threads": 1, "processes": 0}
    seconds, peak = process_facts(str(SHIPPED_BUNDLE), "skipstep", **facts)
    assert ballast.all()
    assert 20e6 < peak < 250e6
    assert seconds > 0
    with pytest.raises(RuntimeError, match="nothing"):
        process_facts("nothing", "textbook", **facts)


def run_pytest(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    # A suite that runs in several processes would otherwise disable benchmarks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def benchmarked(model, tmp_path_factory):
    """`pytest --pyargs skipstep.bench` in a folder that is no checkout."""
    folder = tmp_path_factory.mktemp("anywhere")
    arguments = ["--model", model, "--plans", "1,2", "--batch", "1,2", "--budget", "4", "--rounds", "3"]
    arguments += ["--contenders", "textbook,skipstep-torch,skipstep-captured", "--threads", "1"]
    done = run_pytest(folder, "--pyargs", "skipstep.bench", *arguments, "--benchmark-json=out.json")
    return done, folder / "out.json"


@pytest.mark.slow
def test_the_plugin_runs_anywhere_with_one_benchmark_a_contender(benchmarked):
    done, out = benchmarked
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {each["group"] for each in found["benchmarks"]} == {
        f"tiny, {s} steps, batch {b}" for s in (1, 2) for b in (1, 2)
    }
    assert "test_sampling[tiny-1-1-textbook]" in {each["name"] for each in found["benchmarks"]}
    assert "node" not in found["machine_info"]
    assert "× textbook" in done.stdout
    for each in found["benchmarks"]:
        assert len(each["stats"]["data"]) == len(each["extra_info"]["ratios"]) == 3
    facts = found["skipstep"]
    assert {"schema", "machine", "processor", "cores", "commit", "versions", "absent", "options"} <= set(facts)
    assert len(found["benchmarks"]) + len(facts["absent"]) == 12


@pytest.mark.slow
def test_an_interrupted_run_continues(benchmarked, model, tmp_path):
    """What the file holds is kept as it is; with other options everything is measured again."""
    whole = json.loads(benchmarked[1].read_text())
    out = tmp_path / "out.json"
    lost = whole["benchmarks"][-1]
    out.write_text(json.dumps({**whole, "benchmarks": whole["benchmarks"][:-1]}))
    arguments = ["--model", model, "--plans", "1,2", "--batch", "1,2", "--budget", "4", "--rounds", "3"]
    arguments += ["--contenders", "textbook,skipstep-torch,skipstep-captured", "--threads", "1", "--resume", out]
    done = run_pytest(tmp_path, "--pyargs", "skipstep.bench", *arguments, f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["benchmarks"][:-1] == whole["benchmarks"][:-1]
    assert found["benchmarks"][-1]["name"] == lost["name"]
    assert found["benchmarks"][-1]["stats"]["data"] != lost["stats"]["data"]
    assert found["skipstep"]["digests"] == whole["skipstep"]["digests"]
    assert len(read_run(out).entries) == len(whole["benchmarks"])
    facts = whole["skipstep"]
    assert KeptResults(out, facts).benchmarks.keys() == KeptResults(benchmarked[1], facts).benchmarks.keys()
    for name in ("commit", "machine", "options"):
        assert not KeptResults(out, {**facts, name: "another"}).benchmarks
    # Older results do not say with which options they were measured.
    out.write_text(json.dumps({**whole, "skipstep": {k: v for k, v in facts.items() if k != "options"}}))
    assert not KeptResults(out, facts).benchmarks
    out.write_text("{")
    with pytest.raises(InputError, match="cannot be continued"):
        KeptResults(out, facts)


@pytest.mark.slow
def test_a_case_is_measured_again_with_more_rounds(benchmarked):
    _, out = benchmarked
    case = cases_of(read_run(out))["tiny, 2 steps, batch 1"]
    again = measuring_again(out, progress=lambda text: None)(case)
    assert again.name == case.name
    assert again.entries.keys() == case.entries.keys()
    assert len(again.entries["skipstep-torch"].data) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plans", "0"), "plans 0; expected positive numbers"),
        (("--plans", "ten"), "not a list of integers"),
        (("--contenders", "unknown"), "expected names among textbook"),
    ],
)
def test_bad_options_end_the_run_before_anything_is_collected(tmp_path, arguments, message):
    done = run_pytest(tmp_path, "--pyargs", "skipstep.bench", *arguments)
    assert done.returncode == 4
    assert message in done.stdout + done.stderr


def test_the_plugin_does_nothing_in_other_people_s_runs(tmp_path):
    """It imports no heavy library, and its options stay free for theirs."""
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--model')\n")
    (tmp_path / "test_theirs.py").write_text(
        "import sys\n"
        "def test_it(pytestconfig):\n"
        "    assert pytestconfig.getoption('--model') == 'theirs'\n"
        "    assert 'skipstep.bench.plugin' in sys.modules\n"
        "    assert not {'torch', 'numpy', 'onnx', 'skipstep.bench.suite'} & set(sys.modules)\n"
    )
    done = run_pytest(tmp_path, "--model", "theirs", "-p", "no:hypothesispytest")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_command_is_a_front_of_the_plugin(model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    # The folder's own pytest settings are for other tests.
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    out = tmp_path / "new" / "results.json"
    arguments = ["bench", "--model", model, "--plans", "1", "--batch", "1", "--threads", "1", "--budget", "4"]
    assert main([*arguments, "--contenders", "textbook,skipstep-torch", "--rounds", "3", "--out", str(out)]) == 0
    assert "tiny, 1 steps, batch 1" in capfd.readouterr().out
    assert set(cases_of(read_run(out))["tiny, 1 steps, batch 1"].entries) == {"textbook", "skipstep-torch"}
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]
    assert main([*arguments, "--batch", "-1"]) == 2
    assert "batch -1" in capfd.readouterr().err


def test_a_model_without_a_scheduler_says_what_to_write(model, tmp_path, options):
    (tmp_path / "unet").symlink_to(f"{model}/unet")
    found = measured(options(models=(str(tmp_path),), contenders=("textbook",)))
    assert found[2, "textbook"].status == "failed"
    assert "without a scheduler configuration" in found[2, "textbook"].reason
