"""Solvers against distributions whose noise prediction, and whose ODE, is known."""

from __future__ import annotations

import numpy as np
import pytest
from analytic import GAUSSIAN, MIXTURE, levels, solve
from tolerances import FLOAT64

from skipstep import NoiseSchedule
from skipstep.plans.solvers import SOLVERS
from skipstep.plans.update_weights import SolverOptions

X_T = np.linspace(-2.5, 2.5, 41)
# UniPC's corrector adds one to the predictor's order. A multistep rule begins at order 1, which leaves order 2.
ORDERS = {
    **dict.fromkeys(("ddim", "dpm_solver_1"), 1),
    **dict.fromkeys(
        ("heun", "flow_heun", "dpm_solver_2", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "deis_2", "deis_3", "ipndm"), 2
    ),
    "unipc_2": 3,
    "unipc_3": 4,
    "rk4": 4,
}
# Of the rule itself, where the first steps are so short that they do not count. The third order of DPM-Solver++ has
# half of Taylor's last term, and iPNDM the weights of equal steps.
RULES = {
    **dict.fromkeys(("dpm_solver_pp_2m", "dpm_solver_pp_3m", "deis_2", "ipndm"), 2),
    "unipc_2": 3,
    "unipc_3": 4,
    "deis_3": 3,
    "lms": 4,
}
LARGEST_ERROR = {1: 0.05, 2: 1e-3, 3: 1e-4, 4: 1e-5}


def slopes(solver, grid, counts):
    """The measured orders from each count of steps to the next, and the error at the first."""
    a, p = grid(1)
    exact = MIXTURE.exact_ode(X_T, a=a, p=p)
    errors = [np.abs(solve(solver, grid(count), MIXTURE.eps, X_T) - exact).max() for count in counts]
    return np.log2(np.array(errors[:-1]) / errors[1:]), errors[0]


def short_first_steps(num_steps):
    """Levels from which λ grows as a square: the first step is by the square of the others' shorter."""
    (start, end), share = np.log(1 / (1 / levels(1) - 1)), np.linspace(0, 1, num_steps + 1)
    return 1 / (1 + np.exp(-(start + (end - start) * share**2)))


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver):
    """Halving the step divides the error by 2^order, against the exact solution of the ODE."""
    measured, first = slopes(solver, levels, [160, 320, 640])
    assert measured == pytest.approx(ORDERS[solver], abs=0.15)
    assert first < LARGEST_ERROR[ORDERS[solver]]


@pytest.mark.parametrize("solver", RULES)
def test_order_of_a_multistep_rule(solver):
    """A rule begins at order 1; where that step is short, what is left is the order of the rule itself."""
    measured, first = slopes(solver, short_first_steps, [160, 320, 640])
    assert measured == pytest.approx(RULES[solver], abs=0.1)
    assert first < LARGEST_ERROR[RULES[solver]]


def test_over_equal_steps_the_first_step_of_lms_is_what_remains():
    measured, _ = slopes("lms", levels, [40, 160, 640, 1280])
    assert measured[0] / 2 > 3.0
    assert measured[-1] == pytest.approx(2.0, abs=0.1)


def test_ipndm_is_lms_over_equal_steps_of_noise_to_signal():
    s = np.linspace(10.0, 0.1, 12)
    ours, theirs = (SOLVERS[name].weights(1 / (1 + s**2), SolverOptions()) for name in ("ipndm", "lms"))
    for column in ("c_x0", "c_eps", "c_h0", "c_h1", "c_h2"):
        np.testing.assert_allclose(getattr(ours, column), getattr(theirs, column), atol=1e-11)
    assert np.all(ours.c_h2[3:-1] != 0.0)


@pytest.mark.parametrize(("solver", "degree"), [("lms", 3), ("deis_2", 1), ("deis_3", 2)])
@pytest.mark.parametrize("ratio", [0.999, 0.7, 0.2])
def test_rules_on_eps_are_exact_for_their_polynomials(solver, degree, ratio):
    """eps = v^k, in v = s for lms and v = ln s for deis: the last of five steps is the integral itself."""
    s = 3.0 * ratio ** np.arange(6)
    weights = SOLVERS[solver].weights(1 / (1 + s**2), SolverOptions())
    p, k = 1 / (1 + s[-1] ** 2), np.arange(degree + 1)
    now = weights.c_eps[4] / np.sqrt(p) - s[4]
    slots = [(weights.c_h0, weights.c_h1, weights.c_h2)[j % degree][4] / np.sqrt(p) for j in (3, 2, 1)[:degree]]
    variable = np.array if solver == "lms" else np.log
    rule = np.array([now, *slots]) @ variable(s[[4, 3, 2, 1]])[: degree + 1, None] ** k
    places, shares = np.polynomial.legendre.leggauss(60)
    half = (s[5] - s[4]) / 2
    exact = half * shares @ variable(s[4] + half * (1 + places))[:, None] ** k
    np.testing.assert_allclose(rule, exact, rtol=1e-8)


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


# A fitted plan has no weights of its own, and a consistency model mixes the state into its image.
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("fitted", "lcm")])
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_every_solver_is_exact_where_there_is_nothing_to_predict(name, count):
    """eps = 0: only the signal is rescaled, whatever the rule."""
    grid = levels(count) if name != "ddim_inversion" else levels(count)[::-1]
    ends = solve(name, grid, lambda x, a: np.zeros_like(x), X_T)
    np.testing.assert_allclose(ends, X_T * np.sqrt(grid[-1] / grid[0]), rtol=1e-12)
