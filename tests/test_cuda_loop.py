"""The loop that drives the Triton kernels, walked without a GPU: kernels in the interpreter, tensors in host memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Labelled, LearnedVariance
from tolerances import FLOAT32_LOOP

from skipstep import NoiseSchedule, Plan
from skipstep.backends.torch import TorchDenoiser, prepare_module
from skipstep.cuda_loop import CudaRun
from skipstep.loop import HostLoop, run_loop
from skipstep.network import NetworkSpec
from skipstep.request import resolve_request
from skipstep.stages import Stages

SCHEDULE = NoiseSchedule.linear(1000)
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


class DeviceDenoiser:
    """A torch denoiser with the buffers that it has on a GPU: tensors, where on a CPU it shows NumPy arrays."""

    def __init__(self, denoiser: TorchDenoiser) -> None:
        self._denoiser = denoiser
        self.batch_size = denoiser.batch_size
        self.input, self.output = torch.from_numpy(denoiser.input), torch.from_numpy(denoiser.output)
        self.prepare, self.enqueue = denoiser.prepare, denoiser.enqueue


def pair(network: torch.nn.Module, spec: NetworkSpec, batch_size: int):
    module, spec = prepare_module(network, spec, device=CPU, dtype=torch.float32)

    def denoiser() -> TorchDenoiser:
        return TorchDenoiser(module, spec, batch_size=batch_size, device=CPU, dtype=torch.float32)

    return DeviceDenoiser(denoiser()), HostLoop(denoiser(), spec), spec


def walk(device_denoiser, spec, stages, request):
    run = CudaRun(device_denoiser, spec, CPU, stages, request, keep_x0=True)
    for stage in range(len(stages)):
        run.advance(stage)
    return run


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.5}, {"guidance_scale": 2.5, "guidance_rescale": 0.7}])
def test_has_the_bits_of_the_loop_in_host_memory(name, guidance, kernel_device):
    if kernel_device != "cpu":
        pytest.skip("on a GPU tests/test_cuda.py runs the loop itself")
    stages = Stages.of([PLANS[name]])
    device_denoiser, host, spec = pair(
        Labelled(), NetworkSpec((1, 5, 7), num_classes=10, null_label=10), batch_size=6 if guidance else 3
    )
    request = resolve_request(
        spec,
        seeds=[3, 2**64 - 1, 0],
        x_T=None,
        class_labels=[1, 5, 9],
        adds_noise=stages.adds_noise,
        **{"guidance_scale": None, **guidance},
    )
    x0: list[np.ndarray] = []
    expected = run_loop(host, stages, request, observer=lambda stage, run: x0.append(run.x0()), keep_x0=True)
    run = walk(device_denoiser, spec, stages, request)
    # Two ways to sum a standard deviation differ in the last bits.
    atol = FLOAT32_LOOP if "guidance_rescale" in guidance else 0
    np.testing.assert_allclose(run.state(), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(run.x0(), x0[-1], rtol=0, atol=atol)


def test_plans_per_sample_latents_and_a_learned_variance(kernel_device):
    if kernel_device != "cpu":
        pytest.skip("on a GPU tests/test_cuda.py runs the loop itself")
    device_denoiser, host, spec = pair(LearnedVariance(), NetworkSpec((1, 5, 7)), batch_size=3)
    plans = [
        Plan(schedule=SCHEDULE, steps=4, solver="ddpm", variance="learned_range", spacing=spacing)
        for spacing in ("trailing", "leading", "quadratic")
    ]
    stages = Stages.of(plans)
    x_T = np.random.default_rng(0).standard_normal((3, 1, 5, 7)).astype(np.float32)
    request = resolve_request(
        spec, seeds=[1, 2, 3], x_T=x_T, class_labels=None, guidance_scale=None, adds_noise=True, num_plans=3
    )
    run = walk(device_denoiser, spec, stages, request)
    np.testing.assert_allclose(run.state(), run_loop(host, stages, request), rtol=0, atol=FLOAT32_LOOP)
    again = np.full_like(x_T, 0.25)
    run.set_state(again)
    np.testing.assert_array_equal(run.state(), again)
    np.testing.assert_array_equal(device_denoiser.input.numpy(), again)
