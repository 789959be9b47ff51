"""The engine on a GPU, from Engine.build to the caller's memory, on a stand-in for the device."""

from __future__ import annotations

import gc

import engines
import numpy as np
import pytest
import torch
from engines import SCHEDULE
from fake_cuda import FakeDevice, build_on
from tiny_networks import Curve, Labelled, tiny_unet
from tolerances import BACKENDS_AGREE

from skipstep import Engine, Plan
from skipstep.backends.torch_cuda import TorchDeviceDenoiser
from skipstep.backends.torch_graph import NotTraceableError
from skipstep.backends.torch_split import SplitNetworks
from skipstep.cuda.device import CAPTURE_LOCK
from skipstep.errors import (
    CaptureError,
    DeviceMemoryError,
    EngineStateError,
    ExportError,
    InputError,
    NonFiniteError,
)
from skipstep.kernels.autotune import LaunchCase, TunedLaunch
from skipstep.kernels.launch import StepLaunch

# More than one channel: the torch backend then has samples in channels-last order.
SHAPE = (2, 3, 5)


@pytest.fixture
def device(monkeypatch, kernel_device):
    if kernel_device != "cpu":
        pytest.skip("on a GPU tests/test_cuda.py runs the engine itself")
    device = FakeDevice()
    build_on(monkeypatch, device)
    return device


def build(network=None, **options) -> Engine:
    return engines.build(network or Curve(), **{"plans": [2], "sample_shape": SHAPE, **options})


def on_the_cpu(network=None, **options) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipstep.building.resolve_device", lambda name, **_: torch.device(name))
        return build(network, **options)


def test_build_makes_every_graph_that_its_plans_need(device):
    labels = {"num_classes": 10, "null_label": 10}
    engine = build(Labelled(), plans=[2, 3], **labels)
    assert sorted((r.num_stages, r.batch_size, r.guided) for r in engine.captures) == [
        (stages, batch, guided) for stages in (2, 3) for batch in (1, 4) for guided in (False, True)
    ]
    assert {report.loop for report in engine.captures} == {"captured"}
    reference = on_the_cpu(Labelled(), plans=[2, 3], **labels)
    before = len(device.graphs)
    for arguments in (
        {"steps": 2, "seeds": range(7), "class_labels": [1, 2, 3, 4, 5, 6, 7]},
        {"steps": 3, "seeds": [5], "class_labels": 3, "guidance_scale": 2.0},
    ):
        np.testing.assert_array_equal(engine.sample(**arguments), reference.sample(**arguments))
    assert len(device.graphs) == before, "no call recorded anything"
    described = engine.describe()
    assert "loop        captured" in described
    assert "graph       2 evaluations, batch 4, guided: captured" in described


def test_several_runs_of_a_call_are_enqueued_before_anybody_waits(device):
    engine = build()
    device.waits = 0
    drawn = engine.sample(steps=2, seeds=range(9))
    assert device.waits == len(engine.split(9)) == 3
    np.testing.assert_array_equal(drawn, on_the_cpu().sample(steps=2, seeds=range(9)))


def test_samples_stay_on_the_device(device):
    engine = build()
    x_T = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = on_the_cpu().sample(steps=2, x_T=x_T)
    out = torch.zeros(5, *SHAPE)
    assert engine.sample(steps=2, x_T=x_T, out=out) is out
    drawn = engine.sample_async(steps=2, x_T=x_T, output_type="pt").result(timeout=60)
    for samples in (out, drawn):
        np.testing.assert_array_equal(samples.numpy(), expected)


def test_observers_and_inversion_find_the_same_bits(device):
    plan = Plan(schedule=SCHEDULE, steps=4, clip=None, convention="paper")
    engine, reference = build(plans=[plan]), on_the_cpu(plans=[plan])
    ours, path = engine.sample(plan=plan, seeds=[1, 2], trajectory=True)
    theirs, expected = reference.sample(plan=plan, seeds=[1, 2], trajectory=True)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(path.x0, expected.x0)
    found = engine.invert(theirs, plan=plan, refinements=1).latents
    np.testing.assert_array_equal(found, reference.invert(theirs, plan=plan, refinements=1).latents)


def test_half_precision_is_the_networks_alone(device):
    """The state stays float32; the network's copy is converted and the caller's is not."""
    network = Curve()
    engine = build(network, precision="float16")
    denoisers = engine.runner.loop._denoisers
    assert {each.input.dtype for each in denoisers.values()} == {torch.float16}
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    ours, exact = engine.sample(steps=2, seeds=range(4)), on_the_cpu(network).sample(steps=2, seeds=range(4))
    assert 0 < np.abs(ours - exact).max() < 1e-2


def test_nan_is_an_error_that_says_since_when(device):
    class Breaks(torch.nn.Module):
        def forward(self, x, t):
            return torch.where(t.view(-1, 1, 1, 1) > 600, x * torch.nan, x)

    engine = build(Breaks(), plans=[Plan(schedule=SCHEDULE, timesteps=[300, 700][::-1])])
    with pytest.raises(NonFiniteError, match=r"samples \[0, 1\] of 2, since evaluation 1 of 2"):
        engine.sample(steps=2, seeds=[1, 2])


def test_a_loop_that_must_be_captured_is_refused_when_it_is_built(device):
    class Reads(torch.nn.Module):
        def forward(self, x, t):
            return x * float(len(torch.nonzero(t)) > 0)

    with pytest.raises(CaptureError, match="stepwise"):
        build(Reads(), require_captured=True)
    assert [report.loop for report in build(Reads(), batch_sizes=[1]).captures] == ["stepwise"]


@pytest.mark.parametrize("loop", ["step_graph", "stepwise"])
def test_the_caller_may_ask_for_less(device, loop):
    engine = build(loop=loop, batch_sizes=[1])
    assert [report.loop for report in engine.captures] == [loop]
    assert not engine.captures[0].reason


def test_a_network_that_does_not_fit_is_said_when_it_is_built(device):
    device.faults["warm_up"] = (0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(DeviceMemoryError, match="batch"):
        build()


def test_launches_that_were_tuned_are_recorded_anew_and_kept(device, monkeypatch):
    engine = build(batch_sizes=[2])
    before = engine.sample(steps=2, seeds=[1, 2])
    cases = []

    def tune(case, flags, *, device, lock, repeats):
        # One process records one thing at a time, and on the engine's own device.
        assert (device, lock) == (engine.device, CAPTURE_LOCK)
        cases.append(case)
        return TunedLaunch(case, StepLaunch(block_size=128, num_warps=1))

    monkeypatch.setattr("skipstep.kernels.autotune.tune_on_device", tune)
    [tuned] = engine.autotune()
    assert cases == [LaunchCase(30, 2, "float32")]
    assert engine.calibration.launches == (tuned,)
    [(program, _)] = engine.runner.loop._programs.values()
    assert program.workspace._launch == tuned.launch
    np.testing.assert_array_equal(engine.sample(steps=2, seeds=[1, 2]), before)
    with pytest.raises(InputError, match="autotune on cpu"):
        on_the_cpu().autotune()


def test_closing_gives_everything_back(device):
    engine = build()
    engine.sample(steps=2, seeds=[1])
    engine.close()
    gc.collect()
    assert len(device.graphs) == 0
    assert device.released
    with pytest.raises(EngineStateError, match="closed"):
        engine.sample(steps=2, seeds=[1])


def test_what_another_backend_needs_is_said(device):
    with pytest.raises(InputError, match="compile_network"):
        build(backend="onnxruntime", compile_network=True)
    with pytest.raises(InputError, match="loop='onnx'"):
        build(loop="onnx")


@pytest.mark.parametrize("fault", ["a wrong kernel", "samples that mix", "a stage behind"])
def test_a_network_that_the_device_computes_wrongly_is_refused(device, monkeypatch, fault):
    """Each denoiser is compared with the model on the CPU before the engine exists."""
    right = TorchDeviceDenoiser._enqueue

    def wrong(self, values, stage):
        right(self, values, max(0, stage - 1) if fault == "a stage behind" else stage)
        with torch.inference_mode():
            if fault == "a wrong kernel":
                self.output[-1, 0, 0, 0] += 0.01
            elif fault == "samples that mix":
                self.output.copy_(self.output.mean(dim=0, keepdim=True).expand_as(self.output))

    monkeypatch.setattr(TorchDeviceDenoiser, "_enqueue", wrong)
    with pytest.raises(ExportError, match=r"torch computes in float32 at batch size \d, off by .*at most 0.0001"):
        build(batch_sizes=[2, 4])


def test_what_follows_from_time_and_label_is_in_no_graph(device, monkeypatch):
    """The images are the module's, from fewer operations than it has."""
    unet, options = tiny_unet(num_class_embeds=5), {"num_classes": 4, "null_label": 4, "sample_shape": (1, 8, 8)}
    call = {"steps": 2, "seeds": [1, 2, 3, 4], "class_labels": [0, 1, 2, 3], "guidance_scale": 2.0}
    with build(unet, **options) as engine:
        images, [nodes] = (
            engine.sample(**call),
            {r.num_nodes for r in engine.captures if r.guided and r.batch_size == 4},
        )
        assert {report.reason for report in engine.captures} == {""}
    with on_the_cpu(unet, **options) as reference:
        np.testing.assert_allclose(images, reference.sample(**call), rtol=0, atol=BACKENDS_AGREE)

    def refuse(self, batch_size):
        raise NotTraceableError("a test says so")

    monkeypatch.setattr(SplitNetworks, "at", refuse)
    with build(unet, **options) as whole:
        [more] = {r.num_nodes for r in whole.captures if r.guided and r.batch_size == 4}
        assert {report.reason for report in whole.captures} == {"the whole network runs at every stage: a test says so"}
    assert nodes < more


def test_why_a_network_is_no_graph_is_said(device):
    class Branching(Curve):
        def forward(self, x, t):
            return super().forward(x, t) if t[0] > 500 else x

    with build(Branching()) as engine:
        assert len(engine.captures) == 2
        for report in engine.captures:
            assert "runs at every stage: torch.export cannot trace it" in report.reason


def test_the_first_calls_allocate_no_host_memory(device, monkeypatch):
    """Pinning memory takes longer than a short loop; what calls need is there when the engine is."""
    engine = build(Labelled(), num_classes=10, null_label=10)
    staging, taken = device.staging, []
    monkeypatch.setattr(device, "staging", lambda num_bytes: taken.append(num_bytes) or staging(num_bytes))
    for seed in range(6):
        engine.sample(steps=2, seeds=range(4), class_labels=seed, guidance_scale=2.0)
        engine.sample(steps=2, x_T=np.zeros((4, *SHAPE), np.float32), class_labels=1)
    assert taken == []
    # Calls that are enqueued before an earlier copy is done take more, and give it back.
    engine.sample(steps=2, seeds=range(12), class_labels=1)
    several = len(taken)
    engine.sample(steps=2, seeds=range(12), class_labels=1)
    assert len(taken) == several
