"""The gates of a case, the budget, resuming, and what a run writes: on a small network, with contenders of our own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bench_suite import nap_kind, save_model

from skipstep.bench import contenders, measure, measurements
from skipstep.bench.contenders.textbook import TEXTBOOK
from skipstep.bench.measure import Bench, Options
from skipstep.bench.measurements import measure_run, with_peak_memory
from skipstep.bench.peak_memory import peak_memory
from skipstep.bench.results import Case, Contender, Run, read_run
from skipstep.bench.throughput import throughput
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
    """Add contenders of a test's own to those that there are."""

    def add(*kinds):
        for kind in kinds:
            monkeypatch.setitem(contenders.CONTENDERS, kind.name, kind)

    return add


def measured(options):
    with Bench(options) as bench:
        return [bench.case(*key) for key in bench.case_keys()]


def test_who_draws_the_right_samples_gets_a_number(options, register):
    register(nap_kind("twin", seconds=0.0))
    (case,) = measured(options(contenders=("textbook", "twin", "skipstep-onnx")))
    assert [each.status for each in case.contenders] == ["ok"] * 3
    assert case.contender("textbook").ratio == 1.0
    for each in case.contenders:
        assert len(each.seconds) == 3
        assert each.error < each.tolerance
    assert case.contender("skipstep-onnx").nodes_per_step > 50
    assert case.outside_network < 1.0


def test_whoever_stops_at_a_gate_is_named_and_the_others_go_on(options, register):
    register(
        nap_kind("off", change=lambda x: x + 0.5),
        nap_kind("nan", change=lambda x: x * np.nan),
        nap_kind("small", change=lambda x: x[:, :, :2]),
        nap_kind("crashes", change=lambda x: 1 / 0),
        nap_kind("late", fails_at=3),
        nap_kind("unbuilt", build_error=OSError("no such library\nsecond line")),
        nap_kind("elsewhere", reason="no such device"),
    )
    names = ("off", "nan", "small", "crashes", "late", "unbuilt", "elsewhere", "diffusers")
    (case,) = measured(options(contenders=names))
    status = {each.name: each.status for each in case.contenders}
    assert status == {
        "textbook": "ok",
        **dict.fromkeys(("off", "nan", "small"), "wrong"),
        **dict.fromkeys(("crashes", "late", "unbuilt"), "failed"),
        "elsewhere": "absent",
        "diffusers": "ok",
    }
    for each in case.contenders:
        assert bool(each.reason) == bool(not each.seconds) == (each.status != "ok")
    assert "ZeroDivisionError" in case.contender("crashes").reason
    assert case.contender("unbuilt").reason == "OSError: no such library"
    assert "is allowed" in case.contender("off").reason


def test_a_slower_contender_has_the_smaller_ratio(options, register):
    register(nap_kind("slow", seconds=0.2))
    (case,) = measured(options(contenders=("slow",)))
    assert case.contender("slow").ratio < 0.6


def test_what_would_exceed_the_budget_is_skipped_from_the_end_of_the_list(options, register):
    register(nap_kind("first"), nap_kind("last", seconds=0.6))
    small, large = measured(options(contenders=("first", "last"), steps=(1, 8), budget_seconds=16.0))
    assert {each.status for each in small.contenders} == {"ok"}
    assert large.contender("last").status == "skipped"
    assert "budget is 16 s" in large.contender("last").reason
    assert large.contender("first").status == large.contender("textbook").status == "ok"


def test_a_reference_alone_is_skipped_too(options, register):
    register(nap_kind("only", seconds=0.1))
    _, large = measured(options(contenders=("only",), steps=(1, 100), budget_seconds=1.0))
    assert [each.status for each in large.contenders] == ["skipped", "skipped"]
    assert large.outside_network is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (0,)}, "plans 0; expected positive"),
        ({"batch_sizes": ()}, "batch none"),
        ({"budget_seconds": -1.0}, "budget -1.0"),
        ({"contenders": ("nobody",)}, "nobody"),
    ],
)
def test_bad_options(options, changes, message):
    with pytest.raises(InputError, match=message):
        options(**changes)


def test_an_interrupted_run_goes_on_where_it_was(options, register, tmp_path):
    out = tmp_path / "results.json"
    kind = nap_kind("stubborn", interrupts_at=8)
    register(kind)
    wanted = options(contenders=("stubborn",), steps=(1, 2, 3))
    with pytest.raises(KeyboardInterrupt):
        measure_run(wanted, out=out)
    assert not out.exists()
    kept = json.loads((tmp_path / "results.json.partial.json").read_text())["cases"]
    assert 0 < len(kept) < 3

    with pytest.raises(InputError, match="steps"):
        measure_run(options(contenders=("stubborn",), steps=(1, 2)), out=out, resume=True)
    run = measure_run(wanted, out=out, resume=True, command="skipstep bench")
    assert [case.steps for case in run.cases] == [1, 2, 3]
    assert run.cases[0].contenders[0].seconds == tuple(kept[0]["contenders"][0]["seconds"])
    assert read_run(out) == run
    assert {fit["contender"] for fit in run.measurements["fits"]} == {"textbook", "stubborn"}
    assert run.options["command"] == "skipstep bench"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_measurement_that_fails_is_recorded_and_the_run_written(options, tmp_path, monkeypatch):
    monkeypatch.setitem(measurements.MEASUREMENTS, "throughput", lambda bench: 1 / 0)
    run = measure_run(options(), measurements=("throughput", "fits"), out=tmp_path / "a.json")
    assert run.measurements["throughput"] == {"failed": "ZeroDivisionError: division by zero"}
    assert run.measurements["fits"] == []
    with pytest.raises(InputError, match="measurements nothing; expected names among fits, build"):
        measure_run(options(), measurements=("nothing",))


def test_a_bundle_is_held_against_its_golden_samples(options):
    (case,) = measured(options(models=(str(SHIPPED_BUNDLE),), contenders=("skipstep-onnx",)))
    assert case.contender("textbook").status == "absent"
    ours = case.contender("skipstep-onnx")
    assert ours.status == "ok"
    assert ours.ratio is None
    assert ours.error < ours.tolerance


def test_throughput_counts_the_calls_of_all_threads():
    import time

    found = throughput(lambda: time.sleep(0.02), callers=4, seconds=0.3)
    assert 100 < found.calls_per_second < 200
    assert 0.02 <= found.p50_seconds <= found.p99_seconds
    with pytest.raises(ZeroDivisionError):
        throughput(lambda: 1 / 0, callers=2, seconds=0.1)


def test_peak_memory_is_the_child_s_own(model):
    """A child begins with its parent's peak in getrusage's eyes; this process holds torch, a bundle's does not."""
    ballast = np.ones(1 << 28, np.uint8)
    bundle = peak_memory(str(SHIPPED_BUNDLE), "skipstep-onnx", steps=10, batch_size=1, threads=1)
    assert ballast.all()
    assert 20e6 < bundle < 250e6
    with pytest.raises(RuntimeError, match="nothing"):
        peak_memory("nothing", "textbook", steps=10, batch_size=1, threads=1)


def test_peak_memory_stands_in_the_cases_of_its_batch_size():
    rows = [{"model": "net", "batch_size": 1, "contender": "a", "peak_bytes": 7}]
    cases = tuple(Case("net", 1, batch, "float32", "key", (Contender("a", "ok"),)) for batch in (1, 4))
    first, second = with_peak_memory(Run({}, {}, cases, {"peak_memory": rows})).cases
    assert first.contenders[0].peak_memory_bytes == 7
    assert second.contenders[0].peak_memory_bytes is None


def test_the_reference_is_the_textbook():
    assert measure.contenders_named(["diffusers"])[0] is TEXTBOOK
