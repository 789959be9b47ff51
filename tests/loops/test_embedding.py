"""An engine inside somebody's product: threads, futures, memory of the caller's, closing, forks."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import engines
import numpy as np
import pytest
import torch
from tiny_networks import Curve

from skipstep.errors import DeadlineError, EngineStateError, InputError

SHAPE = (1, 7, 9)
build = partial(engines.build, Curve(), plans=[2], sample_shape=SHAPE)


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def engine(request):
    with build(backend=request.param, num_threads=1) as engine:
        yield engine


def test_threads_do_not_mix_their_results(engine):
    """Eight threads, two hundred calls each, of one and of several samples."""
    expected = engine.sample(steps=2, seeds=range(40))

    def check(thread: int) -> None:
        for call in range(200):
            seed, count = (thread * 7 + call) % 36, 1 + 3 * (call % 2)
            drawn = engine.sample(steps=2, seeds=range(seed, seed + count))
            np.testing.assert_array_equal(drawn, expected[seed : seed + count])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(8)))


def test_a_future_has_what_a_call_returns(engine):
    futures = [engine.sample_async(steps=2, seeds=[seed], output_type="np") for seed in range(5)]
    for seed, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(timeout=60), engine.sample(steps=2, seeds=[seed]))

    async def wait():
        return await asyncio.wrap_future(engine.sample_async(steps=2, seeds=[3]))

    np.testing.assert_array_equal(asyncio.run(wait()), engine.sample(steps=2, seeds=[3]))


def test_what_is_wrong_with_a_future_is_said_at_once(engine):
    with pytest.raises(InputError, match="seeds"):
        engine.sample_async(steps=2, seeds=[-1])


@pytest.mark.parametrize("count", [1, 3, 9])
def test_draws_into_the_callers_memory(engine, count):
    expected = engine.sample(steps=2, seeds=range(count))
    for out in (np.full((count, *SHAPE), np.nan, np.float32), torch.full((count, *SHAPE), torch.nan)):
        assert engine.sample(steps=2, seeds=range(count), out=out) is out
        np.testing.assert_array_equal(np.asarray(out), expected)
    larger = np.full((count + 2, *SHAPE), 7.0, np.float32)
    engine.sample_async(steps=2, seeds=range(count), out=larger[1:-1]).result(timeout=60)
    np.testing.assert_array_equal(larger[1:-1], expected)
    assert (larger[[0, -1]] == 7.0).all()


class OtherLibrary:
    """An array of a library that nobody here knows, which speaks DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_dlpack_goes_in_and_out(engine):
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = engine.sample(steps=2, x_T=noise.numpy())
    np.testing.assert_array_equal(engine.sample(steps=2, x_T=OtherLibrary(noise)), expected)
    out = torch.zeros(2, *SHAPE)
    engine.sample(steps=2, x_T=noise, out=OtherLibrary(out))
    np.testing.assert_array_equal(out.numpy(), expected)
    for output_type in ("np", "pt"):
        samples = engine.sample(steps=2, x_T=noise, output_type=output_type)
        np.testing.assert_array_equal(np.from_dlpack(samples), expected)


@pytest.mark.parametrize(
    ("out", "names"),
    [
        (np.zeros((1, *SHAPE)), "dtype float64"),
        (np.zeros((2, *SHAPE), np.float32), "shape [2, 1, 7, 9]"),
        (np.zeros((1, 1, 9, 7), np.float32).transpose(0, 1, 3, 2), "as it lies in memory"),
        (torch.zeros(1, *SHAPE, dtype=torch.float16), "float16"),
        (torch.zeros(1, *SHAPE, device="meta"), "on meta"),
        ([0.0], "without memory"),
    ],
)
def test_memory_that_does_not_fit_is_refused(engine, out, names):
    with pytest.raises(InputError) as caught:
        engine.sample(steps=2, seeds=[1], out=out)
    assert names in caught.value.got


def test_pictures_have_no_place_in_it(engine):
    with pytest.raises(InputError, match="pil"):
        engine.sample(steps=2, seeds=[1], output_type="pil", out=np.zeros((1, *SHAPE), np.float32))
    read_only = np.zeros((1, *SHAPE), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(InputError, match="writable"):
        engine.sample(steps=2, seeds=[1], out=read_only)


def test_a_deadline_picks_the_longest_plan_that_meets_it():
    engine = build(plans=[1, 3], batch_sizes=[1])
    with pytest.raises(InputError, match="calibrate"):
        engine.sample(deadline_ms=1e6, seeds=[1])
    engine.calibrate(repeats=3)
    longest = engine.sample(steps=3, seeds=[1])
    np.testing.assert_array_equal(engine.sample(deadline_ms=1e6, seeds=[1]), longest)
    np.testing.assert_array_equal(engine.sample_async(deadline_ms=1e6, seeds=[1]).result(timeout=60), longest)
    with pytest.raises(DeadlineError, match="p99"):
        engine.sample(deadline_ms=1e-6, seeds=[1])
    with pytest.raises(InputError, match="deadline_ms beside"):
        engine.sample(deadline_ms=5.0, steps=1, seeds=[1])
    assert "p99" in engine.describe()


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_closed_engine_says_so(backend):
    engine = build(backend=backend)
    future = engine.sample_async(steps=2, seeds=[1])
    engine.close()
    assert future.result(timeout=60).shape == (1, *SHAPE), "what was under way is finished first"
    for use in (engine.sample, engine.sample_async):
        with pytest.raises(EngineStateError, match="closed"):
            use(steps=2, seeds=[1])
    with pytest.raises(EngineStateError, match="closed"):
        engine.invert(np.zeros((1, *SHAPE), np.float32), steps=2)
    engine.close()


def test_a_forked_child_is_told(engine):
    engine.sample(steps=2, seeds=[1])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            engine.sample(steps=2, seeds=[1])
            message = "it drew"
        except EngineStateError as error:
            message = str(error)
        os.write(writer, message.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    message = os.read(reader, 4096).decode()
    os.close(reader)
    assert "forked child" in message
    assert "spawn" in message
    engine.sample(steps=2, seeds=[1])


def test_options_for_a_gpu_are_refused_on_the_cpu():
    for option in ({"precision": "float16"}, {"require_captured": True}, {"compile_network": True}):
        with pytest.raises(InputError, match="on the CPU"):
            build(**option)
    with pytest.raises(InputError, match="loop='captured'"):
        build(loop="captured")
    with pytest.raises(InputError, match="precision='int8'"):
        build(precision="int8")
    with pytest.raises(InputError, match="backend='tensorrt' on cpu"):
        build(backend="tensorrt")
