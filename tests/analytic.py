"""Data whose noise prediction is known in closed form, and a solver's table walked in float64.

For a mixture of normals N(m_k, s_k²) with weights w_k, x_t is a mixture of N(√a·m_k, v_k), v_k = a·s_k² + 1 - a, and

    eps(x, a) = √(1-a)·Σ_k r_k(x)·(x - √a·m_k)/v_k          r_k: the posterior share of component k
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.special import softmax

from skipstep.kernels.layout import NUM_SLOTS
from skipstep.plans.solvers import SOLVERS
from skipstep.plans.update_weights import SolverOptions, UpdateWeights

Eps = Callable[[NDArray[np.float64], float], NDArray[np.float64]]


@dataclass(frozen=True)
class Mixture:
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    weights: tuple[float, ...]

    def eps(self, x: NDArray[np.float64], a: float) -> NDArray[np.float64]:
        m, s, w = (np.array(values)[:, None] for values in (self.means, self.deviations, self.weights))
        v = a * s**2 + 1 - a
        distance = x[None] - np.sqrt(a) * m
        shares = softmax(np.log(w) - 0.5 * np.log(v) - distance**2 / (2 * v), axis=0)
        return np.sqrt(1 - a) * np.sum(shares * distance / v, axis=0)

    def exact_ode(self, x: NDArray[np.float64], *, a: float, p: float) -> NDArray[np.float64]:
        """The probability-flow ODE from level a to level p: dx/dλ = ½[(1-a)·x - √(1-a)·eps], λ = ln(a/(1-a))."""

        def slope(lam: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
            level = 1 / (1 + np.exp(-lam))
            return 0.5 * ((1 - level) * state - np.sqrt(1 - level) * self.eps(state, level))

        start, end = np.log(a / (1 - a)), np.log(p / (1 - p))
        solution = solve_ivp(slope, (start, end), x, method="DOP853", rtol=1e-12, atol=1e-13)
        assert solution.success
        return np.asarray(solution.y[:, -1])


GAUSSIAN = Mixture((0.3,), (0.7,), (1.0,))
MIXTURE = Mixture((-1.2, 0.3, 1.5), (0.3, 0.5, 0.2), (0.3, 0.5, 0.2))


def walk_table(
    weights: UpdateWeights,
    eps_of: Eps,
    x: NDArray[np.float64],
    *,
    noise: Callable[[int], NDArray[np.float64]] | None = None,
) -> NDArray[np.float64]:
    """The equations of skipstep.kernels.layout in float64, without clipping."""
    history = [np.full_like(x, np.nan)] * NUM_SLOTS
    for e, a in enumerate(weights.level):
        eps = eps_of(x, float(a))
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        terms = [(weights.c_x[e], x), (weights.c_x0[e], x0), (weights.c_eps[e], eps)]
        terms += zip((weights.c_h0[e], weights.c_h1[e], weights.c_h2[e]), history, strict=True)
        if noise is not None:
            terms.append((weights.sigma[e], noise(e)))
        x_next = sum(weight * value for weight, value in terms if weight != 0.0)
        slot = int(weights.slot[e])
        kept = [(weights.m_x[e], x), (weights.m_x0[e], x0), (weights.m_eps[e], eps), (weights.m_h[e], history[slot])]
        if any(weight != 0.0 for weight, _ in kept):
            history[slot] = sum(weight * value for weight, value in kept if weight != 0.0)
        x = x_next
    return x


def solve(
    solver: str, alpha_bars: NDArray[np.float64], eps_of: Eps, x: NDArray[np.float64], **options: object
) -> NDArray[np.float64]:
    return walk_table(SOLVERS[solver].weights(alpha_bars, SolverOptions(**options)), eps_of, x)


def levels(num_steps: int, *, a: float = 0.01, p: float = 0.99) -> NDArray[np.float64]:
    """`num_steps` + 1 levels between two that are neither pure noise nor pure image, evenly in λ."""
    lam = np.linspace(np.log(a / (1 - a)), np.log(p / (1 - p)), num_steps + 1)
    return 1 / (1 + np.exp(-lam))
