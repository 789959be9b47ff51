"""The host loop's buffers: a pool that calls share, whatever fails; and the session that is loaded once."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from unittest.mock import Mock

import numpy as np
import pytest
from engines import SCHEDULE
from tiny_networks import Curve

from skipstep import Plan
from skipstep.backends.onnxruntime import LazySession
from skipstep.backends.torch import TorchDenoiser, prepare_module
from skipstep.calls.request import resolve_request
from skipstep.loops.stepwise import MAX_FREE_BUFFERS, HostLoop
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

SPEC = NetworkSpec((1, 3, 5))
STAGES = Stages.of([Plan(schedule=SCHEDULE, steps=3)])


@pytest.fixture
def loop() -> HostLoop:
    module, _ = prepare_module(Curve(), SPEC)
    make = Mock(side_effect=lambda batch_size: TorchDenoiser(module, SPEC, batch_size=batch_size))
    return HostLoop(make, SPEC)


def drawn(loop: HostLoop, seeds, *, between=lambda stage, run: None) -> np.ndarray:
    """The samples, with `between` called after each evaluation."""
    with loop.start(STAGES, resolve_request(SPEC, seeds=seeds, x_T=None, adds_noise=False)) as run:
        for stage in range(len(STAGES)):
            run.advance(stage)
            between(stage, run)
        return run.state()


def test_calls_at_the_same_time_have_buffers_of_their_own(loop):
    expected = [drawn(loop, [seed]) for seed in range(8)]
    barrier = Barrier(8)
    # Every call stops after every evaluation until all have come so far.
    together = ThreadPoolExecutor(8).map(
        lambda seed: drawn(loop, [seed], between=lambda stage, run: barrier.wait(timeout=60)), range(8)
    )
    np.testing.assert_array_equal(list(together), expected)
    assert loop._make.call_count == len({each.input.ctypes.data for each in loop._free}) == 8


def test_buffers_are_used_again_at_their_batch_size_and_bounded(loop):
    for seeds in ([1], [2, 3], [4], [5, 6]):
        np.testing.assert_array_equal(drawn(loop, seeds), np.concatenate([drawn(loop, [seed]) for seed in seeds]))
    assert [each.args for each in loop._make.call_args_list] == [(1,), (2,)]
    for size in range(1, MAX_FREE_BUFFERS + 3):
        assert drawn(loop, range(size)).shape == (size, 1, 3, 5)
    assert [each.batch_size for each in loop._free] == list(range(3, MAX_FREE_BUFFERS + 3))


def test_an_error_gives_the_buffers_back(loop, monkeypatch):
    expected = drawn(loop, [7])
    [buffers] = loop._free
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "new_context", lambda: Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            drawn(loop, [7])
    assert loop._free == [buffers]
    np.testing.assert_array_equal(drawn(loop, [7]), expected)


def test_a_session_that_fails_to_load_says_so_until_it_succeeds():
    session = object()
    lazy = LazySession(Mock(side_effect=[OSError("no file"), ValueError("half a file"), session]))
    for error, message in ((OSError, "no file"), (ValueError, "half a file")):
        with pytest.raises(error, match=message):
            lazy.get()
    assert lazy.get() is lazy.get() is session
