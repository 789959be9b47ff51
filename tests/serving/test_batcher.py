"""Many callers, one engine: every future gets its own images, however callers come, go, fail and close."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
import torch
from engines import build
from identities import CPU
from serving_cases import SHAPE, random_request, serving_engine
from tiny_networks import Labelled, tiny_unet
from tolerances import BATCH_INVARIANCE

import skipstep
from skipstep.demo import SHIPPED_BUNDLE
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

SECONDS = 60.0


class Troubled(Labelled):
    """NaN for the label 2, and an error for every batch that holds the label 1."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if (labels == 1).any():
            raise RuntimeError("label 1")
        return super().forward(x, t, labels).masked_fill((labels == 2).view(-1, 1, 1, 1), torch.nan)


class Gate:
    """A callback that holds the batcher's thread at its first step, until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened, self.events = threading.Event(), threading.Event(), []

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        self.reached.set()
        assert self.opened.wait(SECONDS)


@pytest.fixture(scope="module")
def engine():
    with serving_engine() as made:
        yield made


@pytest.fixture
def batcher(engine):
    with Batcher(engine) as made:
        yield made


@pytest.fixture
def held(batcher):
    """A request that holds the batcher in the middle of its work, the gate that does it, and its arguments."""
    gate, arguments = Gate(), {"steps": 5, "seeds": 1, "class_labels": 0}
    future = batcher.submit(**arguments, callback=gate)
    assert gate.reached.wait(SECONDS)
    yield future, gate, arguments
    gate.opened.set()


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "skipstep-batcher"]


def test_hundreds_of_requests_from_several_threads(engine, batcher):
    rng = np.random.default_rng(0)
    requests = [random_request(engine, rng, num_samples=int(rng.integers(1, 4))) for _ in range(300)]
    with ThreadPoolExecutor(4) as callers:
        futures = list(callers.map(lambda each: batcher.submit(**each, room_ms=1e6), requests))
    for request, future in zip(requests, futures, strict=True):
        np.testing.assert_array_equal(future.result(SECONDS), engine.sample(**request))
    assert batcher.evaluations < sum(each["plan"].num_evaluations for each in requests) / 2


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_trained_networks_images_are_those_that_it_draws_alone(backend):
    rng = np.random.default_rng(0)
    unet = tiny_unet(num_class_embeds=4)
    with build(unet, backend=backend, plans=[2, 3, 5], num_classes=4, null_label=3) as engine:
        requests = [random_request(engine, rng, num_samples=int(rng.integers(1, 3))) for _ in range(40)]
        with Batcher(engine) as batcher:
            futures = [batcher.submit(**request) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            np.testing.assert_allclose(future.result(0), engine.sample(**request), rtol=0, atol=BATCH_INVARIANCE)


def test_the_shipped_models_bits_are_those_of_single_samples_where_its_evaluations_are():
    rng = np.random.default_rng(0)
    with skipstep.load(SHIPPED_BUNDLE, allow_hard_links=True, num_threads=1) as engine:
        plans = [engine.select_plan(steps=steps) for steps in (6, 10)]
        requests = [
            {"plan": plans[n % 2], "seeds": n, "class_labels": n % 10, "guidance_scale": 2.0 if n % 3 else None}
            for n in range(12)
        ]
        alone = [engine.sample(**request) for request in requests]
        with Batcher(engine) as batcher:
            drawn = [future.result(SECONDS) for future in [batcher.submit(**request) for request in requests]]
        np.testing.assert_allclose(drawn, alone, rtol=0, atol=BATCH_INVARIANCE)
        if invariant(engine, rng):
            np.testing.assert_array_equal(drawn, alone)


def invariant(engine: Any, rng: np.random.Generator) -> bool:
    """Whether the network gives a sample the same bits alone and beside others."""
    seeds = rng.integers(0, 1000, 5).tolist()
    together = engine.sample(steps=6, seeds=seeds, class_labels=[0, 1, 2, 3, 4])
    return all(
        np.array_equal(together[n : n + 1], engine.sample(steps=6, seeds=seed, class_labels=n))
        for n, seed in enumerate(seeds)
    )


def test_requests_of_every_kind_of_result(engine, batcher):
    arguments = {"steps": 4, "seeds": [3, 4], "class_labels": 1, "guidance_scale": [2.0, 1.0]}
    tensor = batcher.submit(**arguments, output_type="pt").result(SECONDS)
    pictures = batcher.submit(**arguments, output_type="pil").result(SECONDS)
    expected = engine.sample(**arguments)
    assert torch.equal(tensor, torch.from_numpy(expected))
    assert [each.tobytes() for each in pictures] == [
        each.tobytes() for each in engine.sample(**arguments, output_type="pil")
    ]
    noise = np.random.default_rng(0).standard_normal((2, *SHAPE), np.float32)
    given = {"steps": 5, "x_T": noise, "class_labels": [0, 2]}
    future = batcher.submit(**given)
    expected = engine.sample(**given)
    noise[...] = 0.0
    np.testing.assert_array_equal(future.result(SECONDS), expected)


def test_plans_of_one_request_may_differ():
    with serving_engine() as engine, Batcher(engine) as batcher:
        other = engine.add_plan(skipstep.Plan(**{**engine.plan_defaults, "steps": 4, "eta": 0.5}))
        stochastic = next(plan for plan in engine.plans.values() if plan.eta == 1.0)
        arguments = {"plan": [stochastic, other], "seeds": [3, 4], "class_labels": 1}
        np.testing.assert_array_equal(batcher.submit(**arguments).result(SECONDS), engine.sample(**arguments))


def test_callbacks_see_the_steps_that_a_call_alone_shows(engine, batcher):
    seen: list[Any] = []
    alone: list[Any] = []
    arguments = {"steps": 2, "seeds": 7, "class_labels": 1, "guidance_scale": 2.0}
    batcher.submit(**arguments, callback=seen.append).result(SECONDS)
    engine.sample(**arguments, callback=alone.append)
    assert [(each.step, each.num_steps, each.first) for each in seen] == [(0, 2, 0), (1, 2, 0)]
    for one, other in zip(seen, alone, strict=True):
        np.testing.assert_array_equal(one.x_t, other.x_t)
        np.testing.assert_array_equal(one.x0, other.x0)


def test_futures_can_be_awaited_and_cancelled_by_asyncio(engine, batcher):
    arguments = {"steps": 5, "seeds": 1, "class_labels": 0}

    async def draw(**further: Any) -> Any:
        return await batcher.submit(**arguments, **further)

    async def several() -> list[Any]:
        gate = Gate()
        task = asyncio.create_task(draw(callback=gate))
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        gate.opened.set()
        return await asyncio.gather(draw(), task, draw(), return_exceptions=True)

    first, cancelled, last = asyncio.run(several())
    np.testing.assert_array_equal(first, engine.sample(**arguments))
    np.testing.assert_array_equal(last, first)
    assert isinstance(cancelled, asyncio.CancelledError)


def test_a_request_joins_at_the_next_evaluation(engine, batcher, held):
    first, gate, arguments = held
    late = batcher.submit(steps=1, seeds=2, class_labels=0)
    gate.opened.set()
    assert late.result(SECONDS).shape == first.result(SECONDS).shape
    assert batcher.evaluations == 5, "the second shared an evaluation of the first"
    np.testing.assert_array_equal(first.result(), engine.sample(**arguments))


def test_the_first_request_waits_for_company(engine):
    with Batcher(engine, max_wait_ms=2000.0, max_batch=2) as batcher:
        futures = [batcher.submit(steps=5, seeds=seed, class_labels=0) for seed in range(2)]
        wait(futures, SECONDS)
        assert batcher.evaluations == 5


def test_the_thread_ends_with_the_last_request(engine):
    with Batcher(engine, max_wait_ms=0.0) as batcher:
        for _ in range(3):
            batcher.submit(steps=1, seeds=2, class_labels=0).result(SECONDS)
            for worker in workers():
                worker.join(SECONDS)
            assert not workers()


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


def test_an_engine_on_a_gpu_is_refused_with_what_is_there(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "loop", type("StepGraphLoop", (), {"device": "cuda:0"})())
    with pytest.raises(InputError, match="an engine on cuda:0"):
        Batcher(engine)
