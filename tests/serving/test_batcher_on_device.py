"""The batcher over an engine on a GPU, on a stand-in for the device: the same images, whoever shares the evaluations."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeDevice, build_on
from serving_cases import SECONDS, SHAPE, Gate, Troubled, random_request, serving_engine

from skipstep import Plan
from skipstep.serving import Batcher


@pytest.fixture
def device(monkeypatch, kernel_device):
    if kernel_device != "cpu":
        pytest.skip("on a GPU tests/test_cuda.py runs the engine itself")
    device = FakeDevice()
    build_on(monkeypatch, device)
    return device


def check_alone(engine, requests, futures):
    """Each has the bits that it has alone; where a statistic was reduced over a batch of another size, almost."""
    for request, future in zip(requests, futures, strict=True):
        np.testing.assert_array_equal(future.result(SECONDS), engine.sample(**request))


@pytest.mark.parametrize("loop", ["captured", "stepwise"])
def test_random_requests_have_the_images_that_they_have_alone(device, loop):
    rng = np.random.default_rng(0)
    with serving_engine(device="cuda", loop=loop, batch_sizes=[1, 2, 4]) as engine:
        with Batcher(engine, max_batch=8) as batcher:
            requests = [random_request(engine, rng, num_samples=int(rng.integers(1, 3))) for _ in range(30)]
            futures = [batcher.submit(**request) for request in requests]
            check_alone(engine, requests, futures)
        evaluations = sum(each["plan"].num_evaluations for each in requests)
        assert batcher.evaluations < evaluations / 2
