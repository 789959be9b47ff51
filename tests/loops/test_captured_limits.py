"""The captured loop where memory runs out, a context is lost, programs grow old, or threads meet."""

from __future__ import annotations

import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from device_cases import PLANS, drawn, loops, request_of
from engines import SCHEDULE

from skipstep import Plan
from skipstep.errors import DeviceMemoryError, EngineStateError
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages


@pytest.mark.parametrize("place", ["warm_up", "capture", "operation", "kernel"])
@pytest.mark.parametrize("passes", [5, *(pytest.param(passes, marks=pytest.mark.slow) for passes in (0, 1, 2, 20))])
def test_memory_that_runs_out_anywhere_leaves_the_engine_usable(device, place, passes):
    """Wherever it happens, what was taken is given back; a loop that still runs runs right, and says what it lacks."""
    loop, host = loops(device)
    stages = Stages.of([PLANS["eta"]])
    request = request_of(stages)
    device.faults[place] = (passes, torch.OutOfMemoryError("CUDA out of memory"))
    # An error of the library's own would end the test here.
    with contextlib.suppress(DeviceMemoryError):
        drawn(loop, stages, request)
    device.faults.clear()
    # Nothing half-made stands in the way of the next call.
    ours = drawn(loop, stages, request)
    np.testing.assert_array_equal(ours, drawn(host, stages, request))
    [report] = loop.reports
    gc.collect()
    assert len(device.graphs) == {"captured": 1, "step_graph": len(set(stages.flags)) + 1, "stepwise": 0}[report.loop]
    assert report.loop == "captured" or "memory" in report.reason


def test_what_would_fit_is_said(device):
    loop, _ = loops(device)
    stages = Stages.of([PLANS["ddim"]])
    loop.prepare([stages])
    device.memory = 700_000
    device.faults["warm_up"] = (0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(DeviceMemoryError, match="build with batch sizes up to 2"):
        loop.prepare([Stages.of([PLANS["heun"]])])


def test_a_lost_context_ends_the_engine(device):
    loop, _ = loops(device)
    stages = Stages.of([PLANS["ddim"]])
    request, out = request_of(stages), np.empty((3, 2, 5, 7), np.float32)
    loop.enqueue(stages, request, out).wait()
    device.lost = True
    device.faults["enqueue"] = (0, RuntimeError("CUDA error: an illegal memory access was encountered\ndetails"))
    for _ in range(2):
        with pytest.raises(EngineStateError, match=r"context is lost .*illegal memory access.*new process"):
            loop.enqueue(stages, request, out)


def test_programs_that_were_not_used_for_long_are_given_back(device, monkeypatch):
    monkeypatch.setattr("skipstep.loops.captured.MAX_PROGRAMS", 2)
    loop, _ = loops(device)
    for steps in (1, 2, 1, 3):
        stages = Stages.of([Plan(schedule=SCHEDULE, steps=steps)])
        drawn(loop, stages, request_of(stages))
    gc.collect()
    assert sorted(report.num_stages for report in loop.reports) == [1, 3]
    assert len(device.graphs) == 2
    loop.close()
    gc.collect()
    assert len(device.graphs) == 0


def test_threads_do_not_mix_their_results(device, monkeypatch):
    """Eight threads, two hundred calls each. The kernels are stood in for by arithmetic, for speed: what is tested is
    who writes where and when."""

    def step(*, state, model_output, network_input, table, stage, seeds, counter, broken, **_):
        state.mul_(0.5).add_(model_output, alpha=0.25)
        network_input.copy_(state)

    def begin(*, state, network_input, seeds, given, **_):
        state.copy_(seeds.view(-1, 1, 1, 1).float().expand_as(state))
        network_input.copy_(state)

    monkeypatch.setattr("skipstep.loops.workspace.ddim_step", lambda **k: device.kernel(step, k))
    monkeypatch.setattr("skipstep.loops.workspace.initial_noise", lambda **k: device.kernel(begin, k))
    spec = NetworkSpec((1, 2, 2))

    class Keeps(torch.nn.Module):
        def forward(self, x, t):
            return 2.0 * x

    loop, _ = loops(device, Keeps(), spec, batch_size=2, required=True)
    stages = Stages.of([PLANS["ddim"]])

    def check(thread: int) -> None:
        for call in range(200):
            seed = thread * 1000 + call
            request = request_of(stages, spec, seeds=[seed, seed + 500], class_labels=None)
            out = np.empty((2, 1, 2, 2), np.float32)
            loop.enqueue(stages, request, out).wait()
            assert np.all(out[0] == seed)
            assert np.all(out[1] == seed + 500)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(8)))
