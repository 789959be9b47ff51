"""What networks of other families predict and are told: columns and inputs against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import GENERAL_UPDATE

from skipstep import NoiseSchedule, Plan
from skipstep.errors import PlanError, ScheduleError
from skipstep.kernels.layout import Column
from skipstep.plans.parameterization import TIME_INPUTS, time_inputs

LEVELS = np.array([0.9, 0.5, 0.1, 0.01])
SIGMAS = np.sqrt(1 / LEVELS - 1)


def outputs(kind, x0, eps, alpha_bar, sigma_data):
    """What a perfect network returns, by the definition of its family."""
    sigma = np.sqrt(1 / alpha_bar - 1)
    match kind:
        case "epsilon":
            return eps
        case "v_prediction":
            return np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x0
        case "sample":
            return x0
        case "flow":
            return eps - x0
        case "edm":
            noised, spread = x0 + sigma * eps, sigma**2 + sigma_data**2
            return (x0 - sigma_data**2 / spread * noised) * np.sqrt(spread) / (sigma * sigma_data)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow", "edm"])
def test_a_perfect_prediction_gives_back_image_and_noise(kind):
    sigma_data = 0.7 if kind == "edm" else None
    plan = Plan(schedule=NoiseSchedule(LEVELS), steps=4, prediction_type=kind, sigma_data=sigma_data, clip=None)
    x0, eps = 0.3, -1.7
    for row, alpha_bar in zip(plan.coefficients.astype(np.float64), LEVELS[::-1], strict=True):
        x = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * eps
        out = outputs(kind, x0, eps, alpha_bar, sigma_data)
        assert row[Column.X0_X] * x + row[Column.X0_OUT] * out == pytest.approx(x0, abs=GENERAL_UPDATE)
        assert row[Column.EPS_X] * x + row[Column.EPS_OUT] * out == pytest.approx(eps, abs=GENERAL_UPDATE)


def test_flow_and_edm_begin_at_pure_noise():
    """Where there is no image left both are finite: x is the noise, and flow's x0 the noise less the output."""
    schedule = NoiseSchedule(np.array([0.5, 0.0]))
    flow = Plan(schedule=schedule, steps=2, prediction_type="flow", time_input="flow", clip=None)
    assert flow.evaluation_timesteps.tolist() == [1000.0, 500.0]
    assert flow.coefficients[0, [Column.X0_X, Column.X0_OUT, Column.EPS_X, Column.EPS_OUT]].tolist() == [1, -1, 1, 0]
    edm = Plan(schedule=schedule, steps=2, prediction_type="edm", sigma_data=0.25, clip=None)
    assert edm.coefficients[0, [Column.X0_X, Column.X0_OUT, Column.EPS_X, Column.EPS_OUT]].tolist() == [0, 0.25, 1, 0]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("sigma", SIGMAS),
        ("c_noise", np.log(SIGMAS) / 4),
        ("log_snr", np.log(LEVELS / (1 - LEVELS))),
        ("alpha_bar", LEVELS),
        ("flow", 1000 * SIGMAS / (1 + SIGMAS)),
    ],
)
def test_time_inputs(kind, wanted):
    np.testing.assert_allclose(time_inputs(kind, LEVELS), wanted, rtol=1e-12)
    plan = Plan(schedule=NoiseSchedule(LEVELS), steps=4, time_input=kind)
    np.testing.assert_allclose(plan.evaluation_timesteps, wanted[::-1], rtol=1e-12)
    assert not plan.is_fractional
    other = Plan(schedule=NoiseSchedule(LEVELS), steps=4)
    assert plan.key != other.key
    assert plan.options()["time_input"] == kind
    assert "time_input" not in other.options()
    assert Plan(schedule=plan.schedule, **plan.options()) == plan
    assert plan.inverted().time_input == kind
    if kind != "flow" and kind != "alpha_bar":
        with pytest.raises(PlanError, match="zero terminal SNR"):
            Plan(schedule=NoiseSchedule(np.array([0.5, 0.0])), steps=2, prediction_type="sample", time_input=kind)
    assert kind in TIME_INPUTS


def test_schedules_of_sigmas():
    schedule = NoiseSchedule.karras(5, sigma_min=0.01, sigma_max=50.0, rho=3.0)
    ratios = np.sqrt(1 / schedule.alpha_bar - 1)
    assert ratios[[0, -1]] == pytest.approx([0.01, 50.0])
    assert np.diff(ratios ** (1 / 3)) == pytest.approx((50 ** (1 / 3) - 0.01 ** (1 / 3)) / 4)
    assert NoiseSchedule.from_sigmas(ratios[::-1]).alpha_bar == pytest.approx(schedule.alpha_bar)
    flow = NoiseSchedule.flow(4, shift=3.0)
    s = np.array([0.25, 0.5, 0.75, 1.0])
    assert time_inputs("flow", flow.alpha_bar) == pytest.approx(1000 * 3 * s / (1 + 2 * s))
    for wrong in ([1.0, 2.0], [1.0, 0.0], [-1.0], [np.nan], "sigmas"):
        with pytest.raises(ScheduleError):
            NoiseSchedule.from_sigmas(wrong)
    for options in ({"sigma_min": 80.0}, {"sigma_max": np.inf}, {"rho": 0.0}):
        with pytest.raises(ScheduleError):
            NoiseSchedule.karras(5, **options)
    with pytest.raises(ScheduleError):
        NoiseSchedule.flow(5, shift=-1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prediction_type": "noise"}, "one of epsilon"),
        ({"time_input": "t"}, "one of timestep, sigma"),
        ({"sigma_data": 0.5}, "prediction_type='edm'"),
        ({"prediction_type": "edm", "sigma_data": 0.0}, "sigma_data"),
        ({"prediction_type": "edm", "sigma_data": "x"}, "sigma_data"),
        ({"solver": "lcm", "eta": 0.5}, "eta"),
        ({"spacing": "lcm", "steps": 51}, "at most 50"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(PlanError, match=said):
        Plan(**{"schedule": NoiseSchedule.linear(1000), "steps": 4, **options})
