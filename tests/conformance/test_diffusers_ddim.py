"""Whole loops and single steps against diffusers' DDIMScheduler, where its own arithmetic is right.

With `leading` spacing its stride arithmetic finds the right previous timestep, so whole loops are compared; with the
other spacings it does not, so single steps are, at the pairs that its arithmetic visits. It is fed to our plans with
its own float32 alpha_bar, so that the difference is the sampler's and not the schedule's.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from engines import build
from tiny_networks import Curve
from tolerances import DIFFUSERS_LOOP, DIFFUSERS_STEP, DIFFUSERS_STEP_SAMPLE

from skipstep import NoiseSchedule, Plan
from skipstep.kernels.layout import Column

diffusers = pytest.importorskip("diffusers")

CONVENTIONS = {
    "diffusers": {"clip_sample": True},
    "guided": {"clip_sample": True},
    "paper": {"clip_sample": False},
}


class FixedOutput(torch.nn.Module):
    output: torch.Tensor = torch.zeros(1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.output.expand_as(x)


def scheduler_for(convention: str, prediction_type: str, spacing: str = "leading"):
    return diffusers.DDIMScheduler(
        prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=True, **CONVENTIONS[convention]
    )


@pytest.mark.parametrize("steps", [10, 50, 250, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 100))])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_whole_loops(prediction_type, convention, steps):
    scheduler = scheduler_for(convention, prediction_type)
    scheduler.set_timesteps(steps)
    x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(steps))
    x, curve = x_T, Curve()
    for t in scheduler.timesteps:
        output = curve(x, t.expand(2))
        x = scheduler.step(output, t, x, use_clipped_model_output=convention == "guided").prev_sample
    plan = Plan(
        schedule=NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy()),
        steps=steps,
        spacing="leading",
        prediction_type=prediction_type,
        convention=convention,
    )
    ours = build(Curve(), plans=[plan], sample_shape=(3, 8, 8)).sample(plan=plan, x_T=x_T, output_type="pt")
    assert (ours - x).norm() / x.norm() < DIFFUSERS_LOOP


def test_the_conventions_are_not_the_same_thing():
    x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = NoiseSchedule.linear()
    plans = {c: Plan(schedule=schedule, steps=20, convention=c) for c in CONVENTIONS}
    engine = build(Curve(), plans=list(plans.values()), sample_shape=(3, 8, 8))
    results = {c: engine.sample(plan=plan, x_T=x_T) for c, plan in plans.items()}
    for one, other in itertools.combinations(results.values(), 2):
        assert np.linalg.norm(one - other) > 0.05 * np.linalg.norm(one)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_single_steps(prediction_type, convention, spacing):
    """One step from t to the timestep that diffusers' stride arithmetic pairs it with, for every t of the grid."""
    steps = 25
    scheduler = scheduler_for(convention, prediction_type, spacing)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy())
    generator = torch.Generator().manual_seed(1)
    tolerance = DIFFUSERS_STEP_SAMPLE if prediction_type == "sample" else DIFFUSERS_STEP
    plans = {}
    for t in scheduler.timesteps.tolist():
        s = t - 1000 // steps
        plans[t] = Plan(
            schedule=schedule,
            timesteps=[t],
            prediction_type=prediction_type,
            convention=convention,
            final_alpha_bar=float(schedule.alpha_bar[s]) if s >= 0 else 1.0,
        )
    network = FixedOutput()
    engine = build(network, plans=list(plans.values()), batch_sizes=[1], sample_shape=(3, 8, 8))
    for t, plan in plans.items():
        x = torch.randn(1, 3, 8, 8, generator=generator)
        network.output = torch.randn(1, 3, 8, 8, generator=generator)
        theirs = scheduler.step(network.output, t, x, use_clipped_model_output=convention == "guided").prev_sample
        ours = engine.sample(plan=plan, x_T=x, output_type="pt")
        assert (ours - theirs).norm() / theirs.norm() < tolerance, t


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_sigma_is_the_variance_that_diffusers_adds(eta):
    scheduler = scheduler_for("paper", "epsilon")
    scheduler.set_timesteps(50)
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy())
    plan = Plan(schedule=schedule, steps=50, spacing="leading", eta=eta)
    x = torch.zeros(1, 1, 1, 1)
    z = torch.ones(1, 1, 1, 1)
    for stage, (t, s) in enumerate(plan.pairs):
        if s is None:
            continue
        theirs = scheduler.step(x, t, x, eta=eta, variance_noise=z).prev_sample.item()
        assert plan.coefficients[stage, Column.SIGMA] == pytest.approx(theirs, rel=DIFFUSERS_STEP * 10)
