"""The loops on a GPU, walked without one: every form draws the bits of the loop in host memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from engines import SCHEDULE
from fake_cuda import FakeDevice, install
from tiny_networks import Labelled, LearnedVariance
from tolerances import FLOAT32_LOOP

from skipstep import NoiseSchedule, Plan
from skipstep.backends.torch import TorchDenoiser, prepare_module
from skipstep.backends.torch_cuda import TorchDeviceDenoiser
from skipstep.calls.request import resolve_request
from skipstep.errors import CaptureError, DeviceMemoryError, EngineStateError
from skipstep.loops.captured import CudaLoop
from skipstep.loops.contract import run_observed
from skipstep.loops.lifecycle import Lifecycle
from skipstep.loops.programs import LADDER
from skipstep.loops.stepwise import HostLoop
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

CPU = torch.device("cpu")
PLANS = {
    name: Plan(schedule=SCHEDULE, steps=4, **options)
    for name, options in {
        "ddim": {},
        "eta": {"eta": 0.7, "convention": "guided"},
        "ddpm": {"solver": "ddpm"},
        "heun": {"solver": "heun"},
        "rk4": {"solver": "rk4", "midpoints": "nearest"},
        "dpm_solver_2": {"solver": "dpm_solver_2", "midpoints": "nearest"},
        "dpm_solver_pp_2m": {"solver": "dpm_solver_pp_2m"},
        "dynamic": {"clip": "dynamic", "dynamic_quantile": 0.7},
    }.items()
}
SPEC = NetworkSpec((1, 5, 7), num_classes=10, null_label=10)


@pytest.fixture(autouse=True)
def _without_a_gpu(kernel_device):
    if kernel_device != "cpu":
        pytest.skip("on a GPU tests/test_cuda.py runs the loops themselves")


@pytest.fixture
def device(monkeypatch):
    device = FakeDevice()
    install(monkeypatch, device)
    return device


def loops(device, network=None, spec=SPEC, *, batch_size=3, **options):
    """The loop on the device, and the one in host memory."""
    module, spec = prepare_module(Labelled() if network is None else network, spec)
    denoiser = TorchDeviceDenoiser(module, spec, batch_size=batch_size, device=CPU, dtype=torch.float32)
    host = HostLoop(lambda size: TorchDenoiser(module, spec, batch_size=size), spec)
    sizes = [batch_size, batch_size // 2] if spec.can_guide else [batch_size]
    return CudaLoop({batch_size: denoiser}, spec, device, Lifecycle(), batch_sizes=sizes, **options), host


def request_of(stages, spec=SPEC, **arguments):
    given = {"seeds": [3, 2**64 - 1, 0], "x_T": None, "class_labels": [1, 5, 9], "adds_noise": stages.adds_noise}
    return resolve_request(spec, **{**given, **arguments})


def drawn(loop, stages, request):
    out = np.full((request.num_samples, *SPEC.sample_shape), np.nan, np.float32)
    assert loop.enqueue(stages, request, out).wait() == {}
    return out


GUIDED, RESCALED = {"guidance_scale": 2.5}, {"guidance_scale": 2.5, "guidance_rescale": 0.7}


@pytest.mark.parametrize(
    ("name", "guidance"),
    [*((name, {}) for name in PLANS), *((name, GUIDED) for name in ("eta", "rk4", "dynamic")), ("ddim", RESCALED)],
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


def test_plans_per_sample_latents_and_a_learned_variance(device):
    spec = NetworkSpec((1, 5, 7))
    loop, host = loops(device, LearnedVariance(), spec, required=True)
    plans = [
        Plan(schedule=SCHEDULE, steps=4, solver="ddpm", variance="learned_range", spacing=spacing)
        for spacing in ("trailing", "leading", "quadratic")
    ]
    stages = Stages.of(plans)
    x_T = np.random.default_rng(0).standard_normal((3, 1, 5, 7)).astype(np.float32)
    request = request_of(stages, spec, x_T=x_T, class_labels=None, num_plans=3)
    np.testing.assert_allclose(drawn(loop, stages, request), drawn(host, stages, request), rtol=0, atol=FLOAT32_LOOP)


def test_one_graph_serves_every_plan_seed_label_and_latent_of_its_structure(device):
    loop, host = loops(device, required=True)
    x_T = np.random.default_rng(1).standard_normal((3, 1, 5, 7)).astype(np.float32)
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
    pending = loop.enqueue(stages, request_of(stages), np.empty((3, 1, 5, 7), np.float32))
    assert device.waits == 0, "the host waits for nothing while it enqueues"
    pending.wait()
    assert len(device.launches) == 1


def test_a_graph_of_steps_is_bounded(device, monkeypatch):
    """Its size does not grow with the number of evaluations, and it is chosen where the whole would be too large."""
    monkeypatch.setattr("skipstep.loops.programs.MAX_NODES", 40)
    loop, host = loops(device)
    sizes = {}
    for steps in (2, 12, 24):
        stages = Stages.of([Plan(schedule=SCHEDULE, steps=steps, eta=1.0)])
        np.testing.assert_array_equal(drawn(loop, stages, request_of(stages)), drawn(host, stages, request_of(stages)))
        sizes[steps] = next(report for report in loop.reports if report.num_stages == steps)
    assert sizes[2].loop == "captured"
    assert sizes[12].loop == sizes[24].loop == "step_graph"
    assert sizes[12].num_nodes == sizes[24].num_nodes
    assert "nodes, more than 40" in sizes[24].reason


def test_observers_see_the_same(device):
    stages = Stages.of([PLANS["heun"]])
    loop, host = loops(device)
    seen = {"device": [], "host": []}
    for name, each in (("device", loop), ("host", host)):
        out = np.empty((3, 1, 5, 7), np.float32)
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
        again = np.full((3, 1, 5, 7), 0.25, np.float32)
        run.set_state(again)
        np.testing.assert_array_equal(run.state(), again)
        np.testing.assert_array_equal(loop._denoisers[3].input.numpy(), again)


class Reads(torch.nn.Module):
    """A network whose forward has to wait for the device, to know a shape: it cannot be recorded."""

    def forward(self, x, t):
        return x * float(len(torch.nonzero(t > 500)) > 0)


def test_a_network_that_reads_the_device_runs_stepwise_and_says_why(device):
    spec = NetworkSpec((1, 5, 7))
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
    spec = NetworkSpec((1, 5, 7))
    stages = Stages.of([PLANS["ddim"]])
    loop, _ = loops(device, broken_network(int(stages.timesteps[2, 0])), spec, wanted=wanted)
    out = np.empty((3, 1, 5, 7), np.float32)
    request = request_of(stages, spec, class_labels=None)
    assert loop.enqueue(stages, request, out).wait() == {1: 2}
    assert np.isfinite(out[[0, 2]]).all()
    # The padding of a batch is nobody's sample.
    assert loop.enqueue(stages, request, out[:1]).wait() == {}


def test_what_the_caller_does_on_its_stream_comes_in_order(device):
    """x_T is written before the call and overwritten after it, `out` is read before it: all on the caller's stream."""
    loop, host = loops(device)
    stages = Stages.of([PLANS["ddim"]])
    noise = torch.randn(3, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = drawn(host, stages, request_of(stages, seeds=None, x_T=noise.numpy()))
    loop.prepare([stages])
    for seed in range(20):
        device._random.seed(seed)
        x_T, out, before = torch.zeros(3, 1, 5, 7), torch.full((3, 1, 5, 7), 5.0), torch.zeros(3, 1, 5, 7)
        caller = device.caller_stream()
        caller.run(lambda x_T=x_T: x_T.copy_(noise))
        caller.run(lambda before=before, out=out: before.copy_(out))
        request = dataclasses.replace(request_of(stages, x_T=noise.numpy()), x_T=x_T)
        pending = loop.enqueue(stages, request, out)
        caller.run(lambda x_T=x_T: x_T.fill_(-7.0))
        after = torch.zeros(3, 1, 5, 7)
        caller.run(lambda after=after, out=out: after.copy_(out))
        pending.wait()
        device.finish()
        np.testing.assert_array_equal(out.numpy(), expected)
        assert torch.equal(after, out)
        assert bool((before == 5.0).all())


def test_capture_that_is_required_is_had_or_refused(device):
    spec = NetworkSpec((1, 5, 7))
    loop, _ = loops(device, Reads(), spec, required=True)
    stages = Stages.of([PLANS["ddim"]])
    with pytest.raises(CaptureError, match=r"run stepwise: torch cannot be recorded.*require_captured"):
        loop.enqueue(stages, request_of(stages, spec, class_labels=None), np.empty((3, 1, 5, 7), np.float32))
    loop, _ = loops(device)
    loop._denoisers[3].capture_refusal = "its library records graphs of its own"
    loop.prepare([stages])
    [report] = loop.reports
    assert (report.loop, report.reason) == ("stepwise", "its library records graphs of its own")


@pytest.mark.parametrize("place", ["warm_up", "capture", "operation", "kernel"])
@pytest.mark.parametrize("passes", [0, 5, *(pytest.param(passes, marks=pytest.mark.slow) for passes in (1, 2, 20))])
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
    request, out = request_of(stages), np.empty((3, 1, 5, 7), np.float32)
    loop.enqueue(stages, request, out).wait()
    device.lost = True
    device.faults["enqueue"] = (1, RuntimeError("CUDA error: an illegal memory access was encountered\ndetails"))
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
