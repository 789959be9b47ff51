"""Solvers against distributions whose noise prediction, and whose ODE, is known."""

from __future__ import annotations

import numpy as np
import pytest
from analytic import GAUSSIAN, MIXTURE, levels, solve
from tolerances import FLOAT64

from skipstep import NoiseSchedule
from skipstep.plans.solvers import SOLVERS, SolverOptions

X_T = np.linspace(-2.5, 2.5, 41)
ORDERS = {"ddim": 1, "dpm_solver_1": 1, "heun": 2, "dpm_solver_2": 2, "dpm_solver_pp_2m": 2, "rk4": 4}


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver):
    """Halving the step divides the error by 2^order, against the exact solution of the ODE."""
    a, p = levels(1)
    exact = MIXTURE.exact_ode(X_T, a=a, p=p)
    counts = [160, 320, 640]
    errors = [np.abs(solve(solver, levels(count), MIXTURE.eps, X_T) - exact).max() for count in counts]
    measured = np.log2(np.array(errors[:-1]) / errors[1:])
    assert measured == pytest.approx(ORDERS[solver], abs=0.15)
    assert errors[0] < {1: 0.05, 2: 1e-3, 4: 1e-5}[ORDERS[solver]]


@pytest.mark.parametrize("solver", [name for name, order in ORDERS.items() if order > 1])
def test_a_higher_order_is_worth_its_evaluations(solver):
    """At equal network evaluations, and as many of them as people use."""
    a, p = levels(1)
    exact = MIXTURE.exact_ode(X_T, a=a, p=p)

    def error(name: str, evaluations: int) -> float:
        a_step = len(SOLVERS[name].weights(levels(2), SolverOptions()).level) // 2
        return float(np.abs(solve(name, levels(evaluations // a_step), MIXTURE.eps, X_T) - exact).mean())

    assert error(solver, 80) < error("ddim", 80) / 4


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
def test_ddim_on_gaussian_data_by_its_product_formula(num_steps):
    """m + Π[(√(p·a)·s² + √((1-p)(1-a)))/v]·(x_T - √a_T·m) with v = a·s² + 1 - a."""
    m, s = GAUSSIAN.means[0], GAUSSIAN.deviations[0]
    alpha_bar = NoiseSchedule.linear(1000).alpha_bar
    grid = np.append(alpha_bar[np.linspace(999, 0, num_steps).round().astype(int)], 1.0)
    a, p = grid[:-1], grid[1:]
    factors = (np.sqrt(p * a) * s**2 + np.sqrt((1 - p) * (1 - a))) / (a * s**2 + 1 - a)
    expected = m + np.prod(factors) * (X_T - np.sqrt(a[0]) * m)
    np.testing.assert_allclose(solve("ddim", grid, GAUSSIAN.eps, X_T), expected, rtol=0, atol=100 * FLOAT64)


@pytest.mark.parametrize(("eta", "variance"), [(0, 0), (0.25, 0.193), (0.5, 0.396), (0.75, 0.425), (1, 0.405)])
def test_variance_between_runs_from_one_start(eta, variance):
    """Gaussian data, S = 50: exact by the recursion of a linear map, and it is not monotone in eta."""
    alpha_bar = NoiseSchedule.linear(1000).alpha_bar
    weights = SOLVERS["ddim"].weights(np.append(alpha_bar[980::-20], 1.0), SolverOptions(eta=eta))
    between = 0.0
    for e, a in enumerate(weights.level):
        # The step is linear in x: its slope from two points.
        points = np.array([0.0, 1.0])
        eps = GAUSSIAN.eps(points, float(a))
        moved = weights.c_x0[e] * (points - np.sqrt(1 - a) * eps) / np.sqrt(a) + weights.c_eps[e] * eps
        between = (moved[1] - moved[0]) ** 2 * between + weights.sigma[e] ** 2
    assert between == pytest.approx(variance, abs=6e-4)


def test_inversion_undoes_sampling_as_steps_grow():
    errors = []
    for count in (50, 100, 200):
        drawn = solve("ddim", levels(count), MIXTURE.eps, X_T)
        back = solve("ddim_inversion", levels(count)[::-1], MIXTURE.eps, drawn)
        errors.append(np.abs(back - X_T).max())
    assert errors[0] > 1.8 * errors[1] > 3.2 * errors[2]


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "fitted"])  # It has no weights of its own.
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_every_solver_is_exact_where_there_is_nothing_to_predict(name, count):
    """eps = 0: only the signal is rescaled, whatever the rule."""
    grid = levels(count) if name != "ddim_inversion" else levels(count)[::-1]
    ends = solve(name, grid, lambda x, a: np.zeros_like(x), X_T)
    np.testing.assert_allclose(ends, X_T * np.sqrt(grid[-1] / grid[0]), rtol=1e-12)
