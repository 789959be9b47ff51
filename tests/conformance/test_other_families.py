"""Whole loops of networks that are not DDPM's, against the schedulers of diffusers that they are sampled with.

EDMEulerScheduler                  the state scaled by 1/√(sigma²+d²), c_noise as time, Karras levels
EulerDiscreteScheduler             a DDPM network on x/√alpha_bar; a network of sigma on the plain VE state
FlowMatchEulerDiscreteScheduler    the state (1-s)·x0 + s·eps, 1000·s as time, shifted or not
FlowMatchHeunDiscreteScheduler     the same by Heun's rule
LCMScheduler                       a consistency model's boundary condition and fresh noise, the same in both loops
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import build
from tiny_networks import Curve
from tolerances import DIFFUSERS_SIGMA_LOOP

from skipstep import NoiseSchedule, Plan, load
from skipstep.calls.noise import standard_normal
from skipstep.errors import InputError, PlanError
from skipstep.kernels.layout import Stream

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 8, 8)
SEEDS = [11, 12]


def initial() -> torch.Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def walked(scheduler, network, x):
    """diffusers' own loop, in float64."""
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(scaled.float(), t.float().expand(len(x))).double()
        x = scheduler.step(output, t, x).prev_sample
    return x


def assert_drawn(x, plan, x_T, **options):
    with build(Curve(), plans=[plan], batch_sizes=[2], sample_shape=SHAPE, **options) as engine:
        ours = engine.sample(plan=plan, x_T=x_T.float(), seeds=SEEDS, output_type="pt")
    assert float((ours - x).norm() / x.norm()) < DIFFUSERS_SIGMA_LOOP


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_edm(steps, backend):
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7, num_train_timesteps=steps)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.karras(steps)
    plan = Plan(schedule=schedule, steps=steps, prediction_type="edm", time_input="c_noise", sigma_data=0.7, clip=None)
    np.testing.assert_allclose(plan.evaluation_timesteps, scheduler.timesteps, rtol=1e-5)
    x_T = initial()
    x = walked(scheduler, Curve(), x_T / np.sqrt(plan.alpha_bars[0]))
    assert_drawn(x, plan, x_T, time_input="c_noise", state="edm", sigma_data=0.7, backend=backend)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler(prediction_type, spacing):
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction_type, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy())
    plan = Plan(schedule=schedule, steps=10, spacing=spacing, prediction_type=prediction_type, clip=None)
    assert scheduler.timesteps.tolist() == list(plan.timesteps)
    x_T = initial()
    assert_drawn(walked(scheduler, Curve(), x_T / np.sqrt(plan.alpha_bars[0])), plan, x_T)


@pytest.mark.parametrize(("time_input", "state"), [("sigma", "ve"), ("log_snr", "ve"), ("alpha_bar", "edm")])
def test_a_network_of_the_noise_level_on_a_state_that_is_not_made_smaller(time_input, state):
    """Euler's rule in sigma, written out; the network predicts the image."""
    sigmas = np.array([20.0, 5.0, 1.0, 0.2])
    plan = Plan(
        schedule=NoiseSchedule.from_sigmas(sigmas), steps=4, prediction_type="sample", time_input=time_input, clip=None
    )
    x_T, curve = initial(), Curve()
    x = x_T / np.sqrt(plan.alpha_bars[0])
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        level = 1 / (1 + sigma**2)
        time = {"sigma": sigma, "log_snr": -2 * np.log(sigma), "alpha_bar": level}[time_input]
        read = x if state == "ve" else x / np.sqrt(sigma**2 + 0.25)
        x0 = curve(read.float(), torch.full((2,), time)).double()
        x = x + (following - sigma) * (x - x0) / sigma
    assert_drawn(x, plan, x_T, time_input=time_input, state=state)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("solver", ["ddim", "flow_heun"])
def test_flow_matching(solver, steps, shift):
    kind = {"ddim": "FlowMatchEulerDiscreteScheduler", "flow_heun": "FlowMatchHeunDiscreteScheduler"}[solver]
    scheduler = getattr(diffusers, kind)(shift=shift)
    scheduler.set_timesteps(steps)
    s = np.unique(scheduler.sigmas[:-1].double().numpy())
    schedule = NoiseSchedule.from_alphas_cumprod((1 - s) ** 2 / ((1 - s) ** 2 + s**2))
    plan = Plan(schedule=schedule, steps=steps, solver=solver, prediction_type="flow", time_input="flow", clip=None)
    np.testing.assert_allclose(plan.evaluation_timesteps, scheduler.timesteps, rtol=1e-5)
    x_T = initial()
    assert_drawn(walked(scheduler, Curve(), x_T), plan, x_T, time_input="flow", state="flow")


def test_the_flow_schedule_is_that_of_all_its_timesteps():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    plan = Plan(schedule=NoiseSchedule.flow(shift=3.0), steps=1000, prediction_type="flow", time_input="flow")
    np.testing.assert_allclose(plan.evaluation_timesteps, scheduler.timesteps, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_latent_consistency(steps, monkeypatch):
    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(steps)
    x = x_T = initial()
    curve = Curve()
    for stage, t in enumerate(scheduler.timesteps):
        z = standard_normal(np.array(SEEDS, np.uint64), x[0].numel(), stage=stage, stream=Stream.STEP)
        monkeypatch.setattr(
            diffusers.schedulers.scheduling_lcm, "randn_tensor", lambda *_, z=z, **__: torch.from_numpy(z).view_as(x_T)
        )
        x = scheduler.step(curve(x.float(), t.expand(2)), t, x).prev_sample
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy())
    # It ends at the level of timestep 0, or at no noise; both are the image itself.
    plan = Plan(schedule=schedule, steps=steps, solver="lcm", spacing="lcm", clip=None)
    assert scheduler.timesteps.tolist() == list(plan.timesteps)
    assert_drawn(x, plan, x_T)


def test_a_bundle_keeps_what_its_network_reads(tmp_path):
    plan = Plan(schedule=NoiseSchedule.karras(3), steps=3, prediction_type="edm", time_input="c_noise", clip=None)
    options = {"time_input": "c_noise", "state": "edm", "backend": "onnxruntime"}
    with build(Curve(), plans=[plan], sample_shape=SHAPE, **options) as engine:
        drawn = engine.sample(plan=plan, seeds=SEEDS)
        engine.save(tmp_path / "bundle", license="MIT")
    with load(tmp_path / "bundle") as engine:
        assert (engine.network.state, engine.network.time_input, engine.network.sigma_data) == ("edm", "c_noise", 0.5)
        np.testing.assert_array_equal(engine.sample(plan=plan, seeds=SEEDS), drawn)


@pytest.mark.parametrize(
    ("error", "options", "said"),
    [
        (InputError, {"state": "ve"}, "pass time_input='sigma'"),
        (InputError, {"state": "latent", "time_input": "sigma"}, "one of vp, ve"),
        (InputError, {"time_input": "sigma", "sigma_data": 1.0}, "leave sigma_data out"),
        (InputError, {"time_input": "sigma", "state": "edm", "sigma_data": -1.0}, "sigma_data"),
        (InputError, {"time_input": "sigmas"}, "one of timestep, sigma"),
        (PlanError, {"plans": [Plan(schedule=NoiseSchedule.karras(4), steps=2)], "time_input": "sigma"}, "time_input="),
    ],
)
def test_what_contradicts_itself_is_refused(error, options, said):
    with pytest.raises(error, match=said):
        build(Curve(), **{"plans": [2], "sample_shape": SHAPE, **options})
