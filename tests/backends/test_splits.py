"""Batches divided over the processor's threads: which, the same bits, what is measured and remembered of it."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engines import build
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import Labelled

import skipstep
from skipstep.backends.onnxruntime import OnnxRuntimeDenoiser
from skipstep.backends.processor import Splits
from skipstep.calls.conditioning import LABELS, Conditioning
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import BundleError, ExportError
from skipstep.latency.calibration import Calibration
from skipstep.latency.measure import calibrate

LABELLED = {"sample_shape": (1, 4, 4), "num_classes": 4, "null_label": 3}
ROWS = {"steps": 10, "seeds": range(4), "class_labels": [0, 1, 2, 3]}


def splits_of(threads: int) -> Splits:
    splits = Splits()
    splits.num_threads = threads
    return splits


@pytest.fixture
def engine():
    with skipstep.load(SHIPPED_BUNDLE, backend="onnxruntime", num_threads=2, allow_hard_links=True) as loaded:
        yield loaded


@given(st.integers(1, 300), st.integers(1, 64))
def test_the_parts_are_all_rows_once_and_of_like_sizes(rows, parts):
    slices = Splits.slices(rows, min(parts, rows))
    assert [row for each in slices for row in range(rows)[each]] == list(range(rows))
    sizes = {each.stop - each.start for each in slices}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("threads", "rows", "parts", "choices"),
    [
        (1, 16, 1, [1]),  # A backend that cannot, or one core.
        (2, 1, 1, [1]),
        (2, 2, 2, [1, 2]),
        (2, 3, 1, [1]),
        (4, 6, 1, [1, 2]),
        (4, 16, 4, [1, 2, 4]),
        (16, 32, 1, [1, 2, 4, 8, 16]),  # Of so many threads only a measurement tells.
    ],
)
def test_without_a_measurement_few_threads_divide_what_they_divide_evenly(threads, rows, parts, choices):
    splits = splits_of(threads)
    assert (splits.parts(rows), splits.choices(rows)) == (parts, choices)
    splits.measured[rows] = choices[0]
    assert splits.parts(rows) == choices[0]


def test_divided_or_whole_the_bits_are_the_same_and_threads_are_used(engine, monkeypatch):
    callers = []
    real = OnnxRuntimeDenoiser._bound

    def bound(denoiser, session, rows):
        run = real(denoiser, session, rows)
        return lambda: (callers.append(threading.current_thread().name), run())

    monkeypatch.setattr(OnnxRuntimeDenoiser, "_bound", bound)
    drawn = {}
    for parts in (1, 2, 4):
        callers.clear()
        engine.runner.loop.splits.measured[4] = parts
        drawn[parts] = engine.sample(**ROWS)
        assert len(callers) == 10 * parts
        assert sum(name.startswith("skipstep-part") for name in callers) == 10 * (parts - 1)
    np.testing.assert_array_equal(drawn[2], drawn[1])
    np.testing.assert_array_equal(drawn[4], drawn[1])


def test_many_callers_of_divided_batches_draw_what_one_draws(engine):
    alone = engine.sample(**ROWS)
    with ThreadPoolExecutor(6) as pool:
        drawn = list(pool.map(lambda _: engine.sample(**ROWS), range(12)))
    for each in drawn:
        np.testing.assert_array_equal(each, alone)


def test_as_many_calls_as_threads_have_a_thread_each(engine):
    splits = engine.runner.loop.splits
    alone = engine.sample(**ROWS)

    with splits.call():
        assert (splits.crowded, splits.parts(4)) == (False, 2)
        with splits.call():
            assert (splits.crowded, splits.parts(4)) == (True, 1)
            np.testing.assert_array_equal(engine.sample(**ROWS), alone)
            crowded = engine.runner.loop._free[-1]._session
        np.testing.assert_array_equal(
            engine.sample(**{**ROWS, "seeds": range(3), "class_labels": [0, 1, 2]}), alone[:3]
        )
        np.testing.assert_array_equal(engine.sample(**ROWS), alone)
    assert not splits.crowded
    assert crowded.get_session_options().intra_op_num_threads == 1
    assert engine.runner.loop._free[-1]._session is crowded  # It serves the parts of a divided batch, too.


def test_nothing_is_divided_while_a_network_is_compared(engine):
    splits = engine.runner.loop.splits
    splits.measured[4] = 2
    with splits.undivided():
        assert splits.parts(4) == 1
    assert splits.parts(4) == 2


def test_what_fails_in_a_part_is_raised_once_the_others_have_ended(engine):
    engine.sample(**ROWS)
    denoiser = engine.runner.loop._free[-1]
    ended = []

    def fail() -> None:
        raise RuntimeError("no memory")

    for runs in ([fail, lambda: ended.append(1)], [lambda: ended.append(1), fail]):
        denoiser._runs = runs
        with pytest.raises(ExportError, match="no memory"):
            denoiser.new_context()(denoiser.compute(np.zeros((1, 4)), _conditioning(engine)), 0)
    assert ended == [1, 1]


def _conditioning(engine):
    return Conditioning({LABELS: np.arange(4)}, np.arange(4))


@pytest.mark.parametrize("best", [1, 2])
def test_calibrate_finds_the_faster_form_and_bundles_remember_it(best, tmp_path):
    with build(Labelled(), plans=[2], backend="onnxruntime", num_threads=2, **LABELLED) as engine:
        splits, now = engine.runner.loop.splits, 0.0

        def clock() -> float:
            """A call takes a second in the form that is best, two in the other."""
            nonlocal now
            now += 1.0 if splits.measured.get(4) == best else 2.0
            return now

        # 3 rows are not measured, since two threads do not divide them; guided, 3 samples are 6 rows.
        options = {"repeats": 3, "batch_sizes": [3, 4], "max_seconds": 400.0, "clock": clock}
        engine.calibration = calibrate(engine, engine.identity(), **options)
        assert list(engine.calibration.splits) == [4, 6, 8]
        assert engine.calibration.splits[4] == best
        assert splits.measured == engine.calibration.splits
        engine.save(tmp_path / "saved.bundle", license="MIT")
        with skipstep.load(tmp_path / "saved.bundle", backend="onnxruntime", num_threads=2) as loaded:
            assert loaded.runner.loop.splits.measured == splits.measured
            assert f"4 in {best}" in loaded.describe()


@pytest.mark.parametrize("entry", [{"rows": 4, "parts": 0}, {"rows": 0, "parts": 1}, {"rows": 4}])
def test_what_no_calibration_wrote_is_refused(engine, entry):
    stored = {**Calibration(engine.identity(), {}).to_json(), "splits": [entry]}
    with pytest.raises(BundleError, match="splits"):
        Calibration.from_json(stored)


def test_a_bundle_that_is_gone_is_drawn_from_as_a_whole(tmp_path, caplog):
    copy = shutil.copytree(SHIPPED_BUNDLE, tmp_path / "copy")
    with skipstep.load(copy, backend="onnxruntime", num_threads=2, allow_hard_links=True) as engine:
        engine.sample(steps=10, seeds=[0], class_labels=[0])
        shutil.rmtree(copy)
        drawn = engine.sample(**ROWS)
        assert "not divided" in caplog.text
        np.testing.assert_array_equal(engine.sample(**ROWS), drawn)
