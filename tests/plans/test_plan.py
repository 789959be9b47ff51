import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT64

from skipstep import NoiseSchedule, Plan
from skipstep.errors import PlanError
from skipstep.kernels.layout import NUM_COLUMNS, SLOT_COLUMNS, Column, StepFlags
from skipstep.plans.key import plan_key
from skipstep.plans.solvers import SOLVERS
from skipstep.plans.spacing import SPACINGS
from skipstep.plans.update_weights import SolverOptions

LINEAR = NoiseSchedule.linear(1000)
ZERO_SNR = LINEAR.rescaled_to_zero_terminal_snr()


@pytest.mark.parametrize(
    "step_counts",
    [
        pytest.param([*range(1, 51), *range(51, 999, 79), 999, 1000], id="some"),
        pytest.param(range(1, 1001), id="all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_lands_on_a_clean_image_or_is_refused(spacing, step_counts):
    for steps in step_counts:
        try:
            plan = Plan(schedule=LINEAR, steps=steps, spacing=spacing, eta=1.0)
        except PlanError:
            assert spacing not in ("leading", "trailing", "linspace")
            continue
        assert plan.num_evaluations == steps == len(plan.pairs)
        assert plan.alpha_bars.shape == (steps + 1,)
        assert plan.alpha_bars[-1] == 1.0
        assert np.all(np.diff(plan.alpha_bars) > 0.0)
        last = plan.coefficients[-1]
        assert (last[Column.C_X0], last[Column.C_EPS], last[Column.SIGMA]) == (1.0, 0.0, 0.0)


@given(
    steps=st.integers(1, 1000),
    eta=st.floats(0.0, 1.0),
    schedule=st.sampled_from(
        [LINEAR, NoiseSchedule.cosine(1000), NoiseSchedule.sigmoid(1000), NoiseSchedule.scaled_linear(1000)]
    ),
)
def test_each_step_keeps_the_variance_that_its_level_has(steps, eta, schedule):
    plan = Plan(schedule=schedule, steps=steps, eta=eta)
    row = plan.coefficients.astype(np.float64)
    # With independent unit-variance image, noise and z, the step's variance is p + (1-p-sigma²) + sigma² = 1.
    variance = row[:, Column.C_X0] ** 2 + row[:, Column.C_EPS] ** 2 + row[:, Column.SIGMA] ** 2
    np.testing.assert_allclose(variance, 1.0, rtol=3 * np.finfo(np.float32).eps)
    assert np.all(np.isfinite(plan.coefficients))


def test_eta_one_is_the_posterior_variance_of_ddpm():
    plan = Plan(schedule=LINEAR, steps=1000, eta=1.0)
    alpha_bar = LINEAR.alpha_bar
    beta = 1.0 - alpha_bar[1:] / alpha_bar[:-1]
    posterior = beta * (1.0 - alpha_bar[:-1]) / (1.0 - alpha_bar[1:])
    sigma = plan.coefficients[:-1, Column.SIGMA][::-1]
    np.testing.assert_allclose(sigma, np.sqrt(posterior), rtol=3 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_columns_invert_the_forward_process(prediction_type):
    plan = Plan(schedule=LINEAR, steps=10, prediction_type=prediction_type)
    x0, eps = 0.3, -1.2
    a = plan.alpha_bars[:-1]
    x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
    output = {
        "epsilon": np.full(10, eps),
        "v_prediction": np.sqrt(a) * eps - np.sqrt(1 - a) * x0,
        "sample": np.full(10, x0),
    }[prediction_type]
    row = plan.coefficients.astype(np.float64)
    # x0 is a difference of numbers up to 1/sqrt(a) = 157 times larger, each rounded to float32 in the table.
    cancellation = np.finfo(np.float32).eps * 2 / np.sqrt(a)
    assert np.all(np.abs(row[:, Column.X0_X] * x_t + row[:, Column.X0_OUT] * output - x0) <= cancellation)
    assert np.all(np.abs(row[:, Column.EPS_X] * x_t + row[:, Column.EPS_OUT] * output - eps) <= 4e-7 / np.sqrt(1 - a))
    assert np.all(np.abs(row[:, Column.RE_X] * x_t + row[:, Column.RE_X0] * x0 - eps) <= 4e-7 / np.sqrt(1 - a))


def test_one_step_by_hand():
    plan = Plan(schedule=LINEAR, timesteps=[500, 200], eta=0.5)
    a, p = LINEAR.alpha_bar[500], LINEAR.alpha_bar[200]
    sigma = 0.5 * np.sqrt((1 - p) / (1 - a) * (1 - a / p))
    expected = np.zeros(NUM_COLUMNS)
    expected[[Column.X0_X, Column.X0_OUT, Column.EPS_OUT]] = 1 / np.sqrt(a), -np.sqrt(1 - a) / np.sqrt(a), 1.0
    expected[[Column.CLIP, Column.RE_X, Column.RE_X0]] = 1.0, 1 / np.sqrt(1 - a), -np.sqrt(a / (1 - a))
    expected[[Column.C_X0, Column.C_EPS, Column.SIGMA]] = np.sqrt(p), np.sqrt(1 - p - sigma**2), sigma
    np.testing.assert_allclose(plan.coefficients[0], expected, rtol=np.finfo(np.float32).eps)
    assert plan.coefficients.dtype == np.float32
    assert plan.pairs == ((500, 200), (200, None))
    np.testing.assert_allclose(plan.alpha_bars, [a, p, 1.0], rtol=FLOAT64)


def test_conventions_are_flags():
    def flags(**options):
        every = set(Plan(schedule=LINEAR, steps=10, **options).stage_flags)
        assert len(every) == 1, "one kernel serves all steps of DDIM"
        return every.pop()

    assert flags() == StepFlags(clip=True)
    assert flags(convention="guided") == StepFlags(clip=True, rederive_eps=True)
    assert flags(convention="paper") == StepFlags()
    assert flags(convention="guided", clip=None) == StepFlags()
    assert flags(eta=0.1) == StepFlags(clip=True, add_noise=True)
    assert not Plan(schedule=LINEAR, steps=1, eta=1.0).adds_noise


def test_is_a_value():
    plan = Plan(schedule=LINEAR, steps=20)
    same = Plan(schedule=NoiseSchedule.linear(1000), steps=20)
    assert plan == same
    assert hash(plan) == hash(same)
    assert plan.key == same.key
    assert {plan: "x"}[same] == "x"
    explicit = Plan(schedule=LINEAR, timesteps=np.array(plan.timesteps))
    assert explicit.key == plan.key
    assert explicit.spacing is None
    assert explicit.steps == 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.eta = 0.5
    with pytest.raises(ValueError, match="read-only"):
        plan.coefficients[0, 0] = 1.0
    for word in ("ddim", "20 of 1000", "trailing", "epsilon", plan.key):
        assert word in repr(plan)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 21},
        {"spacing": "leading"},
        {"eta": 0.5},
        {"prediction_type": "v_prediction"},
        {"clip": None},
        {"clip": 2.0},
        {"convention": "guided"},
        {"final_alpha_bar": 0.9999},
        {"schedule": NoiseSchedule.cosine(1000)},
        {"spacing": "leading", "steps_offset": 1},
    ],
)
def test_whatever_changes_the_result_changes_the_key(change):
    base = {"schedule": LINEAR, "steps": 20}
    assert Plan(**{**base, **change}).key != Plan(**base).key


@pytest.mark.parametrize("solver", ["unipc_2", "unipc_3"])
def test_unipc_takes_zero_terminal_snr_as_diffusers_does(solver):
    """Its scheduler has 2**-24 in place of 0."""
    levels = np.array([0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
    ours, theirs = (SOLVERS[solver].weights(each, SolverOptions()) for each in (levels, np.maximum(levels, 2.0**-24)))
    for column in ("c_x", "c_x0", "c_h0", "c_h1", "c_h2"):
        np.testing.assert_allclose(getattr(ours, column), getattr(theirs, column), rtol=1e-6)
    # The level above 0 may itself be lower than that.
    every = Plan(schedule=ZERO_SNR, steps=1000, solver=solver, prediction_type="v_prediction")
    assert np.all(np.isfinite(every.coefficients))


FITTED = [[0.5, 0.5, 0.1, 0.2, 0.0], [0.5, 0.4, 0.1, 0.3, 0.7], [0.1, 0.9, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"steps": 1}, "a6cf9dd79e52c942"),
        ({"steps": 5}, "b7db6b90c163d0fb"),
        ({"steps": 5, "solver": "heun"}, "471e0a1625133eb3"),
        ({"timesteps": [900, 500, 100], "solver": "fitted", "weights": FITTED}, "b961b26973d24b79"),
    ],
)
def test_a_plan_keeps_its_key_from_version_to_version(options, key):
    """Bundles hold keys. Of these plans nothing depends on a library's logarithms."""
    assert Plan(schedule=LINEAR, **options).key == key


def test_every_flag_of_a_stage_is_in_the_key():
    def key_of(flags: StepFlags) -> str:
        tables = {"evaluation_timesteps": np.zeros(1), "coefficients": np.zeros((1, NUM_COLUMNS), np.float32)}
        return plan_key((flags,), None, **tables)

    flags = [StepFlags(), *(StepFlags(**{each.name: True}) for each in dataclasses.fields(StepFlags))]
    assert len({key_of(each) for each in flags}) == len(flags)


def test_a_plan_may_end_at_the_first_level_of_the_schedule():
    first = float(LINEAR.alpha_bar[0])
    plan = Plan(schedule=LINEAR, steps=10, spacing="leading", final_alpha_bar=first)
    assert plan.alpha_bars[-1] == first


def test_zero_terminal_snr_is_for_networks_that_can_see_the_image_in_their_output():
    for prediction_type in ("v_prediction", "sample"):
        plan = Plan(schedule=ZERO_SNR, steps=10, prediction_type=prediction_type)
        assert np.all(np.isfinite(plan.coefficients))
    with pytest.raises(PlanError, match="v_prediction"):
        Plan(schedule=ZERO_SNR, steps=10, prediction_type="epsilon")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": -5}, "steps=-5"),
        ({"steps": 1001}, "steps=1001"),
        ({"steps": 10, "eta": 1.01}, "eta=1.01"),
        ({"steps": 10, "eta": -0.1}, "eta=-0.1"),
        ({"steps": 10, "eta": float("nan")}, "eta=nan"),
        ({"steps": 10, "eta": "0"}, "eta='0'"),
        ({"steps": 10, "spacing": "cubic"}, "spacing='cubic'"),
        ({"steps": 10, "spacing": None}, "neither"),
        ({"steps": 50, "spacing": "quadratic"}, "steps=50"),
        ({}, "neither"),
        ({"timesteps": [1, 2]}, "timesteps=[1, 2]"),
        ({"timesteps": [2, 2]}, "timesteps=[2, 2]"),
        ({"timesteps": [1000, 2]}, "timesteps=[1000, 2]"),
        ({"timesteps": [2, -1]}, "timesteps=[2, -1]"),
        ({"timesteps": [2.5, 1]}, "timesteps=[2.5, 1]"),
        ({"timesteps": [5, 2], "steps": 3}, "steps=3"),
        ({"steps": 10, "solver": "magic"}, "solver='magic'"),
        ({"steps": 10, "prediction_type": "noise"}, "prediction_type='noise'"),
        ({"steps": 10, "convention": "mine"}, "convention='mine'"),
        ({"steps": 10, "clip": 0.0}, "clip=0.0"),
        ({"steps": 10, "clip": -1.0}, "clip=-1.0"),
        ({"steps": 10, "clip": 1.0, "convention": "paper"}, "clip=1.0"),
        ({"steps": 10, "final_alpha_bar": 0.0}, "final_alpha_bar=0.0"),
        ({"steps": 10, "final_alpha_bar": 1.5}, "final_alpha_bar=1.5"),
        ({"steps": 10, "final_alpha_bar": 0.1}, "final_alpha_bar=0.1"),
        ({"steps": 10, "schedule": "linear"}, "schedule of type str"),
        ({"steps": 10, "solver": "heun", "eta": 0.5}, "eta=0.5"),
        ({"steps": 10, "variance": "fixed_small"}, "variance='fixed_small'"),
        ({"steps": 10, "solver": "ddpm", "variance": "learned"}, "variance='learned'"),
        ({"steps": 10, "midpoints": "nearest"}, "midpoints='nearest'"),
        ({"steps": 10, "solver": "rk4", "midpoints": "between"}, "midpoints='between'"),
        ({"steps": 10, "evaluate_at": "source"}, "evaluate_at='source'"),
        ({"steps": 10, "clip": "dynamic"}, "without dynamic_quantile"),
        ({"steps": 10, "clip": "dynamic", "dynamic_quantile": 0.0}, "dynamic_quantile=0.0"),
        ({"steps": 10, "clip": "dynamic", "dynamic_quantile": 1.5}, "dynamic_quantile=1.5"),
        ({"steps": 10, "clip": "dynamic", "dynamic_quantile": 0.9, "dynamic_maximum": 0.5}, "dynamic_maximum=0.5"),
        ({"steps": 10, "dynamic_quantile": 0.9}, "dynamic_quantile=0.9"),
        ({"steps": 10, "clip": "dynamic", "dynamic_quantile": 0.9, "convention": "paper"}, "clip='dynamic'"),
        ({"steps": 10, "clip": "static"}, "clip='static'"),
        *(
            ({"steps": 10, "schedule": ZERO_SNR, "prediction_type": "v_prediction", "solver": solver}, "zero terminal")
            for solver in ("heun", "rk4", "dpm_solver_2", "ddim_inversion", "dpm_solver_pp_3m", "deis_3", "lms")
        ),
    ],
)
def test_refuses_what_is_no_plan(options, names):
    with pytest.raises(PlanError) as caught:
        Plan(**{"schedule": LINEAR, **options})
    assert names in caught.value.got
    assert "Remedy" in str(caught.value)


@pytest.mark.parametrize("step", [-1, 5, True, 1.5])
def test_the_rest_of_a_plan_starts_at_one_of_its_steps(step):
    plan = Plan(schedule=NoiseSchedule.linear(1000), steps=5)
    assert plan.started_at(np.int64(2)).timesteps == plan.timesteps[2:]
    with pytest.raises(PlanError, match="step="):
        plan.started_at(step)
    with pytest.raises(PlanError, match=r"started_at\(step\)\.inverted"):
        plan.inverted().started_at(2)
    assert plan.started_at(2).inverted().timesteps == plan.timesteps[2:][::-1]


def test_midpoints_are_found_in_log_snr_or_snapped():
    plan = Plan(schedule=LINEAR, timesteps=[700, 300], solver="dpm_solver_2")
    told = plan.evaluation_timesteps
    assert told[[0, 2]].tolist() == [700.0, 300.0]
    assert plan.is_fractional
    ends = np.log(LINEAR.alpha_bar[[700, 300]]) - np.log1p(-LINEAR.alpha_bar[[700, 300]])
    log_snr = np.log(LINEAR.alpha_bar) - np.log1p(-LINEAR.alpha_bar)
    assert np.interp(told[1], np.arange(1000), log_snr) == pytest.approx(ends.mean())
    snapped = Plan(schedule=LINEAR, timesteps=[700, 300], solver="dpm_solver_2", midpoints="nearest")
    assert snapped.evaluation_timesteps.tolist() == [700.0, round(told[1]), 300.0]
    assert snapped.key != plan.key


def test_an_inversion_visits_the_levels_of_its_plan_upward():
    plan = Plan(schedule=LINEAR, steps=4, spacing="leading", clip=None)
    for evaluate_at, told in (("target", [0, 250, 500, 750]), ("source", [0, 0, 250, 500])):
        back = plan.inverted(evaluate_at=evaluate_at)
        assert back.evaluation_timesteps.tolist() == told
        np.testing.assert_array_equal(back.alpha_bars, plan.alpha_bars[::-1])
        assert back.pairs == ((None, 0), (0, 250), (250, 500), (500, 750))
        assert not back.adds_noise


@given(
    # A latent consistency model's image at timestep 0 is the state itself.
    solver=st.sampled_from([name for name in SOLVERS if name not in ("ddim_inversion", "lcm")]),
    spacing=st.sampled_from(SPACINGS),
    steps=st.integers(1, 60),
    convention=st.sampled_from(["diffusers", "guided", "paper"]),
    schedule=st.sampled_from([LINEAR, NoiseSchedule.cosine(1000), NoiseSchedule.scaled_linear(500)]),
)
def test_every_solver_ends_where_its_plan_says_on_every_grid(solver, spacing, steps, convention, schedule):
    try:
        plan = Plan(schedule=schedule, steps=steps, spacing=spacing, solver=solver, convention=convention)
    except PlanError:  # Too many steps for that spacing: tests/test_spacing.py has when.
        return
    assert np.all(np.isfinite(plan.coefficients))
    assert sum(plan.ends_step) == steps
    assert plan.ends_step[-1]
    assert plan.alpha_bars[-1] == 1.0
    last = plan.coefficients[-1].astype(np.float64)
    # At alpha_bar = 1 the predicted image is the result, but for a multistep rule's rounding.
    assert last[Column.C_X0] == pytest.approx(1.0, abs=1e-6)
    assert abs(last[[Column.C_EPS, Column.C_X, *SLOT_COLUMNS, Column.SIGMA]]).max() < 1e-6
    # What is kept is written before it is read.
    written: set[int] = set()
    for flags in plan.stage_flags:
        assert written.issuperset(flags.read_slots)
        assert len(flags.written_slots) <= 1
        written.update(flags.written_slots)
