"""The engine on a real GPU: its loops against each other bit for bit, and against the loop in host memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_networks import Curve, Labelled, tiny_unet
from tolerances import BACKENDS_AGREE, BATCH_INVARIANCE, HALF_PRECISION_LOOP
from torch import Tensor, nn

from skipstep import Engine, NoiseSchedule, Plan
from skipstep.errors import CaptureError, EngineStateError, NonFiniteError
from skipstep.serving import Batcher

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SCHEDULE = NoiseSchedule.linear(1000)
LOOPS = ("captured", "step_graph", "stepwise")
SHAPE = (1, 7, 9)
PLANS = {
    "ddim": Plan(schedule=SCHEDULE, steps=7),
    "eta": Plan(schedule=SCHEDULE, steps=7, eta=1.0, convention="guided"),
    "heun": Plan(schedule=SCHEDULE, steps=4, solver="heun"),
    "dpm_solver_pp_2m": Plan(schedule=SCHEDULE, steps=6, solver="dpm_solver_pp_2m"),
    "dynamic": Plan(schedule=SCHEDULE, steps=5, clip="dynamic", dynamic_quantile=0.7),
}


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Iterator[None]:
    """float32 that is not TF32, and the same algorithm of a convolution every time."""
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
    ) = before


def build(network: nn.Module, **options) -> Engine:
    defaults = {"plans": [5], "batch_sizes": [1, 4], "schedule": SCHEDULE, "sample_shape": SHAPE, "device": DEVICE}
    return Engine.build(network, **{**defaults, **options})


def labelled_unet() -> nn.Module:
    return tiny_unet(num_class_embeds=11)


UNET = {"sample_shape": (1, 8, 8), "num_classes": 10, "null_label": 10}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("guidance_scale", [None, 2.5])
def test_both_devices_draw_the_same_bits(name, loop, guidance_scale):
    """The network is additions and products alone, so every difference would be the loop's."""
    options = {"plans": [PLANS[name]], "num_classes": 10, "null_label": 10}
    request = {"plan": PLANS[name], "seeds": [3, 2**64 - 1, 0, 7, 8], "class_labels": [1, 2, 3, 4, 5]}
    with build(Labelled(), loop=loop, require_captured=True, **options) as on_gpu:
        ours = on_gpu.sample(**request, guidance_scale=guidance_scale)
        assert {report.loop for report in on_gpu.captures} == {loop}
    with build(Labelled(), device="cpu", backend="torch", **options) as on_cpu:
        np.testing.assert_array_equal(ours, on_cpu.sample(**request, guidance_scale=guidance_scale))


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["ddim", "eta", "heun"])
@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_all_loops_draw_the_same_bits(name, precision, guidance_scale):
    """A real network, in every dtype: the same kernels on the same memory, however they are launched."""
    request = {"plan": PLANS[name], "seeds": range(6), "class_labels": [0, 1, 2, 3, 4, 5]}
    drawn = []
    for loop in LOOPS:
        with build(labelled_unet(), loop=loop, plans=[PLANS[name]], precision=precision, **UNET) as engine:
            drawn.append(engine.sample(**request, guidance_scale=guidance_scale))
            # Replayed, with nothing left over from the call before.
            engine.sample(plan=PLANS[name], seeds=[99] * 4, class_labels=9, guidance_scale=guidance_scale)
            drawn.append(engine.sample(**request, guidance_scale=guidance_scale))
    assert np.isfinite(drawn[0]).all()
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])


def test_a_smooth_network_agrees_with_the_cpu():
    with build(Curve()) as on_gpu, build(Curve(), device="cpu", backend="torch") as on_cpu:
        ours, theirs = (engine.sample(steps=5, seeds=range(6)) for engine in (on_gpu, on_cpu))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=BACKENDS_AGREE)


@pytest.mark.parametrize("precision", HALF_PRECISION_LOOP)
def test_half_precision_is_close(precision):
    request = {"steps": 5, "seeds": range(4), "class_labels": [1, 2, 3, 4]}
    with build(labelled_unet(), **UNET) as full, build(labelled_unet(), precision=precision, **UNET) as half:
        expected, ours = full.sample(**request), half.sample(**request)
    assert np.abs(ours - expected).max() <= HALF_PRECISION_LOOP[precision] * np.abs(expected).max()


def test_a_sample_does_not_depend_on_its_batch():
    """Bit for bit where the network is elementwise; else as far as convolutions of another batch size agree."""
    for network, options, tolerance in ((Curve(), {}, 0.0), (labelled_unet(), UNET, BATCH_INVARIANCE)):
        labels = {"class_labels": 3} if options else {}
        with build(network, **options) as engine:
            together = engine.sample(steps=5, seeds=[10, 11, 12, 13], **labels)
            for place, seed in enumerate([10, 11, 12, 13]):
                alone = engine.sample(steps=5, seeds=[seed], **labels)
                np.testing.assert_allclose(alone[0], together[place], rtol=0, atol=tolerance)


def test_samples_that_share_evaluations_are_as_they_are_alone():
    """Each at its own stage of its own plan, with noise and without, guided or not."""
    plans, scales = [PLANS[name] for name in ("eta", "heun", "dpm_solver_pp_2m", "dynamic")], (None, 2.0, None)
    for network, options, tolerance in ((Curve(), {}, 0.0), (labelled_unet(), UNET, BATCH_INVARIANCE)):
        requests = [{"plan": plans[n % 4], "seeds": n} for n in range(12)]
        if options:
            requests = [
                {**each, "class_labels": n % 10, "guidance_scale": scales[n % 3]} for n, each in enumerate(requests)
            ]
        with build(network, plans=plans, **options) as engine, Batcher(engine) as batcher:
            futures = [batcher.submit(**request) for request in requests]
            for request, future in zip(requests, futures, strict=True):
                np.testing.assert_allclose(future.result(60.0), engine.sample(**request), rtol=0, atol=tolerance)


def test_one_graph_serves_every_plan_of_its_structure():
    plans = [Plan(schedule=SCHEDULE, steps=4, spacing=spacing) for spacing in ("leading", "trailing")]
    with build(Curve(), plans=plans, batch_sizes=[2]) as engine, build(Curve(), device="cpu", plans=plans) as on_cpu:
        for plan in plans:
            ours, theirs = (each.sample(plan=plan, seeds=[1, 2]) for each in (engine, on_cpu))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=BACKENDS_AGREE)
        [report] = engine.captures
    assert (report.loop, report.num_stages, report.batch_size) == ("captured", 4, 2)
    # Network and step at every stage, and the beginning; None where the driver does not count.
    assert report.num_nodes is None or report.num_nodes > 2 * 4


def test_latents_and_results_may_stay_on_the_device():
    with build(Curve()) as engine:
        x_T = torch.randn(4, *SHAPE, device=DEVICE)
        kept = x_T.clone()
        drawn = engine.sample(steps=5, x_T=x_T, output_type="pt")
        assert drawn.device.type == DEVICE
        assert torch.equal(x_T, kept)
        np.testing.assert_array_equal(drawn.cpu().numpy(), engine.sample(steps=5, x_T=kept.cpu().numpy()))
        out = torch.full_like(drawn, float("nan"))
        assert engine.sample(steps=5, x_T=x_T, output_type="pt", out=out) is out
        assert torch.equal(out, drawn)


def test_channels_last_changes_the_layout_and_no_sample():
    """Of the module's weights and of x_T: the engine lays out what it computes with as it likes."""
    x_T = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    drawn = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network = tiny_unet(in_channels=2, out_channels=2).to(memory_format=layout)
        with build(network, sample_shape=(2, 8, 8), precision="float16") as engine:
            given = x_T.to(memory_format=layout)
            drawn.append(engine.sample(steps=5, x_T=given, output_type="pt"))
    assert torch.equal(*drawn)


class Poisoned(nn.Module):
    """Predicts NaN for one label from one timestep on."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        spoilt = (labels == 7) & (t < 500)
        return torch.where(spoilt.view(-1, 1, 1, 1), torch.full_like(x, float("nan")), 0.1 * x)


@pytest.mark.parametrize("loop", LOOPS)
def test_nan_inside_a_loop_is_an_error_and_spoils_no_later_call(loop):
    with build(Poisoned(), loop=loop, num_classes=10) as engine:
        sound = engine.sample(steps=5, seeds=range(4), class_labels=1)
        with pytest.raises(NonFiniteError, match=r"\[2\]"):
            engine.sample(steps=5, seeds=range(4), class_labels=[1, 2, 7, 3])
        np.testing.assert_array_equal(engine.sample(steps=5, seeds=range(4), class_labels=1), sound)


@pytest.mark.parametrize("loop", ["captured", "step_graph"])
def test_threads_do_not_mix_their_results(loop):
    """Eight threads, two hundred calls each, of one and of several samples, on streams of their own."""
    with build(Curve(), loop=loop) as engine:
        expected = engine.sample(steps=5, seeds=range(40))
        wrong: list[tuple[int, int]] = []

        def calls(thread: int) -> None:
            with stream_of_its_own():
                for call in range(200):
                    seed, count = (thread * 7 + call) % 36, 1 + 3 * (call % 2)
                    drawn = engine.sample(steps=5, seeds=range(seed, seed + count), output_type="pt")
                    if not np.array_equal(drawn.cpu().numpy(), expected[seed : seed + count]):
                        wrong.append((thread, call))

        threads = [threading.Thread(target=calls, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def stream_of_its_own() -> contextlib.AbstractContextManager[object]:
    return torch.cuda.stream(torch.cuda.Stream())


def test_calls_come_in_the_order_of_the_callers_stream():
    """x_T is written late on a stream of the caller's, and overwritten right after the call."""
    with build(Curve()) as engine, stream_of_its_own():
        noise = torch.randn(4, *SHAPE, device=DEVICE)
        expected = engine.sample(steps=5, x_T=noise.cpu().numpy())
        busy = torch.randn(2048, 2048, device=DEVICE)
        for _ in range(10):
            x_T, out = torch.zeros_like(noise), torch.full_like(noise, float("nan"))
            for _ in range(20):
                busy = busy @ busy
                busy /= busy.norm()
            x_T.copy_(noise)
            future = engine.sample_async(steps=5, x_T=x_T, output_type="pt", out=out)
            future.result()
            x_T.fill_(-7.0)
            np.testing.assert_array_equal(out.cpu().numpy(), expected)


def test_nothing_between_two_steps_waits_for_the_device():
    """torch raises on a call that waits; the one wait, for the result, is an event's."""
    with build(Curve()) as engine:
        out = torch.empty(1, *SHAPE, device=DEVICE)
        engine.sample(steps=5, seeds=[0], output_type="pt", out=out)
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.sample(steps=5, seeds=[1], output_type="pt", out=out)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class ReadsTheDevice(nn.Module):
    """Branches on what only the device knows: no graph can hold that."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x if len(torch.nonzero(t > 500)) else 0.2 * x


def test_what_cannot_be_captured_runs_stepwise_and_says_why():
    with build(ReadsTheDevice(), batch_sizes=[2]) as engine:
        [report] = engine.captures
        assert report.loop == "stepwise"
        assert report.reason
        with build(ReadsTheDevice(), device="cpu", backend="torch") as on_cpu:
            ours, theirs = (each.sample(steps=5, seeds=[1, 2]) for each in (engine, on_cpu))
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(CaptureError, match="stepwise"):
        build(ReadsTheDevice(), require_captured=True)


def test_a_closed_engine_gives_its_memory_back():
    engine = build(labelled_unet(), **UNET)
    engine.sample(steps=5, seeds=[0], class_labels=1)
    engine.close()
    with pytest.raises(EngineStateError):
        engine.sample(steps=5, seeds=[0], class_labels=1)
