"""Inversion, reconstruction, edits and interpolation through the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import SCHEDULE, build
from tiny_networks import Curve, GaussianEps, Labelled
from tolerances import FLOAT32_LOOP

from skipstep import Engine, Plan
from skipstep.calls.noise import standard_normal
from skipstep.editing.interpolation import slerp
from skipstep.errors import InputError, NonFiniteError, PlanError, PlanNotFoundError
from skipstep.kernels.layout import Stream
from skipstep.loops.stepwise import HostRun


@pytest.fixture(scope="module")
def gaussian() -> Engine:
    return build(GaussianEps(SCHEDULE.alpha_bar), sample_shape=(1, 3, 5))


@pytest.fixture(scope="module")
def smooth() -> Engine:
    """A mild network without a closed form."""
    return build(Curve(), sample_shape=(1, 6, 6))


def pictures(engine: Engine, count: int = 3) -> np.ndarray:
    shape = (count, *engine.network.sample_shape)
    return np.random.default_rng(0).uniform(-0.9, 0.9, shape).astype(np.float32)


def unclipped(steps: int, **options) -> Plan:
    return Plan(schedule=SCHEDULE, steps=steps, clip=None, **options)


def root_mean_square(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(array.astype(np.float64) ** 2)))


def test_inversion_of_gaussian_data_is_the_exact_map(gaussian):
    """The ODE of N(m, s²) is affine: x_T = √a·m + √v·(x_0 - m)/s, reached as steps grow."""
    images = pictures(gaussian)
    a = float(SCHEDULE.alpha_bar[999])
    exact = np.sqrt(a) * 0.3 + np.sqrt(a * 0.49 + 1 - a) * (images - 0.3) / 0.7
    errors = [
        root_mean_square(gaussian.invert(images, plan=unclipped(steps)).latents - exact) for steps in (20, 100, 1000)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.01


@pytest.mark.parametrize("evaluate_at", ["target", "source"])
def test_both_points_of_evaluation_converge(gaussian, evaluate_at):
    images = pictures(gaussian)
    errors = []
    for steps in (20, 200):
        plan = unclipped(steps)
        latents = gaussian.invert(images, plan=plan, evaluate_at=evaluate_at).latents
        errors.append(root_mean_square(gaussian.sample(plan=plan, x_T=latents) - images))
    assert errors[0] > 5 * errors[1]


def test_refinement_finds_the_noise_that_draws_the_image(gaussian):
    images, plan = pictures(gaussian), unclipped(50)
    plain = gaussian.invert(images, plan=plan)
    assert np.isnan(plain.residuals).all()
    errors = [root_mean_square(gaussian.sample(plan=plan, x_T=plain.latents) - images)]
    for refinements in (1, 3, 8):
        found = gaussian.invert(images, plan=plan, refinements=refinements)
        assert found.residuals.shape == (50, 3)
        errors.append(root_mean_square(gaussian.sample(plan=plan, x_T=found.latents) - images))
    assert errors[1] < errors[0] / 3
    assert errors[3] < errors[0] / 100


class Steep(GaussianEps):
    """A prediction so steep in x that the fixed-point map expands at some levels, and iteration diverges there."""

    def forward(self, x, t):
        return super().forward(x, t) + 2.0 * (8.0 * x).sin()


def test_a_diverging_refinement_keeps_the_best_answer():
    engine = build(Steep(SCHEDULE.alpha_bar), sample_shape=(1, 3, 5))
    images, plan = pictures(engine), unclipped(20)
    few, many = (engine.invert(images, plan=plan, refinements=n) for n in (1, 30))
    assert np.all(np.isfinite(many.latents))
    # Somewhere it stalled far from a fixed point, and says so.
    assert many.residuals.max() > 0.05
    assert np.all(many.residuals[0] <= few.residuals[0])


def test_refinement_stops_when_every_residual_has_stalled(gaussian, monkeypatch):
    calls = []
    advance = HostRun.advance
    monkeypatch.setattr(HostRun, "advance", lambda run, stage: (calls.append(stage), advance(run, stage)))
    gaussian.invert(pictures(gaussian, 1), plan=unclipped(10), refinements=1000, tolerance=1e-5)
    assert 20 < len(calls) < 10 * 40


def test_a_sample_inverts_alone_as_in_a_batch(gaussian):
    images, plan = pictures(gaussian, 6), unclipped(10)
    together = gaussian.invert(images, plan=plan, refinements=2)
    for i in range(6):
        alone = gaussian.invert(images[i : i + 1], plan=plan, refinements=2)
        np.testing.assert_array_equal(together.latents[i : i + 1], alone.latents)
        np.testing.assert_array_equal(together.residuals[:, i : i + 1], alone.residuals)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_reconstruction_is_the_round_trip(smooth, prediction_type):
    images = pictures(smooth)
    plan = unclipped(100, prediction_type=prediction_type)
    engine = build(Curve(), sample_shape=(1, 6, 6), prediction_type=prediction_type)
    latents = engine.invert(images, plan=plan, refinements=2).latents
    round_trip = engine.reconstruct(images, plan=plan, refinements=2)
    np.testing.assert_array_equal(round_trip, engine.sample(plan=plan, x_T=latents))


def test_reconstruction_improves_with_steps(gaussian):
    images = pictures(gaussian)
    errors = [root_mean_square(gaussian.reconstruct(images, plan=unclipped(n)) - images) for n in (10, 50, 200)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert gaussian.reconstruct(images, plan=unclipped(10), output_type="pil")[0].size == (5, 3)


def test_an_edit_by_noise_starts_at_its_level(gaussian):
    images, plan = pictures(gaussian), unclipped(10)
    seeds = np.array([4, 5, 6], np.uint64)
    ours = gaussian.edit(images, plan=plan, strength=0.4, seeds=seeds.tolist())
    tail = Plan(schedule=SCHEDULE, timesteps=plan.timesteps[6:], clip=None)
    a = tail.alpha_bars[0]
    z = standard_normal(seeds, 15, stage=0, stream=Stream.EDIT).reshape(images.shape)
    start = (np.sqrt(a) * images + np.sqrt(1 - a) * z).astype(np.float32)
    np.testing.assert_array_equal(ours, gaussian.sample(plan=tail, x_T=start))
    # Its noise is none of that which the same seeds draw pictures from.
    assert not np.allclose(z, standard_normal(seeds, 15, stage=0, stream=Stream.INITIAL).reshape(images.shape))


def test_strength_and_noise_level_say_how_much_is_kept(gaussian):
    images, plan = pictures(gaussian), unclipped(20)

    def distance(**options) -> float:
        return root_mean_square(gaussian.edit(images, plan=plan, seeds=[1, 2, 3], **options) - images)

    by_strength = [distance(strength=strength) for strength in (0.05, 0.3, 0.6, 1.0)]
    by_level = [distance(noise_level=level) for level in (0.2, 0.5, 0.9, 1.0)]
    assert by_strength == sorted(by_strength)
    assert by_level == sorted(by_level)
    assert by_level[-1] == by_strength[-1]
    levels = np.sqrt(1 - plan.alpha_bars[:-1])
    assert distance(noise_level=float(levels[7])) == distance(strength=13 / 20)


def test_an_edit_by_inversion_with_the_same_label_gives_the_image_back():
    engine = build(Labelled(), sample_shape=(1, 4, 4), num_classes=10, null_label=10)
    images, plan = pictures(engine), unclipped(200)
    same = engine.edit(images, plan=plan, strength=0.5, method="invert", source_labels=3, class_labels=3)
    other = engine.edit(images, plan=plan, strength=0.5, method="invert", source_labels=3, class_labels=8)
    assert root_mean_square(same - images) < 0.02
    assert root_mean_square(other - images) > 0.1


def test_edits_take_noisy_plans_and_solvers_with_history(gaussian):
    images = pictures(gaussian)
    for plan in (unclipped(10, eta=1.0), unclipped(10, solver="dpm_solver_pp_2m"), unclipped(10, solver="ddpm")):
        drawn = gaussian.edit(images, plan=plan, strength=0.5, seeds=[1, 2, 3])
        assert np.all(np.isfinite(drawn))
        assert root_mean_square(drawn - images) > 0.01


def test_interpolation_draws_from_between_the_noises(gaussian):
    plan = unclipped(5)
    x_T = [standard_normal(np.array([s], np.uint64), 15, stage=0, stream=Stream.INITIAL) for s in (7, 9)]
    a, b = (noise.reshape(1, 3, 5) for noise in x_T)
    drawn = gaussian.interpolate(7, 9, 5, plan=plan)
    np.testing.assert_array_equal(drawn, gaussian.sample(plan=plan, x_T=slerp(a, b, np.linspace(0, 1, 5))))
    np.testing.assert_array_equal(drawn, gaussian.interpolate(a, b, 5, plan=plan))
    np.testing.assert_allclose(drawn[[0, -1]], gaussian.sample(plan=plan, seeds=[7, 9]), atol=FLOAT32_LOOP)


def test_a_grid_has_four_corners(gaussian):
    plan = unclipped(5)
    grid = gaussian.interpolate_grid([1, 2, 3, 4], rows=3, columns=4, plan=plan)
    assert grid.shape == (12, 1, 3, 5)
    np.testing.assert_allclose(grid[[0, 3, 8, 11]], gaussian.sample(plan=plan, seeds=[1, 2, 3, 4]), atol=FLOAT32_LOOP)


IMAGES = np.zeros((2, 1, 3, 5), np.float32)


@pytest.mark.parametrize(
    ("method", "arguments", "names"),
    [
        ("invert", {"images": IMAGES, "plan": unclipped(5, eta=0.5)}, "fresh noise"),
        ("invert", {"images": IMAGES, "plan": unclipped(5, solver="ddpm")}, "fresh noise"),
        ("invert", {"images": IMAGES[:, :, :2], "steps": 6}, r"images of shape \[2, 1, 2, 5\]"),
        ("invert", {"images": IMAGES.astype(int), "steps": 6}, "images of dtype int64"),
        ("invert", {"images": IMAGES * np.nan, "steps": 6}, "NaN or infinity in images"),
        ("invert", {"images": IMAGES, "steps": 6, "refinements": -1}, "refinements=-1"),
        ("invert", {"images": IMAGES, "steps": 6, "refinements": 1, "evaluate_at": "source"}, "source"),
        ("edit", {"images": IMAGES, "steps": 6, "strength": 0.0, "seeds": 1}, "strength=0.0"),
        ("edit", {"images": IMAGES, "steps": 6, "strength": 1.1, "seeds": 1}, "strength=1.1"),
        ("edit", {"images": IMAGES, "steps": 6, "strength": "half", "seeds": 1}, "strength='half'"),
        ("edit", {"images": IMAGES, "steps": 6, "noise_level": 0.001, "seeds": 1}, "noise_level=0.001"),
        ("edit", {"images": IMAGES, "steps": 6, "seeds": 1}, "neither"),
        ("edit", {"images": IMAGES, "steps": 6, "strength": 0.5, "noise_level": 0.5, "seeds": 1}, "both"),
        ("edit", {"images": IMAGES, "steps": 6, "strength": 0.5}, "no seeds"),
        ("edit", {"images": IMAGES, "steps": 6, "strength": 0.5, "method": "paint"}, "paint"),
        ("edit", {"images": IMAGES, "steps": 6, "strength": 0.5, "seeds": 1, "source_labels": 1}, "source_labels"),
        ("interpolate", {"a": 1, "b": 2, "n": 1, "steps": 6}, "n=1"),
        ("interpolate", {"a": -1, "b": 2, "n": 3, "steps": 6}, "seed=-1"),
        ("interpolate", {"a": 1, "b": np.zeros((1, 3, 5), np.float32), "n": 3, "steps": 6}, "lengths"),
        ("interpolate", {"a": 1, "b": np.ones((1, 3, 4), np.float32), "n": 3, "steps": 6}, "shape"),
    ],
)
def test_refuses(gaussian, method, arguments, names):
    with pytest.raises(InputError, match=names):
        getattr(gaussian, method)(**arguments)


@pytest.mark.parametrize(
    "options", [{"eta": 0.5}, {"clip": 1.0}, {"clip": "dynamic", "dynamic_quantile": 0.9}, {"variance": "fixed_small"}]
)
def test_an_inversion_plan_takes_no_noise_and_no_clip(options):
    with pytest.raises(PlanError):
        Plan(schedule=SCHEDULE, steps=10, solver="ddim_inversion", **options)


def test_a_plan_that_is_not_held_is_not_inverted():
    engine = build(Curve(), sample_shape=(1, 3, 5), plans=[5])
    with pytest.raises(PlanNotFoundError):
        engine.invert(IMAGES, steps=7)
    assert engine.edit(IMAGES, steps=5, strength=0.4, seeds=1).shape == IMAGES.shape


class Broken(GaussianEps):
    """NaN for the second sample of a batch, from timestep 500 up."""

    def forward(self, x, t):
        bad = (torch.arange(len(x)) == 1) & (t >= 500)
        return super().forward(x, t).where(~bad.view(-1, 1, 1, 1), torch.nan)


@pytest.mark.parametrize("refinements", [0, 2])
def test_nan_from_the_network_is_an_error_and_no_latents(refinements):
    engine = build(Broken(SCHEDULE.alpha_bar), sample_shape=(1, 3, 5), batch_sizes=[4])
    with pytest.raises(NonFiniteError, match=r"samples \[1\] of 3"):
        engine.invert(pictures(engine), plan=unclipped(5), refinements=refinements)
