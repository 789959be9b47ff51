from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from skipstep.bench.compare import Case, baseline_path, compare_cases, compare_runs, read_run, slowdown_interval
from skipstep.bench.result_files import REFERENCE, Absence, Entry, Run
from skipstep.commands.compare import describe, to_markdown
from skipstep.commands.main import main
from skipstep.errors import InputError

OURS = "skipstep"
CLASS = "cpu x86_64 avx2, 2 cores"


def entry(contender, seconds, textbook, steps=10):
    ratios = tuple(t / s for t, s in zip(textbook, seconds, strict=True))
    return Entry(1, "a-model", contender, steps, "ddim", "a-plan", 1, "cpu", "float32", tuple(seconds), ratios)


def a_case(seed=0, *, own=1.0, peer=2.0, turns=15, noise=0.02, spells=0.0, steps=10):
    """The textbook loop takes three times as long as ours; a slow spell hits all that are timed during it."""
    rng = np.random.default_rng(seed)
    machine = np.exp(spells * rng.standard_normal(turns))

    def seconds(median):
        return (median * machine * np.exp(noise * rng.standard_normal(turns))).tolist()

    textbook = seconds(3.0)
    entries = [entry(*each, textbook, steps) for each in ((REFERENCE, textbook), (OURS, seconds(own)))]
    entries.append(entry("diffusers", seconds(peer), textbook, steps))
    return Case(f"a-model, {steps} steps, batch 1", {each.contender: each for each in entries}, {})


def a_run(*cases, machine_class=CLASS, commit="abc1234", **versions):
    cases = cases or (a_case(),)
    entries = tuple(entry for case in cases for entry in case.entries.values())
    absent = tuple(absence for case in cases for absence in case.absent.values())
    versions = {"torch": "2.13", **versions}
    return Run(1, machine_class, 2, commit, "2026-01-01", absent, entries, versions, options={"threads": 2})


def changed(case, name, change):
    """The case with another entry for that contender."""
    return replace(case, entries={**case.entries, name: change(case.entries[name])})


def with_status(case, name, status, reason="because"):
    absence = Absence("a-model", name, case.entries[name].steps, 1, reason, status)
    entries = {each: value for each, value in case.entries.items() if each != name}
    return Case(case.name, entries, {name: absence})


def verdicts(comparison):
    return {(each.case, each.contender): each.verdict for each in comparison.changes}


def verdict_of(before, now, name=OURS, **options):
    return next(each for each in compare_cases(before, now, **options) if each.contender == name)


def test_unchanged_runs_pass_and_slower_ones_fail_whatever_the_machine_does_meanwhile():
    before = a_run(a_case(seed=100, turns=45, spells=0.3))
    for seed in range(50):
        assert compare_runs(before, a_run(a_case(seed, spells=0.3))).passed
        assert not compare_runs(before, a_run(a_case(seed, spells=0.3, own=1.15))).passed


def test_a_slowdown_is_the_growth_of_time_beside_the_textbook_loop():
    change = verdict_of(a_case(noise=0.0), a_case(noise=0.0, own=1.25))
    assert change.ratio_before == pytest.approx(3.0)
    assert change.ratio_now == pytest.approx(2.4)
    assert change.slowdown == pytest.approx(0.25)
    assert change.verdict == "slower"


@pytest.mark.parametrize(
    ("own", "verdict"), [(1.09, "steady"), (1.11, "slower"), (0.92, "steady"), (0.9, "faster"), (1.0, "steady")]
)
def test_the_limit_is_ten_percent_either_way(own, verdict):
    assert verdict_of(a_case(noise=0.0), a_case(noise=0.0, own=own)).verdict == verdict


def test_a_loss_that_noise_can_explain_is_unclear_and_no_failure():
    quiet = a_case(turns=45)
    # Three rounds of which one is fast: the median is slow, and so few rounds cannot show that it stays so.
    noisy = changed(quiet, OURS, lambda e: entry(OURS, np.multiply(e.data[:3], (1.3, 1.25, 0.8)), [3.0] * 3))
    comparison = compare_runs(a_run(quiet), a_run(noisy))
    change = next(each for each in comparison.changes if each.contender == OURS)
    assert change.slowdown > 0.1
    assert change.interval[0] < 0.0 < change.interval[1]
    assert change.verdict == "unclear"
    assert comparison.passed
    assert "1 unclear" in describe(comparison)


def test_the_interval_is_that_of_the_median_and_repeats_itself():
    """95 % of unchanged pairs have no slowdown within their interval; the bootstrap of a median is a little wide."""
    rng = np.random.default_rng(0)
    pairs = [np.exp(0.05 * rng.standard_normal((2, 21))) for _ in range(300)]
    intervals = [slowdown_interval(*pair) for pair in pairs]
    inside = np.mean([low <= 0.0 <= high for low, high in intervals])
    assert 0.92 <= inside <= 0.995
    assert slowdown_interval(*pairs[0]) == intervals[0]
    narrow = slowdown_interval(np.ones(9), np.full(9, 0.8))
    assert narrow == pytest.approx((0.25, 0.25))


def test_what_looks_slow_is_measured_again_and_the_second_measurement_decides():
    before = a_run(a_case(turns=45), a_case(turns=45, steps=20))
    now = a_run(a_case(1), a_case(1, steps=20, own=1.2))
    asked: list[int] = []

    def again(own):
        def measure(case):
            steps = case.entries[OURS].steps
            asked.append(steps)
            return a_case(7, turns=45, steps=steps, own=own)

        return measure

    recovered = compare_runs(before, now, measure_again=again(1.0))
    assert recovered.passed
    assert asked == [20]
    assert [(each.again, each.rounds) for each in recovered.changes if each.contender == OURS] == [
        (False, 15),
        (True, 45),
    ]
    confirmed = compare_runs(before, now, measure_again=again(1.2))
    assert [(each.case, each.contender) for each in confirmed.failures] == [("a-model, 20 steps, batch 1", OURS)]


@pytest.mark.parametrize(("own", "suspicious"), [(1.02, False), (1.07, True), (1.2, True)])
def test_half_the_limit_is_enough_to_look_slow(own, suspicious):
    asked = []
    now = a_run(a_case(noise=0.0, own=own))
    compare_runs(a_run(a_case(noise=0.0)), now, measure_again=lambda case: asked.append(case) or case)
    assert bool(asked) == suspicious


def test_slower_peers_are_listed_and_fail_only_when_gated():
    before, now = a_run(a_case()), a_run(a_case(peer=3.0))
    comparison = compare_runs(before, now)
    assert comparison.passed
    assert verdicts(comparison)["a-model, 10 steps, batch 1", "diffusers"] == "slower"
    assert "slower, not gated" in describe(comparison)
    assert not compare_runs(before, now, gated=("skipstep*", "diffusers")).passed


@pytest.mark.parametrize("status", ["wrong", "failed"])
@pytest.mark.parametrize("name", [OURS, "diffusers", REFERENCE])
def test_a_contender_that_no_longer_works_is_a_failure(name, status):
    comparison = compare_runs(a_run(), a_run(with_status(a_case(), name, status, "off by 3")))
    assert [each.contender for each in comparison.failures] == [name]
    assert f"BROKEN ({status}: off by 3)" in describe(comparison)


def test_a_contender_that_was_never_right_is_no_failure():
    wrong = with_status(a_case(), "diffusers", "wrong", "off by 3")
    comparison = compare_runs(a_run(wrong), a_run(wrong))
    assert comparison.passed
    assert {each.contender for each in comparison.changes} == {OURS}
    assert verdict_of(wrong, a_case(), "diffusers").verdict == "new"


def test_a_gated_contender_that_became_too_slow_to_measure_fails_after_a_second_try():
    skipped = a_run(with_status(a_case(), OURS, "skipped", "90 s predicted"))
    assert not compare_runs(a_run(), skipped).passed
    assert not compare_runs(a_run(), skipped, measure_again=lambda case: case).passed
    assert compare_runs(a_run(), skipped, measure_again=lambda case: a_case(3, turns=45)).passed
    assert verdict_of(a_case(), with_status(a_case(), "diffusers", "skipped"), "diffusers").verdict == "lost"


def test_what_only_one_run_has_is_listed():
    before = a_run(a_case(), a_case(steps=20))
    now = a_run(with_status(a_case(), "diffusers", "absent", "no package"), a_case(steps=50))
    comparison = compare_runs(before, now)
    assert comparison.only_before == ("a-model, 20 steps, batch 1",)
    assert comparison.only_now == ("a-model, 50 steps, batch 1",)
    text = describe(comparison)
    assert text.splitlines()[-1].endswith("1 compared, 1 lost")
    for words in (
        "20 steps, batch 1: only in the baseline",
        "50 steps, batch 1: only in the result",
        "lost (absent: no package)",
    ):
        assert words in text
        assert words in to_markdown(comparison)


def test_a_gate_that_guards_nothing_does_not_pass():
    with pytest.raises(InputError, match="guards nothing"):
        compare_runs(a_run(a_case()), a_run(a_case(steps=20)))
    with pytest.raises(InputError, match="guards nothing"):
        compare_runs(a_run(), a_run(with_status(a_case(), OURS, "absent")))
    # Two rounds are no measurement.
    few = changed(a_case(), OURS, lambda e: replace(e, data=e.data[:2], ratios=e.ratios[:2]))
    assert verdict_of(a_case(), few).verdict == "unmeasured"
    with pytest.raises(InputError, match="guards nothing"):
        compare_runs(a_run(), a_run(few))


@pytest.mark.parametrize("machine", [0.2, 5.0])
def test_ratios_of_a_busy_machine_are_not_judged_but_measured_again(machine):
    """All cores taken: the textbook loop suffers more than we do, or did when the baseline was measured."""

    def scaled(case, textbook, own):
        def scale(e):
            data = np.multiply(e.data, own)
            return entry(OURS, data, np.multiply(e.data, e.ratios) * textbook)

        return changed(case, OURS, scale)

    before, now = a_run(a_case(turns=45)), a_run(scaled(a_case(1, own=1.3), machine**2, machine))
    with pytest.raises(InputError, match=r"times as long as in the baseline: is the machine busy\?"):
        compare_runs(before, now)
    assert not compare_runs(before, now, measure_again=lambda case: a_case(2, own=1.3)).passed
    # Twice as slow in all things is another processor of the class.
    assert compare_runs(before, a_run(scaled(a_case(1), 2.0, 2.0))).passed


def test_other_machines_and_limits_are_refused_by_name():
    with pytest.raises(InputError, match=r"'gpu B'.*'cpu x86_64 avx2, 2 cores'"):
        compare_runs(a_run(), a_run(machine_class="gpu B"))
    with pytest.raises(InputError, match="twice"):
        compare_runs(a_run(a_case(), a_case()), a_run())
    with pytest.raises(InputError, match="limit"):
        compare_runs(a_run(), a_run(), limit=0.0)


def test_versions_that_differ_are_named():
    digests = {"a-model": "0123"}
    now = replace(a_run(torch="2.14", commit="def"), options={"threads": 4}, digests=digests)
    comparison = compare_runs(a_run(), now)
    assert comparison.differences == (
        ("torch", "2.13", "2.14"),
        ("threads", "2", "4"),
        ("digest of a-model", "none", "0123"),
    )
    assert "torch was 2.13, is 2.14" in describe(comparison)


def test_a_folder_holds_one_baseline_a_machine_class(tmp_path):
    assert baseline_path(tmp_path, CLASS) == tmp_path / "cpu-x86-64-avx2-2-cores.json"
    assert baseline_path(tmp_path, "gpu NVIDIA H200").name == "gpu-nvidia-h200.json"
    assert baseline_path(tmp_path / "mine.json", CLASS) == tmp_path / "mine.json"


def write(path, run):
    """As pytest-benchmark writes it."""
    benchmarks = []
    for e in run.entries:
        facts = {"schema": 1, "model": e.model, "contender": e.contender, "batch_size": 1, "device": "cpu"}
        plan = {"steps": e.steps, "solver": "ddim", "key": e.key}
        extra = {**facts, "precision": "float32", "threads": 2, "error": 0.0, "tolerance": 0.1, "plan": plan}
        benchmarks.append({"stats": {"data": e.data}, "extra_info": {**extra, "ratios": e.ratios}})
    facts = {"schema": 1, "machine": run.machine, "cores": 2, "commit": run.commit, "versions": run.versions}
    facts |= {"absent": [], "options": run.options}
    path.write_text(json.dumps({"benchmarks": benchmarks, "skipstep": facts, "datetime": "2026-01-01"}))


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "same.json", a_run(a_case(1)))
    write(tmp_path / "slow.json", a_run(a_case(2, own=1.3)))
    write(tmp_path / "fast.json", a_run(a_case(2, own=0.7)))
    assert main(["compare", str(tmp_path / "baselines"), str(tmp_path / "same.json"), "--accept"]) == 0
    return tmp_path


def test_the_command_accepts_compares_and_reports(files, capsys, monkeypatch):
    assert read_run(files / "baselines" / "cpu-x86-64-avx2-2-cores.json") == read_run(files / "same.json")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(files / "summary.md"))
    baselines = str(files / "baselines")
    assert main(["compare", baselines, str(files / "same.json")]) == 0
    assert main(["compare", baselines, str(files / "fast.json")]) == 0
    assert "1 faster" in capsys.readouterr().out
    assert main(["compare", baselines, str(files / "slow.json"), "--out", str(files / "compared.json")]) == 1
    assert "SLOWER" in capsys.readouterr().out
    # A limit that allows it.
    assert main(["compare", baselines, str(files / "slow.json"), "--limit", "60"]) == 0
    found = json.loads((files / "compared.json").read_text())
    assert not found["passed"]
    assert [each["verdict"] for each in found["changes"] if each["gated"]] == ["slower"]
    summary = (files / "summary.md").read_text()
    assert summary.count("### passed") == 3
    assert summary.count("### failed") == 1
    assert "| a-model, 10 steps, batch 1 | skipstep |" in summary


def test_bad_input_to_the_command(files, capsys):
    assert main(["compare", str(files / "none"), str(files / "same.json")]) == 2
    message = capsys.readouterr().err
    assert "no baseline" in message
    assert f"skipstep compare {files / 'none'} {files / 'same.json'} --accept" in message
    older = json.loads((files / "same.json").read_text())
    older["skipstep"]["schema"] = 9
    (files / "older.json").write_text(json.dumps(older))
    assert main(["compare", str(files / "older.json"), str(files / "same.json")]) == 2
    assert "schema 9" in capsys.readouterr().err
    assert main(["compare", str(files / "baselines"), str(files / "missing.json")]) == 2
    assert main(["compare", str(files / "baselines"), str(files / "same.json"), "--measure-again"]) == 2
    assert "--measure-again" in capsys.readouterr().err
