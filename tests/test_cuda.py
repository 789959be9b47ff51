"""The engine on a real GPU: the loop that the Triton kernel drives, against the loop in host memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Curve, Labelled
from tolerances import BACKENDS_AGREE

from skipstep import Engine, NoiseSchedule, Plan

pytestmark = pytest.mark.gpu
SCHEDULE = NoiseSchedule.linear(1000)


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def pair(network, **options) -> tuple[Engine, Engine]:
    """The same network on the GPU and on the CPU."""
    defaults = {"plans": [5], "batch_sizes": [1, 4], "schedule": SCHEDULE, "sample_shape": (1, 7, 9), **options}
    on_gpu = Engine.build(network.to("cuda"), device="cuda", **defaults)
    on_cpu = Engine.build(type(network)(), device="cpu", backend="torch", **defaults)
    return on_gpu, on_cpu


@pytest.mark.parametrize("convention", ["paper", "diffusers", "guided"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance_scale", [None, 2.5])
def test_both_devices_draw_the_same_bits(convention, eta, guidance_scale):
    """The network is additions and products alone, so every difference would be the loop's."""
    plan = Plan(schedule=SCHEDULE, steps=7, eta=eta, convention=convention)
    on_gpu, on_cpu = pair(Labelled(), plans=[plan], num_classes=10, null_label=10)
    request = {"plan": plan, "seeds": [3, 2**64 - 1, 0, 7, 8], "class_labels": [1, 2, 3, 4, 5]}
    ours = on_gpu.sample(**request, guidance_scale=guidance_scale)
    np.testing.assert_array_equal(ours, on_cpu.sample(**request, guidance_scale=guidance_scale))


def test_a_smooth_network_agrees():
    on_gpu, on_cpu = pair(Curve())
    ours = on_gpu.sample(steps=5, seeds=range(6))
    np.testing.assert_allclose(ours, on_cpu.sample(steps=5, seeds=range(6)), rtol=0, atol=BACKENDS_AGREE)


def test_latents_and_results_may_stay_on_the_device():
    on_gpu, _ = pair(Curve())
    x_T = torch.randn(4, 1, 7, 9, device="cuda")
    kept = x_T.clone()
    drawn = on_gpu.sample(steps=5, x_T=x_T, output_type="pt")
    assert drawn.device.type == "cuda"
    assert torch.equal(x_T, kept)
    np.testing.assert_array_equal(drawn.cpu().numpy(), on_gpu.sample(steps=5, x_T=kept.cpu().numpy()))


def test_nothing_in_the_loop_waits_for_the_device():
    """From the first network evaluation to the last step: torch raises on any call that waits."""
    on_gpu, _ = pair(Curve())
    on_gpu.sample(steps=5, seeds=[0])
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        torch.cuda.set_sync_debug_mode("error" if done < total else "default")

    try:
        on_gpu.sample(steps=5, seeds=[0], progress=progress)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [1, 2, 3, 4, 5]
