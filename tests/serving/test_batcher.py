"""Many callers, one engine: every future gets its own images, however callers come, go, fail and close."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
import torch
from engines import build
from serving_cases import SECONDS, SHAPE, Gate, random_request, serving_engine, workers
from tiny_networks import tiny_unet
from tolerances import BATCH_INVARIANCE

import skipstep
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.serving import Batcher


def test_hundreds_of_requests_from_several_threads(engine, batcher):
    rng = np.random.default_rng(0)
    requests = [random_request(engine, rng, num_samples=int(rng.integers(1, 4))) for _ in range(300)]
    with ThreadPoolExecutor(4) as callers:
        futures = list(callers.map(lambda each: batcher.submit(**each, room_ms=1e6), requests))
    for request, future in zip(requests, futures, strict=True):
        np.testing.assert_array_equal(future.result(SECONDS), engine.sample(**request))
    assert batcher.evaluations < sum(each["plan"].num_evaluations for each in requests) / 2


@pytest.mark.parametrize("backend", ["torch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
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
