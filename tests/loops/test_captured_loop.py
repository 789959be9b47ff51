"""The loops on a GPU, walked without one: every form draws the bits of the loop in host memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from device_cases import PLANS, drawn, loops, request_of
from engines import SCHEDULE
from tiny_networks import Labelled, LearnedVariance
from tolerances import FLOAT32_LOOP

from skipstep import NoiseSchedule, Plan
from skipstep.errors import CaptureError
from skipstep.loops.contract import run_observed
from skipstep.loops.programs import LADDER
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages


@pytest.fixture(autouse=True)
def _without_a_gpu(kernel_device):
    if kernel_device != "cpu":
        pytest.skip("on a GPU tests/test_cuda.py runs the loops themselves")


# A plan of each kind of step; the others have slots as these have.
QUICK = ("ddim", "eta", "heun", "lms", "dynamic", "interval")
GUIDED, RESCALED = {"guidance_scale": 2.5}, {"guidance_scale": 2.5, "guidance_rescale": 0.7}


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        *(pytest.param(name, {}, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PLANS),
        *((name, GUIDED) for name in ("eta", "rk4", "dynamic")),
        ("ddim", RESCALED),
    ],
)
@pytest.mark.parametrize("wanted", LADDER)
def test_every_form_has_the_bits_of_the_loop_in_host_memory(device, name, guidance, wanted):
    stages = Stages.of([PLANS[name]])
    loop, host = loops(device, batch_size=6 if guidance else 3, wanted=wanted, required=True)
    request = request_of(stages, **guidance)
    # Two ways to sum a standard deviation differ in the last bits.
    atol = FLOAT32_LOOP if "guidance_rescale" in guidance else 0
    expected = drawn(host, stages, request)
    for _ in range(2):
        np.testing.assert_allclose(drawn(loop, stages, request), expected, rtol=0, atol=atol)
    [report] = loop.reports
    assert report.loop == wanted


class Sized(Labelled):
    """Keeps how large its batches were."""

    def __init__(self):
        super().__init__()
        self.batches = set()

    def forward(self, x, t, labels):
        self.batches.add(len(x))
        return super().forward(x, t, labels)


@pytest.mark.parametrize(
    ("name", "half"), [("interval", True), ("interval", False), ("interval", "another graph"), ("weights", True)]
)
@pytest.mark.parametrize("wanted", LADDER)
def test_steps_without_guidance_are_evaluated_on_half_the_batch(device, name, wanted, half):
    """Where there is a denoiser for it, of the same step inputs; else on the whole batch, with the same bits."""
    network, stages = Sized(), Stages.of([PLANS[name]])
    loop, host = loops(device, network, batch_size=6, half=bool(half), wanted=wanted, required=True)
    if half == "another graph":
        loop._denoisers[3].step_inputs = {}
    request = request_of(stages, **GUIDED)
    network.batches.clear()
    drawn(loop, stages, request)
    assert network.batches == ({3, 6} if half is True else {6})
    expected = drawn(host, stages, request)
    for _ in range(2):
        np.testing.assert_array_equal(drawn(loop, stages, request), expected)
    assert [report.loop for report in loop.reports] == [wanted]
    always = Stages.of([dataclasses.replace(PLANS[name], guidance_interval=None, guidance_weights=None)])
    assert not np.array_equal(drawn(host, always, request), expected)


def test_plans_per_sample_latents_and_a_learned_variance(device):
    spec = NetworkSpec((2, 5, 7))
    loop, host = loops(device, LearnedVariance(), spec, required=True)
    plans = [
        Plan(schedule=SCHEDULE, steps=4, solver="ddpm", variance="learned_range", spacing=spacing)
        for spacing in ("trailing", "leading", "quadratic")
    ]
    stages = Stages.of(plans)
    x_T = np.random.default_rng(0).standard_normal((3, 2, 5, 7)).astype(np.float32)
    request = request_of(stages, spec, x_T=x_T, class_labels=None, num_plans=3)
    np.testing.assert_allclose(drawn(loop, stages, request), drawn(host, stages, request), rtol=0, atol=FLOAT32_LOOP)


def test_one_graph_serves_every_plan_seed_label_and_latent_of_its_structure(device):
    loop, host = loops(device, required=True)
    x_T = np.random.default_rng(1).standard_normal((3, 2, 5, 7)).astype(np.float32)
    for plan, arguments in [
        (PLANS["ddim"], {}),
        (PLANS["ddim"], {"seeds": [7, 8, 9], "class_labels": [0, 0, 2]}),
        (Plan(schedule=SCHEDULE, steps=4, spacing="quadratic"), {}),
        (Plan(schedule=NoiseSchedule.linear(500, beta_end=0.03), steps=4), {"seeds": None, "x_T": x_T}),
        (PLANS["ddim"], {}),
    ]:
        stages = Stages.of([plan])
        request = request_of(stages, **arguments)
        np.testing.assert_array_equal(drawn(loop, stages, request), drawn(host, stages, request))
    assert len(loop.reports) == 1
    assert len(device.graphs) == 1


def test_a_call_is_one_launch(device):
    stages = Stages.of([PLANS["ddim"]])
    loop, _ = loops(device, required=True)
    drawn(loop, stages, request_of(stages))
    device.launches.clear()
    device.waits = 0
    pending = loop.enqueue(stages, request_of(stages), np.empty((3, 2, 5, 7), np.float32))
    assert device.waits == 0, "the host waits for nothing while it enqueues"
    pending.wait()
    assert len(device.launches) == 1


@pytest.mark.parametrize("wanted", LADDER)
@pytest.mark.parametrize("given", ["seeds", "x_T"])
def test_a_call_is_one_piece_of_work_between_one_copy_in_and_one_out(device, monkeypatch, given, wanted):
    """With the same events and the same host memory as the call before."""
    stages = Stages.of([PLANS["ddim"]])
    loop, host = loops(device, wanted=wanted)
    x_T = np.random.default_rng(2).standard_normal((3, 2, 5, 7)).astype(np.float32)
    arguments = {"x_T": x_T, "seeds": None} if given == "x_T" else {}
    drawn(loop, stages, request_of(stages, **arguments))
    device.finish()
    before, taken, copied = device.stream.enqueued, [], []
    monkeypatch.setattr(device, "staging", lambda num_bytes: taken.append(num_bytes))
    copy = torch.Tensor.copy_

    def counted(self, source, **options):
        copied.append(self.dtype)
        return copy(self, source, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    pending = loop.enqueue(stages, request_of(stages, **arguments), np.empty((3, 2, 5, 7), np.float32))
    assert device.stream.enqueued - before == 2, "the wait for the caller's stream, and the work"
    pending.wait()
    assert taken == []
    assert copied.count(torch.uint8) == 2, "blocks travel as bytes"
    monkeypatch.undo()
    found = drawn(loop, stages, request_of(stages, **arguments))
    np.testing.assert_array_equal(found, drawn(host, stages, request_of(stages, **arguments)))


def test_calls_that_are_under_way_together_keep_their_own_samples(device):
    stages = Stages.of([PLANS["ddim"]])
    loop, host = loops(device)
    requests = [request_of(stages, seeds=[3 * each, 3 * each + 1, 3 * each + 2]) for each in range(7)]
    outs = [np.empty((3, 2, 5, 7), np.float32) for _ in requests]
    pending = [loop.enqueue(stages, request, out) for request, out in zip(requests, outs, strict=True)]
    for each in reversed(pending):
        assert each.wait() == {}
    for request, out in zip(requests, outs, strict=True):
        np.testing.assert_array_equal(out, drawn(host, stages, request))


def test_a_graph_of_steps_is_bounded(device, monkeypatch):
    """Its size does not grow with the number of evaluations, and it is chosen where the whole would be too large."""
    monkeypatch.setattr("skipstep.loops.programs.MAX_NODES", 40)
    loop, host = loops(device)
    sizes = {}
    for steps in (2, 12, 16):
        stages = Stages.of([Plan(schedule=SCHEDULE, steps=steps, eta=1.0)])
        np.testing.assert_array_equal(drawn(loop, stages, request_of(stages)), drawn(host, stages, request_of(stages)))
        sizes[steps] = next(report for report in loop.reports if report.num_stages == steps)
    assert sizes[2].loop == "captured"
    assert sizes[12].loop == sizes[16].loop == "step_graph"
    assert sizes[12].num_nodes == sizes[16].num_nodes
    assert "nodes, more than 40" in sizes[16].reason


def test_observers_see_the_same(device):
    stages = Stages.of([PLANS["heun"]])
    loop, host = loops(device)
    seen = {"device": [], "host": []}
    for name, each in (("device", loop), ("host", host)):
        out = np.empty((3, 2, 5, 7), np.float32)
        run_observed(
            each,
            stages,
            request_of(stages),
            out,
            observer=lambda stage, run, kept=seen[name]: kept.extend([run.state(), run.x0()]),
            keep_x0=True,
        )
        seen[name].append(out)
    np.testing.assert_array_equal(np.stack(seen["device"]), np.stack(seen["host"]))


def test_the_state_can_be_set_between_evaluations(device):
    stages = Stages.of([PLANS["ddim"]])
    loop, _ = loops(device)
    with loop.start(stages, request_of(stages)) as run:
        again = np.full((3, 2, 5, 7), 0.25, np.float32)
        run.set_state(again)
        np.testing.assert_array_equal(run.state(), again)
        np.testing.assert_array_equal(loop._denoisers[3].input.numpy(), again)


class Reads(torch.nn.Module):
    """A network whose forward has to wait for the device, to know a shape: it cannot be recorded."""

    def forward(self, x, t):
        return x * float(len(torch.nonzero(t > 500)) > 0)


def test_a_network_that_reads_the_device_runs_stepwise_and_says_why(device):
    spec = NetworkSpec((2, 5, 7))
    loop, host = loops(device, Reads(), spec)
    stages = Stages.of([PLANS["ddim"]])
    request = request_of(stages, spec, class_labels=None)
    np.testing.assert_array_equal(drawn(loop, stages, request), drawn(host, stages, request))
    [report] = loop.reports
    assert report.loop == "stepwise"
    assert "torch cannot be recorded: CUDA error: operation not permitted" in report.reason
    assert "more about it" not in report.reason
    assert len(device.graphs) == 0


def broken_network(at: int) -> torch.nn.Module:
    class Breaks(torch.nn.Module):
        """NaN in its second sample at one timestep."""

        def forward(self, x, t):
            spoil = torch.zeros_like(x)
            spoil[1:2] = torch.nan
            return torch.where((t == at).view(-1, 1, 1, 1), x + spoil, x)

    return Breaks()


@pytest.mark.parametrize("wanted", LADDER)
def test_nan_in_the_middle_of_a_loop_is_found_after_it(device, wanted):
    """The step notes it on the device; nobody looks before the end."""
    spec = NetworkSpec((2, 5, 7))
    stages = Stages.of([PLANS["ddim"]])
    loop, _ = loops(device, broken_network(int(stages.timesteps[2, 0])), spec, wanted=wanted)
    out = np.empty((3, 2, 5, 7), np.float32)
    request = request_of(stages, spec, class_labels=None)
    assert loop.enqueue(stages, request, out).wait() == {1: 2}
    assert np.isfinite(out[[0, 2]]).all()
    # The padding of a batch is nobody's sample.
    assert loop.enqueue(stages, request, out[:1]).wait() == {}


def test_what_the_caller_does_on_its_stream_comes_in_order(device):
    """x_T is written before the call and overwritten after it, `out` is read before it: all on the caller's stream."""
    loop, host = loops(device)
    stages = Stages.of([PLANS["ddim"]])
    noise = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = drawn(host, stages, request_of(stages, seeds=None, x_T=noise.numpy()))
    loop.prepare([stages])
    for seed in range(8):
        device._random.seed(seed)
        x_T, out, before = torch.zeros(3, 2, 5, 7), torch.full((3, 2, 5, 7), 5.0), torch.zeros(3, 2, 5, 7)
        caller = device.caller_stream()
        caller.run(lambda x_T=x_T: x_T.copy_(noise))
        caller.run(lambda before=before, out=out: before.copy_(out))
        request = dataclasses.replace(request_of(stages, x_T=noise.numpy()), x_T=x_T)
        pending = loop.enqueue(stages, request, out)
        caller.run(lambda x_T=x_T: x_T.fill_(-7.0))
        after = torch.zeros(3, 2, 5, 7)
        caller.run(lambda after=after, out=out: after.copy_(out))
        pending.wait()
        device.finish()
        np.testing.assert_array_equal(out.numpy(), expected)
        assert torch.equal(after, out)
        assert bool((before == 5.0).all())


def test_capture_that_is_required_is_had_or_refused(device):
    spec = NetworkSpec((2, 5, 7))
    loop, _ = loops(device, Reads(), spec, required=True)
    stages = Stages.of([PLANS["ddim"]])
    with pytest.raises(CaptureError, match=r"run stepwise: torch cannot be recorded.*require_captured"):
        loop.enqueue(stages, request_of(stages, spec, class_labels=None), np.empty((3, 2, 5, 7), np.float32))
    loop, _ = loops(device)
    loop._denoisers[3].capture_refusal = "its library records graphs of its own"
    loop.prepare([stages])
    [report] = loop.reports
    assert (report.loop, report.reason) == ("stepwise", "its library records graphs of its own")
