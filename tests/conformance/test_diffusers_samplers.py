"""Whole loops against diffusers' other schedulers, each with the setting at which it and the plan mean the same.

DDPMScheduler                 leading spacing with T divisible by S (its stride arithmetic), the same noise
HeunDiscreteScheduler         the plan's timesteps; it walks x/√alpha_bar, and clips as plans of Heun do
DPMSolverMultistepScheduler   the plan's timesteps, dpmsolver++, midpoint, final sigma 0, first order at both ends
UniPCMultistepScheduler       trailing spacing, bh2 on x0, lower_order_final, final sigma 0: all as it comes
DEISMultistepScheduler        trailing spacing; it ends at the level of timestep 0, as the plan does here, so neither
                              lowers its order there; its sigmas in float64
LMSDiscreteScheduler          trailing spacing; its last step is asked for at order 1, with which plans end
IPNDMScheduler                the plan's levels in place of its own; its past is dropped before the last step
DDIMInverseScheduler          leading spacing, no clipping, epsilon prediction; it evaluates at the target
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import build
from tiny_networks import Curve, LearnedVariance
from tolerances import DIFFUSERS_DDPM_LOOP, DIFFUSERS_LOOP, DIFFUSERS_SIGMA_LOOP

from skipstep import Engine, NoiseSchedule, Plan
from skipstep.calls.noise import standard_normal
from skipstep.kernels.layout import Stream

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 8, 8)
SEEDS = [11, 12]


def engine_for(network: torch.nn.Module, plan: Plan) -> Engine:
    return build(network, plans=[plan], batch_sizes=[2], sample_shape=SHAPE)


def schedule_of(scheduler) -> NoiseSchedule:
    return NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy())


def initial(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def assert_same_loop(scheduler, plan: Plan) -> None:
    """Both from the same x_T, over the same timesteps, with the same network."""
    assert scheduler.timesteps.tolist() == list(plan.timesteps)
    x = x_T = initial()
    curve = Curve()
    for t in scheduler.timesteps:
        x = scheduler.step(curve(x, t.expand(2)), t, x).prev_sample
    ours = engine_for(curve, plan).sample(plan=plan, x_T=x_T, output_type="pt")
    assert distance(ours, x) < DIFFUSERS_SIGMA_LOOP


@pytest.mark.parametrize("steps", [10, 50, 250])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm(variance, clip, steps, monkeypatch):
    scheduler = diffusers.DDPMScheduler(timestep_spacing="leading", variance_type=variance, clip_sample=clip)
    scheduler.set_timesteps(steps)
    network = LearnedVariance() if variance == "learned_range" else Curve()
    x = x_T = initial()
    for stage, t in enumerate(scheduler.timesteps):
        z = standard_normal(np.array(SEEDS, np.uint64), x[0].numel(), stage=stage, stream=Stream.STEP)
        monkeypatch.setattr(
            diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, z=z, **__: torch.from_numpy(z).view_as(x_T)
        )
        x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    plan = Plan(
        schedule=schedule_of(scheduler),
        steps=steps,
        spacing="leading",
        solver="ddpm",
        variance=variance,
        clip=1.0 if clip else None,
    )
    ours = engine_for(network, plan).sample(plan=plan, x_T=x_T, seeds=SEEDS, output_type="pt")
    assert distance(ours, x) < DIFFUSERS_DDPM_LOOP


@pytest.mark.parametrize("steps", [5, 20, 100])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_heun(prediction_type, clip, steps):
    options = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type=prediction_type, clip_sample=clip, **options)
    plan = Plan(
        schedule=schedule_of(scheduler),
        steps=steps,
        solver="heun",
        prediction_type=prediction_type,
        clip=1.0 if clip else None,
    )
    scheduler.set_timesteps(timesteps=list(plan.timesteps))
    assert scheduler.timesteps.tolist() == plan.evaluation_timesteps.tolist()
    x_T, curve = initial(), Curve()
    x = x_T / np.sqrt(plan.alpha_bars[0])
    for t in scheduler.timesteps:
        output = curve(scheduler.scale_model_input(x, t).float(), t.expand(2))
        x = scheduler.step(output, t, x).prev_sample
    ours = engine_for(curve, plan).sample(plan=plan, x_T=x_T, output_type="pt")
    assert distance(ours, x) < DIFFUSERS_SIGMA_LOOP


@pytest.mark.parametrize("steps", [2, 5, 20, 100])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_multistep(order, prediction_type, steps):
    options = {"algorithm_type": "dpmsolver++", "solver_order": order, "solver_type": "midpoint"}
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type=prediction_type, **options)
    plan = Plan(
        schedule=schedule_of(scheduler),
        steps=steps,
        solver=f"dpm_solver_pp_{order}m",
        prediction_type=prediction_type,
        clip=None,
    )
    scheduler.set_timesteps(timesteps=list(plan.timesteps))
    assert_same_loop(scheduler, plan)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20, 100])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc(order, prediction_type, steps):
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type=prediction_type, solver_order=order, timestep_spacing="trailing"
    )
    solver = f"unipc_{order}"
    plan = Plan(schedule=schedule_of(scheduler), steps=steps, solver=solver, prediction_type=prediction_type, clip=None)
    scheduler.set_timesteps(steps)
    assert_same_loop(scheduler, plan)


@pytest.mark.parametrize("steps", [2, 5, 20, 100])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("order", [2, 3])
def test_deis(order, prediction_type, steps):
    scheduler = diffusers.DEISMultistepScheduler(
        prediction_type=prediction_type, solver_order=order, timestep_spacing="trailing", lower_order_final=False
    )
    schedule = schedule_of(scheduler)
    plan = Plan(
        schedule=schedule,
        steps=steps,
        solver=f"deis_{order}",
        prediction_type=prediction_type,
        clip=None,
        final_alpha_bar=float(schedule.alpha_bar[0]),
    )
    scheduler.set_timesteps(steps)
    # At 100 steps its integrals cancel in float32, so that its loop is off by up to 2e-3.
    scheduler.sigmas = torch.from_numpy(np.sqrt((1.0 - plan.alpha_bars) / plan.alpha_bars))
    assert_same_loop(scheduler, plan)


@pytest.mark.parametrize("steps", [2, 5, 20, 100])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_lms(prediction_type, steps):
    scheduler = diffusers.LMSDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, prediction_type=prediction_type, timestep_spacing="trailing"
    )
    plan = Plan(schedule=schedule_of(scheduler), steps=steps, solver="lms", prediction_type=prediction_type, clip=None)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == list(plan.timesteps)
    x_T, curve = initial(), Curve()
    x = x_T / np.sqrt(plan.alpha_bars[0])
    for stage, t in enumerate(scheduler.timesteps):
        output = curve(scheduler.scale_model_input(x, t).float(), t.expand(2))
        x = scheduler.step(output, t, x, order=4 if stage < steps - 1 else 1).prev_sample
    ours = engine_for(curve, plan).sample(plan=plan, x_T=x_T, output_type="pt")
    assert distance(ours, x) < DIFFUSERS_SIGMA_LOOP


@pytest.mark.parametrize("steps", [2, 5, 20, 100])
def test_ipndm(steps):
    """The scheduler takes v and has levels of its own, which trained_betas replaces: they are √(1 - alpha_bar).

    In float32 they do not say the noisiest levels, so the plan begins below.
    """
    timesteps = np.linspace(499, 20, steps).round().astype(int).tolist()
    options = {"solver": "ipndm", "prediction_type": "v_prediction", "clip": None}
    plan = Plan(schedule=NoiseSchedule.linear(1000), timesteps=timesteps, **options)
    scheduler = diffusers.IPNDMScheduler(trained_betas=np.sqrt(1.0 - plan.alpha_bars).tolist())
    scheduler.set_timesteps(steps)
    x = x_T = initial()
    curve = Curve()
    for stage, (t, own) in enumerate(zip(plan.timesteps, scheduler.timesteps, strict=True)):
        if stage == steps - 1:
            scheduler.ets = []
        x = scheduler.step(curve(x, torch.full((2,), t)), own, x).prev_sample
    ours = engine_for(curve, plan).sample(plan=plan, x_T=x_T, output_type="pt")
    assert distance(ours, x) < DIFFUSERS_SIGMA_LOOP


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_inversion(steps):
    scheduler = diffusers.DDIMInverseScheduler(timestep_spacing="leading", clip_sample=False)
    scheduler.set_timesteps(steps)
    plan = Plan(schedule=schedule_of(scheduler), steps=steps, spacing="leading", clip=None)
    assert plan.inverted().evaluation_timesteps.tolist() == scheduler.timesteps.tolist()
    x = images = initial() * 0.5
    curve = Curve()
    for t in scheduler.timesteps:
        x = scheduler.step(curve(x, t.expand(2)), t, x).prev_sample
    ours = engine_for(curve, plan).invert(images.numpy(), plan=plan).latents
    assert distance(torch.from_numpy(ours), x) < DIFFUSERS_LOOP
