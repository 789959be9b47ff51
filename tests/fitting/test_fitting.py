"""Fitted plans: converged references, timesteps by dynamic programming, weights that the engine draws with."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from engines import SCHEDULE
from faults import modules_after
from fitting_cases import DEVIATION, MEAN, SHAPE, WEIGHTS
from tolerances import FLOAT32_LOOP

from skipstep import NoiseSchedule, Plan, load
from skipstep.errors import BundleError, PlanError
from skipstep.export.bundle_rewriter import add_plans
from skipstep.fitting.reference import Denoiser, Reference, grid_of, integrate, multistep_row
from skipstep.fitting.timesteps import choose_nodes, growth, step_errors
from skipstep.fitting.weights import WeightFit, least_squares, rmse


def exact_ends(noise, level):
    """Of normal data the ODE keeps how many standard deviations a state is from its mean."""
    spread = np.sqrt(level * DEVIATION**2 + 1 - level)
    return MEAN + DEVIATION * (noise - np.sqrt(level) * MEAN) / spread


def denoiser_of(engine, count=16):
    return Denoiser.of(engine, np.arange(count, dtype=np.uint64))


def test_the_reference_converges_to_the_exact_solution_at_third_order(gaussian):
    denoiser = denoiser_of(gaussian)
    errors = []
    for count in (16, 32, 64):
        grid = grid_of(SCHEDULE, count)
        exact = exact_ends(denoiser.noise, denoiser.level(grid[0]))
        errors.append(rmse(integrate(denoiser, grid).ends, exact))
    assert errors[0] / errors[1] > 4
    assert errors[-1] < 1e-3


def test_a_row_is_the_textbooks_where_one_image_is_known():
    for level, target in ((0.1, 0.4), (0.5, 0.9), (0.0, 0.3)):
        shrink, images = multistep_row([level], target)
        assert shrink == pytest.approx(np.sqrt((1 - target) / (1 - level)))
        assert images[0] == pytest.approx(np.sqrt(target) - np.sqrt(level) * shrink)
    # The polynomial through equal images is that image.
    shrink, images = multistep_row([0.4, 0.2, 0.1], 0.6)
    assert images.sum() == pytest.approx(np.sqrt(0.6) - np.sqrt(0.4) * shrink)


@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule.cosine(50), SCHEDULE.rescaled_to_zero_terminal_snr()])
@pytest.mark.parametrize("count", [8, 40, 5000])
def test_a_grid_leads_from_end_to_end(schedule, count):
    grid = grid_of(schedule, count)
    assert (grid[0], grid[-1]) == (schedule.num_timesteps - 1, 0)
    assert all(a > b for a, b in itertools.pairwise(grid))
    assert len(grid) <= count


def test_the_dynamic_programme_finds_the_best_of_all_plans():
    rng = np.random.default_rng(0)
    nodes = tuple(range(9, 0, -1))
    states, images = rng.standard_normal((2, 9, 5, 1, 2, 2)).astype(np.float32)
    reference = Reference(nodes, states, images, rng.standard_normal((5, 1, 2, 2)).astype(np.float32))
    first, later = step_errors(reference)
    for steps in (1, 2, 3, 4):

        def cost(path):
            whole = first[0, path[1]] if len(path) > 1 else 0.0
            return whole + sum(later[path[k - 1], path[k], path[k + 1]] for k in range(1, len(path) - 1))

        every = [(0, *rest) for rest in itertools.combinations(range(1, 9), steps - 1)]
        best = min(every, key=lambda path: cost((*path, 9)))
        assert choose_nodes(first, later, steps) == best


def test_errors_of_steps_are_those_of_the_best_linear_ones(curve):
    reference = integrate(denoiser_of(curve), grid_of(SCHEDULE, 10))
    first, later = step_errors(reference)
    for features, error, target in (
        ((reference.states[2], reference.images[2]), first[2, 5], reference.states[5]),
        ((reference.states[4], reference.images[4], reference.images[1]), later[1, 4, 10], reference.ends),
    ):
        matrix = np.stack([each.ravel() for each in features], axis=1).astype(np.float64)
        residual = np.linalg.lstsq(matrix, target.ravel().astype(np.float64), rcond=None)[1]
        assert error == pytest.approx(residual[0] / target.size, rel=1e-2, abs=1e-7)


def test_an_error_grows_as_the_exact_solution_of_normal_data_does(gaussian):
    """A state moved by δ ends moved by δ·(the deviation of the images)/(that of the state)."""
    reference = integrate(denoiser_of(gaussian, 64), grid_of(SCHEDULE, 10))
    levels = np.array([SCHEDULE.alpha_bar[t] for t in reference.nodes])
    spread = levels * DEVIATION**2 + 1 - levels
    np.testing.assert_allclose(growth(reference, levels), [*DEVIATION**2 / spread, 1.0], rtol=0.15)


def test_normal_data_takes_one_step(gaussian):
    """Where the image is linear in the state, weights on both can be exact at once."""
    denoiser = denoiser_of(gaussian)
    reference = integrate(denoiser, grid_of(SCHEDULE, 48))
    weights, error = WeightFit(denoiser, reference).fit((0,))
    assert error < 5e-3
    assert weights.shape == (1, 5)


@pytest.mark.parametrize("nodes", [(0,), (0, 5), (0, 4, 9, 15), (0, 3, 6, 9, 12, 15)])
def test_the_engine_draws_what_the_fit_reached(curve, nodes):
    denoiser = denoiser_of(curve)
    reference = integrate(denoiser, grid_of(SCHEDULE, 20))
    fit = WeightFit(denoiser, reference)
    fit.fit((0, 4, 8))  # What is kept of another plan must not leak into this one.
    weights, error = fit.fit(nodes)
    plan = Plan(schedule=SCHEDULE, timesteps=[reference.nodes[n] for n in nodes], solver="fitted", weights=weights)
    drawn = curve.sample(plan=plan, seeds=range(16))
    assert rmse(drawn, reference.ends) == pytest.approx(error, abs=FLOAT32_LOOP)
    again, same = WeightFit(denoiser, reference).fit(nodes)
    np.testing.assert_array_equal(again, weights)
    assert same == error


def test_least_squares_without_information_is_the_textbook():
    zero = np.zeros((4, 2), np.float32)
    one = np.ones((4, 2), np.float32)
    np.testing.assert_allclose(least_squares([one, one], 3 * one, np.array([1.0, 2.0])), [1.0, 2.0], rtol=1e-3)
    with pytest.raises(np.linalg.LinAlgError):
        least_squares([zero], one, np.array([1.0]))


@pytest.mark.parametrize(
    "options",
    [
        {"weights": None},
        {"weights": WEIGHTS[:1]},
        {"weights": [[*row, 0.0] for row in WEIGHTS]},
        {"weights": [[np.nan] * 5, WEIGHTS[1]]},
        {"weights": [[1e30] * 5, WEIGHTS[1]]},
        {"weights": [WEIGHTS[0], WEIGHTS[0]]},
        {"weights": "12345"},
        {"eta": 0.5},
        {"final_alpha_bar": 0.9999},
        {"fit": {"network": "x"}},
        {"fit": 3},
        {"solver": "ddim"},
    ],
    ids=lambda options: f"{options!r:.50}",
)
def test_what_is_no_fitted_plan(options):
    with pytest.raises(PlanError):
        Plan(**{"schedule": SCHEDULE, "timesteps": [900, 300], "solver": "fitted", "weights": WEIGHTS, **options})


def test_a_plan_of_another_network_is_refused(bundle):
    fit = {
        "network": "0" * 64, "guidance_scale": 1.0, "noises": 8, "seed": 0, "objective": "a test",
        "rmse": None, "textbook_rmse": None,
    }  # fmt: skip
    plan = Plan(schedule=SCHEDULE, timesteps=[900, 300], solver="fitted", weights=WEIGHTS, fit=fit)
    with load(bundle) as engine:
        with pytest.raises(PlanError, match="allow_mismatch"):
            engine.add_plan(plan)
        engine.add_plan(plan, allow_mismatch=True)
        engine.sample(plan=plan, seeds=1, class_labels=0)


def test_a_fitted_plan_is_not_begun_in_the_middle_nor_inverted(curve):
    plan = Plan(schedule=SCHEDULE, timesteps=[900, 300], solver="fitted", weights=WEIGHTS)
    curve.add_plan(plan)
    image = np.zeros((1, *SHAPE), np.float32)
    for attempt in (
        lambda: curve.edit(image, plan=plan, strength=0.5, seeds=1),
        lambda: curve.invert(image, plan=plan),
        lambda: curve.reconstruct(image, plan=plan),
    ):
        with pytest.raises(PlanError, match=r"engine\.add_plan"):
            attempt()
    whole = curve.edit(image, plan=plan, strength=1.0, seeds=1)
    assert np.isfinite(whole).all()


def test_tuning_a_bundle_takes_no_torch():
    loaded = modules_after("import skipstep.commands.tune, skipstep.fitting.tune, skipstep.export.bundle_rewriter")
    assert not loaded & {"torch", "triton", "diffusers", "onnxscript"}


def test_one_bit_of_a_stored_row_is_noticed(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    plan = Plan(schedule=SCHEDULE, timesteps=[900, 300], solver="fitted", weights=WEIGHTS)
    (added,) = add_plans(copy, [plan], digest=json.loads((copy / "manifest.json").read_text())["digest"])
    assert added.key == plan.key
    manifest = copy / "manifest.json"
    changed = manifest.read_text().replace("0.5,", "0.50001,", 1)
    assert changed != manifest.read_text()
    manifest.write_text(changed)
    with pytest.raises(BundleError, match=plan.key):
        load(copy)
