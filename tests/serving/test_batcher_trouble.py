"""What ends a request early, and what is refused: cancelled, failing and late requests, and batchers that close."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
from engines import build
from identities import CPU
from serving_cases import SECONDS, SHAPE, Gate, Troubled, random_request, serving_engine, workers

import skipstep
from skipstep.errors import (
    DeadlineError,
    EngineStateError,
    ExportError,
    InputError,
    NonFiniteError,
    PlanNotFoundError,
    QueueFullError,
)
from skipstep.latency.calibration import Calibration, Latency, RunKind
from skipstep.serving import Batcher


def test_cancelled_requests_leave_and_the_others_stay(engine, batcher, held):
    first, gate, _ = held
    others = [batcher.submit(steps=4, seeds=seed, class_labels=0) for seed in range(8)]
    assert all(each.cancel() for each in others[::2])
    assert first.cancel(), "also under way"
    gate.opened.set()
    for seed, each in enumerate(others):
        if seed % 2:
            np.testing.assert_array_equal(each.result(SECONDS), engine.sample(steps=4, seeds=seed, class_labels=0))
        else:
            assert each.cancelled()
    assert wait([first, *others], SECONDS).not_done == set(), "those who wait for a cancelled one are told"
    with pytest.raises(CancelledError):
        first.result(0)


def test_a_cancelled_request_is_not_evaluated_again(batcher, held):
    first, gate, _ = held
    assert first.cancel()
    gate.opened.set()
    batcher.close()
    assert batcher.evaluations == 1


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3)])
def test_what_a_callback_raises_is_the_result_of_its_request_alone(engine, batcher, held, error):
    first, gate, arguments = held

    def callback(event: Any) -> None:
        if event.first == 1:
            raise error

    failing = batcher.submit(steps=5, seeds=[1, 2, 3], class_labels=0, callback=callback)
    fine = batcher.submit(**arguments)
    gate.opened.set()
    assert failing.exception(SECONDS) is error
    np.testing.assert_array_equal(fine.result(SECONDS), engine.sample(**arguments))
    np.testing.assert_array_equal(first.result(SECONDS), fine.result())


@pytest.fixture
def troubled():
    with build(Troubled(), plans=[3, 5], sample_shape=SHAPE, num_classes=4, null_label=3) as engine:
        yield engine


def test_nan_in_one_sample_fails_its_request_alone(troubled):
    with Batcher(troubled, max_wait_ms=200.0) as batcher:
        fine = [batcher.submit(steps=5, seeds=seed, class_labels=0) for seed in range(3)]
        broken = batcher.submit(steps=3, seeds=[7, 8], class_labels=[0, 2])
        fine += [batcher.submit(steps=3, seeds=seed, class_labels=0) for seed in range(3)]
    assert isinstance(broken.exception(0), NonFiniteError)
    assert "samples [1] of 2" in str(broken.exception())
    for seed, each in enumerate(fine):
        expected = troubled.sample(steps=5 if seed < 3 else 3, seeds=seed % 3, class_labels=0)
        np.testing.assert_array_equal(each.result(0), expected)


def test_a_network_that_fails_ends_the_requests_of_that_evaluation_and_no_others(troubled):
    with Batcher(troubled, max_batch=1) as batcher:
        before = batcher.submit(steps=3, seeds=1, class_labels=0)
        failing = batcher.submit(steps=3, seeds=1, class_labels=1)
        after = batcher.submit(steps=3, seeds=1, class_labels=0)
    assert isinstance(failing.exception(0), RuntimeError | ExportError)
    np.testing.assert_array_equal(before.result(0), after.result(0))


def test_close_finishes_what_was_taken_and_takes_no_more(engine, batcher, held):
    first, gate, arguments = held
    futures = [batcher.submit(steps=5, seeds=seed, class_labels=0) for seed in range(4)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    gate.opened.set()
    closing.join(SECONDS)
    assert all(each.done() and not each.cancelled() for each in (first, *futures))
    with pytest.raises(EngineStateError, match="a batcher that was closed"):
        batcher.submit(**arguments)
    batcher.close()


def test_close_without_draining_cancels(batcher, held):
    first, gate, _ = held
    futures = [batcher.submit(steps=5, seeds=seed, class_labels=0) for seed in range(4)]
    closing = threading.Thread(target=batcher.close, kwargs={"drain": False})
    closing.start()
    gate.opened.set()
    closing.join(SECONDS)
    assert all(each.cancelled() for each in (first, *futures))
    assert not workers()


def test_close_from_a_callback_does_not_wait_for_itself(engine):
    batcher = Batcher(engine)
    future = batcher.submit(steps=5, seeds=[1, 2], class_labels=0, callback=lambda event: batcher.close())
    np.testing.assert_array_equal(future.result(SECONDS), engine.sample(steps=5, seeds=[1, 2], class_labels=0))


def test_no_future_is_lost_when_callers_cancel_fail_and_close_at_once(engine):
    """Chaos: four threads that submit until they are refused, cancel and raise at random, and a close in the middle."""
    for seed, drain in enumerate([True, False] * 4):
        batcher, kept = Batcher(engine, max_queue=64, max_wait_ms=0.5), []

        def caller(seed: int, batcher: Batcher = batcher, kept: list[Any] = kept) -> None:
            rng = np.random.default_rng(seed)

            def callback(event: Any) -> None:
                if rng.random() < 0.1:
                    raise ValueError("chaos")

            while True:
                request = random_request(engine, rng, num_samples=int(rng.integers(1, 3)))
                try:
                    future = batcher.submit(**request, callback=callback if rng.random() < 0.3 else None)
                except QueueFullError:
                    continue
                except EngineStateError:
                    return
                kept.append((request, future))
                if rng.random() < 0.3:
                    kept[rng.integers(len(kept))][1].cancel()

        callers = [threading.Thread(target=caller, args=(10 * seed + n,)) for n in range(4)]
        for each in callers:
            each.start()
        while len(kept) < 100:
            threading.Event().wait(0.001)
        batcher.close(drain=drain)
        for each in callers:
            each.join(SECONDS)
        assert not workers()
        for request, future in kept:
            assert future.done()
            if future.cancelled():
                continue
            if future.exception() is None:
                np.testing.assert_array_equal(future.result(), engine.sample(**request))
            else:
                assert str(future.exception()) == "chaos"


def test_an_engine_that_is_closed_ends_its_requests(held_engine):
    engine, gate, future = held_engine
    engine.close()
    gate.opened.set()
    assert isinstance(future.exception(SECONDS), EngineStateError)


@pytest.fixture
def held_engine():
    engine, gate = serving_engine(), Gate()
    batcher = Batcher(engine)
    future = batcher.submit(steps=5, seeds=1, class_labels=0, callback=gate)
    assert gate.reached.wait(SECONDS)
    yield engine, gate, future
    gate.opened.set()
    batcher.close()


def test_a_full_queue_refuses_or_makes_wait(engine):
    gate = Gate()
    with Batcher(engine, max_queue=3) as batcher:
        batcher.submit(steps=5, seeds=1, class_labels=0, callback=gate)
        assert gate.reached.wait(SECONDS)
        batcher.submit(steps=5, seeds=[1, 2], class_labels=0)
        with pytest.raises(QueueFullError, match="room_ms"):
            batcher.submit(steps=5, seeds=1, class_labels=0)
        with pytest.raises(QueueFullError):
            batcher.submit(steps=5, seeds=1, class_labels=0, room_ms=20.0)
        with pytest.raises(InputError, match="max_queue=3"):
            batcher.submit(steps=5, seeds=[1, 2, 3, 4], class_labels=0)
        with ThreadPoolExecutor(1) as caller:
            waiting = caller.submit(batcher.submit, steps=1, seeds=1, class_labels=0, room_ms=1e3 * SECONDS)
            gate.opened.set()
            assert waiting.result(SECONDS).result(SECONDS).shape == (1, *SHAPE)


def test_deadlines_need_a_calibration(batcher):
    with pytest.raises(InputError, match=r"engine\.calibrate"):
        batcher.submit(steps=5, seeds=1, class_labels=0, deadline_ms=1000.0)


def test_a_deadline_that_cannot_be_met_is_refused(engine, monkeypatch):
    key = engine.select_plan(steps=5).key
    slow = {RunKind(key, size, False): Latency(500.0, 500.0, 1000.0, 9) for size in (1, 4)}
    monkeypatch.setattr(engine, "calibration", Calibration(CPU, slow))
    with Batcher(engine) as batcher:
        assert batcher.submit(steps=5, seeds=1, class_labels=0, deadline_ms=5000.0).result(SECONDS).any()
        with pytest.raises(DeadlineError, match=r"at least 1100\.0 ms"):
            batcher.submit(steps=5, seeds=1, class_labels=0, deadline_ms=1000.0)


def test_the_remedy_for_deadlines_works():
    with serving_engine() as engine:
        engine.calibrate(batch_sizes=[1, 2, 4], repeats=3, max_seconds=0.1)
        with Batcher(engine) as batcher:
            assert batcher.submit(steps=5, seeds=1, class_labels=0, deadline_ms=1e6).result(SECONDS).any()


def test_what_a_request_cannot_have_is_said_when_it_is_submitted(engine, batcher):
    with pytest.raises(PlanNotFoundError):
        batcher.submit(plan=skipstep.Plan(**{**engine.plan_defaults, "steps": 77}), seeds=1, class_labels=0)
    with pytest.raises(InputError, match="neither steps nor plan"):
        batcher.submit(seeds=1, class_labels=0)
    with Batcher(engine, max_batch=1) as alone, pytest.raises(InputError, match="max_batch=1 rows"):
        alone.submit(steps=5, seeds=1, class_labels=0, guidance_scale=2.0)
    with pytest.raises(InputError, match="a Engine"):
        Batcher("bundle")
