"""The batcher over an engine on a GPU, on a stand-in for the device: a shared evaluation changes no image."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait

import engines
import numpy as np
import pytest
import torch
from fake_cuda import FakeDevice, build_on
from serving_cases import SECONDS, SHAPE, Gate, Troubled, random_request, serving_engine
from tiny_networks import Labelled

from skipstep.calls.request import resolve_request
from skipstep.errors import EngineStateError, NonFiniteError
from skipstep.plans.stages import Stages
from skipstep.serving import Batcher


@pytest.fixture(scope="module")
def device(kernel_device):
    if kernel_device != "cpu":
        pytest.skip("on a GPU tests/cuda/test_cuda.py runs the batcher itself")
    with pytest.MonkeyPatch.context() as patch:
        device = FakeDevice()
        build_on(patch, device)
        yield device


@pytest.fixture(scope="module")
def engine(device):
    with serving_engine(device="cuda", batch_sizes=[1, 4]) as made:
        yield made


def small(network=None, **options):
    options = {"plans": [3], "sample_shape": SHAPE, "num_classes": 4, "null_label": 3, "device": "cuda", **options}
    return engines.build(network or Labelled(), **options)


def check_alone(engine, requests, futures):
    """Elementwise networks: the bits of a call of its own."""
    for request, future in zip(requests, futures, strict=True):
        np.testing.assert_array_equal(future.result(SECONDS), engine.sample(**request))


def test_random_requests_have_the_images_that_they_have_alone(engine, device):
    rng = np.random.default_rng(0)
    requests = [random_request(engine, rng, num_samples=int(rng.integers(1, 3))) for _ in range(10)]
    assert {"guidance_rescale", "guidance_scale"} < set().union(*requests)
    with Batcher(engine, max_batch=100) as batcher:
        recorded = len(device.graphs)
        futures = [batcher.submit(**request) for request in requests]
        check_alone(engine, requests, futures)
        assert batcher.evaluations < sum(each["plan"].num_evaluations for each in requests) / 2
        mix = batcher._flight.mix
        assert sorted(mix._places.free) == list(range(16)), "those who are done keep no place"
        # Only the guidance rescale of some was not known before.
        assert len(device.graphs) - recorded <= 4 * len(mix.batch_sizes)


@pytest.mark.parametrize("options", [{"loop": "stepwise"}, {"batch_sizes": [3]}])
def test_launches_one_by_one_and_batches_of_an_odd_size(device, options):
    rng = np.random.default_rng(1)
    with small(**options) as engine:
        recorded = len(device.graphs)
        batcher = Batcher(engine, max_batch=3)
        assert (len(device.graphs) > recorded) == ("loop" not in options)
        requests = [random_request(engine, rng) for _ in range(7)]
        futures = [batcher.submit(**request) for request in requests]
        check_alone(engine, requests, futures)
        batcher.close()


def test_samples_that_are_passed_over_keep_their_state_and_memory_grows(engine):
    rng = np.random.default_rng(2)
    mix, waiting, requests = engine.runner.loop.mix([], 8), [], []
    for _ in range(20):  # There are places for 16 at first, of one stage.
        arguments = random_request(engine, rng)
        stages = Stages.of([arguments.pop("plan")])
        request = resolve_request(engine.network, x_T=None, adds_noise=stages.adds_noise, **arguments)
        waiting.append([mix.sample(stages, request), 0])
        requests.append((stages, request))
    samples = [each for each, _ in waiting]
    mix.advance([(samples[0], 0)])
    waiting[0][1] += 1
    while any(under_way := [each for each in waiting if each[1] < len(each[0].rows)]):
        chosen = [under_way[place] for place in rng.permutation(len(under_way))[:3]]
        mix.advance([(sample, stage) for sample, stage in chosen])
        for each in chosen:
            each[1] += 1
    assert (mix._places.count, mix._places.num_stages) == (32, 6)
    for sample, (stages, request) in zip(samples, requests, strict=True):
        np.testing.assert_array_equal(sample.copy_state(), engine.runner.run(stages, request))


@pytest.mark.parametrize("kind", [np.array, torch.from_numpy])
def test_latents_are_read_when_they_are_submitted_and_callbacks_see_every_step(engine, kind):
    latents = np.random.default_rng(3).standard_normal((2, *SHAPE), np.float32)
    arguments = {"steps": 2, "class_labels": [0, 2], "guidance_scale": 2.0}
    seen, alone = [], []
    expected = engine.sample(x_T=latents, **arguments)
    for place in range(2):
        one = {**arguments, "class_labels": [0, 2][place], "x_T": latents[place : place + 1]}
        engine.sample(**one, callback=alone.append)
    given = kind(latents.copy())
    with Batcher(engine, max_wait_ms=200.0) as batcher:
        future = batcher.submit(x_T=given, **arguments, callback=seen.append)
        given[...] = 0.0
        np.testing.assert_array_equal(future.result(SECONDS), expected)
    seen.sort(key=lambda event: event.first)
    assert [(each.first, each.step, each.num_steps) for each in seen] == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    for ours, theirs in zip(seen, alone, strict=True):
        np.testing.assert_array_equal(ours.x_t, theirs.x_t)
        np.testing.assert_array_equal(ours.x0, theirs.x0)


def test_nan_a_callback_and_a_cancelled_request_touch_no_other(device):
    class Nan(Troubled):
        def forward(self, x, t, labels):  # Without the error, which no graph can have.
            return Labelled.forward(self, x, t, labels).masked_fill((labels == 2).view(-1, 1, 1, 1), torch.nan)

    def fail(event):
        raise ValueError("mine")

    with small(Nan()) as engine:
        gate = Gate()
        with Batcher(engine, max_batch=4) as batcher:
            held = batcher.submit(steps=3, seeds=9, class_labels=0, callback=gate)
            assert gate.reached.wait(SECONDS)
            fine = [batcher.submit(steps=3, seeds=seed, class_labels=0) for seed in range(3)]
            broken = batcher.submit(steps=3, seeds=[7, 8], class_labels=[0, 2])
            failing = batcher.submit(steps=3, seeds=1, class_labels=0, callback=fail)
            cancelled = batcher.submit(steps=3, seeds=1, class_labels=0)
            assert cancelled.cancel()
            gate.opened.set()
        assert isinstance(broken.exception(0), NonFiniteError)
        assert "samples [1] of 2" in str(broken.exception())
        assert str(failing.exception(0)) == "mine"
        requests = [{"steps": 3, "seeds": seed, "class_labels": 0} for seed in (9, 0, 1, 2)]
        check_alone(engine, requests, [held, *fine])


def test_close_in_the_middle_cancels_as_asked(engine):
    gate = Gate()
    batcher = Batcher(engine, max_batch=2)
    futures = [batcher.submit(steps=5, seeds=seed, class_labels=0, callback=gate) for seed in range(4)]
    assert gate.reached.wait(SECONDS)
    closing = threading.Thread(target=batcher.close, kwargs={"drain": False})
    closing.start()
    while not all(each.cancelled() for each in futures):
        time.sleep(0.001)
    gate.opened.set()
    closing.join(SECONDS)
    assert not wait(futures, SECONDS).not_done, "those who wait for a cancelled one are told"
    assert not closing.is_alive()


def test_an_error_of_the_device_ends_what_shared_the_evaluation(device):
    with small() as engine, Batcher(engine, max_batch=1) as batcher:
        request = {"steps": 3, "seeds": 1, "class_labels": 0}
        device.faults["enqueue"] = 0, RuntimeError("CUDA error: mine")
        failed = batcher.submit(**request)
        assert "mine" in str(failed.exception(SECONDS))
        check_alone(engine, [request], [batcher.submit(**request)])
        device.lost = True
        device.faults["enqueue"] = 0, RuntimeError("CUDA error: an illegal memory access was encountered")
        try:
            lost = batcher.submit(**request)
            assert isinstance(lost.exception(SECONDS), EngineStateError)
            with pytest.raises(EngineStateError):
                batcher.submit(**request)
        finally:
            device.lost = False
