"""Multistep solvers: one evaluation a step, and the next state from what this and earlier evaluations predicted.

A step from a to p reads what evaluation i and up to three before it predicted, m_i, m_{i-1}, …: eps or x0. In the
variables of skipstep.plans.solvers, s = √((1-alpha_bar)/alpha_bar) and lambda = -ln s, with h = lambda_p - lambda_a:

    on eps      x_p/√p = x/√a + Σ_j w_j·m_{i-j}                 Σ_j w_j = s_p - s_a
    on x0       x_p = √((1-p)/(1-a))·x + √p·Σ_j w_j·m_{i-j}     Σ_j w_j = 1 - exp(-h)

For lms and deis w_j = ∫ L_j ds from s_a to s_p, exactly: L_j are the Lagrange polynomials through the levels of
evaluations i, i-1, …, in s for lms and in ln s for deis. Past predictions are kept in the history slots as a ring:
evaluation i writes slot i mod k, where k is how many a step reads. A step that reads k of them reads the slot that it
overwrites.

A rule begins at order 1 and gains one with each step. A last step that lands at p = 1 is Euler's, as for other solvers,
so the result is a predicted image, clipped if the plan clips. Schedulers of diffusers end so with final_sigmas_type
"zero" and lower_order_final, where they have these options; its LMS and iPNDM keep their order. The step before the
last is of order 2 at most where diffusers' is. A plan that ends above the level without noise keeps its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, expm1, factorial, sqrt
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from skipstep.kernels.layout import NUM_SLOTS
from skipstep.plans.update_weights import Levels, SolverOptions, UpdateWeights, one_row_per_step

# Below as many steps the step before the last is of order 2 at most, as in diffusers.
_FEW_STEPS: Final = 15
# What UniPC takes for 0 in a schedule with zero terminal SNR, as in diffusers.
_LEAST_ALPHA_BAR: Final = 2.0**-24
_ADAMS_BASHFORTH: Final = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)

# From the places of evaluations i, i-1, … and of the next level to the weights of their predictions.
Rule = Callable[[NDArray[np.float64], float], NDArray[np.float64]]


def lms(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """Adams-Bashforth of order 4 for unequal steps in s (k-diffusion's and diffusers' LMS)."""
    return _on_eps(alpha_bars, _lms_weights, order=4)


def ipndm(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """Adams-Bashforth of order 4 with the weights for equal steps in s, whatever the steps are (Liu et al. 2022, arXiv
    2202.09778; Zhang & Chen 2022, arXiv 2204.13902, appendix H)."""
    return _on_eps(alpha_bars, _ipndm_weights, order=4)


def deis(alpha_bars: Levels, options: SolverOptions, *, order: int) -> UpdateWeights:
    """tAB-DEIS with polynomials in ln s (Zhang & Chen 2022, arXiv 2204.13902)."""
    return _on_eps(alpha_bars, _deis_weights, order=order, falling=True)


def dpm_solver_pp(alpha_bars: Levels, options: SolverOptions, *, order: int) -> UpdateWeights:
    """DPM-Solver++(2M) and (3M): the polynomial through the last two or three predicted images (arXiv 2211.01095,
    algorithm 2, and its authors' code).

    The third order's last term is half of what Taylor's formula gives, there and in diffusers, and so it is here.
    """
    weights = one_row_per_step(alpha_bars)
    a, p = alpha_bars[:-1], alpha_bars[1:]
    weights.c_x = np.sqrt((1.0 - p) / (1.0 - a))
    now = np.sqrt(p) - np.sqrt(a) * weights.c_x
    weights.c_x0 = now.copy()
    lam, past = _log_snr(alpha_bars), []
    for i, q in enumerate(_orders(order, alpha_bars, falling=True)):
        h, earlier = lam[i + 1] - lam[i], np.diff(lam[max(i - q + 1, 0) : i + 1])[::-1]
        values = [-now[i] * 0.0]  # Minus zero: the keys of plans began with it.
        if q == 2:
            values = [-now[i] * (h / earlier[0] / 2)]
        elif q == 3:
            r0, r1 = earlier / h
            phi_2 = expm1(-h) / h + 1.0
            phi_3 = phi_2 / h - 0.5
            # Of (m_i - m_{i-1})/r0 and (m_{i-1} - m_{i-2})/r1.
            near = sqrt(p[i]) * (phi_2 * (1.0 + r0 / (r0 + r1)) - phi_3 / (r0 + r1)) / r0
            far = sqrt(p[i]) * (phi_3 / (r0 + r1) - phi_2 * r0 / (r0 + r1)) / r1
            values = [far - near, -far]
        weights.c_x0[i] -= sum(values)
        past.append(values)
    return _with_ring(weights, past, "x0")


def unipc(alpha_bars: Levels, options: SolverOptions, *, order: int) -> UpdateWeights:
    """UniPC with B(h) = exp(h) - 1 on x0 (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2; "bh2" in diffusers).

    The state that the network reads is the predicted one. The corrected state starts from the same multiple of the
    corrected state before, so it is the predicted one and a sum of predictions: a row corrects, then predicts.
    """
    weights = one_row_per_step(alpha_bars)
    if alpha_bars[0] == 0.0:
        alpha_bars = np.append(min(_LEAST_ALPHA_BAR, alpha_bars[1] / 4), alpha_bars[1:])
    weights.c_x = np.sqrt((1.0 - alpha_bars[1:]) / (1.0 - alpha_bars[:-1]))
    lam, past = _log_snr(alpha_bars), []
    orders = _orders(order, alpha_bars, falling=True, always=True)
    for i, q in enumerate(orders):
        total = np.zeros(NUM_SLOTS + 1)  # Of m_i, m_{i-1}, …
        if i > 0:
            before = orders[i - 1]
            nodes = lam[i - before : i][::-1]
            # Both lead from i-1 to i; the corrector has m_i as well.
            corrected = _unipc_weights(np.append(nodes, lam[i]), lam[i])
            total[0] += corrected[-1]
            total[1 : before + 1] += corrected[:-1] - _unipc_weights(nodes, lam[i])
            total *= sqrt(alpha_bars[i]) * weights.c_x[i]
        total[:q] += sqrt(alpha_bars[i + 1]) * _unipc_weights(lam[i - q + 1 : i + 1][::-1], lam[i + 1])
        weights.c_x0[i] = total[0]
        past.append(np.trim_zeros(total[1:], "b").tolist())
    return _with_ring(weights, past, "x0")


def _unipc_weights(nodes: Levels, end: float) -> NDArray[np.float64]:
    """The weights of predictions at the `nodes` in lambda, of which the first is where the step starts."""
    h, others = end - nodes[0], nodes[1:]
    weights = np.append(-expm1(-h), np.zeros(len(others)))
    if len(others) == 0:
        return weights
    ratios = (others - nodes[0]) / h
    shares = np.array([0.5])  # The paper's choice for one difference; it keeps the order.
    if len(others) > 1:
        phi, known = expm1(-h) / -h - 1.0, []
        for n in range(len(others)):
            known.append(phi * factorial(n + 1) / expm1(-h))
            phi = phi / -h - 1.0 / factorial(n + 2)
        shares = np.linalg.solve(np.vander(ratios, increasing=True).T, known)
    weights[1:] = -expm1(-h) * shares / ratios
    weights[0] -= weights[1:].sum()
    return weights


def _lms_weights(nodes: Levels, end: float) -> NDArray[np.float64]:
    h = end - nodes[0]
    return _exact_for_powers((nodes - nodes[0]) / h, [h / (n + 1) for n in range(len(nodes))])


def _ipndm_weights(nodes: Levels, end: float) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = (end - nodes[0]) * np.array(_ADAMS_BASHFORTH[len(nodes) - 1])
    return weights


def _deis_weights(nodes: Levels, end: float) -> NDArray[np.float64]:
    """With v = ln(s/s_a)/u and u = ln(s_p/s_a): ∫ v^n ds = s_a·u·∫ v^n·exp(u·v) dv from 0 to 1."""
    u = np.log(end / nodes[0])
    integrals = [nodes[0] * u * _exponential_moment(n, u) for n in range(len(nodes))]
    return _exact_for_powers(np.log(nodes / nodes[0]) / u, integrals)


def _exponential_moment(n: int, u: float) -> float:
    """∫ v^n·exp(u·v) dv from 0 to 1."""
    if abs(u) < 1.0:
        return sum(u**k / (factorial(k) * (n + k + 1)) for k in range(20))
    moment = expm1(u) / u
    for m in range(1, n + 1):
        moment = (exp(u) - m * moment) / u
    return moment


def _exact_for_powers(nodes: Levels, integrals: Sequence[float]) -> NDArray[np.float64]:
    """Weights w with Σ_j w_j·v_j^n = integrals[n] for every n: the integrals of the Lagrange polynomials."""
    weights: NDArray[np.float64] = np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(integrals))
    return weights


def _on_eps(alpha_bars: Levels, rule: Rule, *, order: int, falling: bool = False) -> UpdateWeights:
    """x/√a is x0 + s_a·eps, so the next state is √p·(x0 + (s_a + w_0)·eps + …): like DDIM's, without 1/√a."""
    weights = one_row_per_step(alpha_bars)
    s, past = np.sqrt((1.0 - alpha_bars) / alpha_bars), []
    weights.c_x0 = np.sqrt(alpha_bars[1:])
    for i, q in enumerate(_orders(order, alpha_bars, falling=falling)):
        found = rule(s[i - q + 1 : i + 1][::-1], float(s[i + 1])) if q > 1 else s[i + 1 : i + 2] - s[i]
        weights.c_eps[i] = sqrt(alpha_bars[i + 1]) * (s[i] + found[0])
        past.append((sqrt(alpha_bars[i + 1]) * found[1:]).tolist())
    return _with_ring(weights, past, "eps")


def _log_snr(alpha_bars: Levels) -> Levels:
    """lambda, infinite at 1."""
    with np.errstate(divide="ignore"):
        lam: Levels = (np.log(alpha_bars) - np.log1p(-np.minimum(alpha_bars, np.nextafter(1.0, 0.0)))) / 2
    lam[alpha_bars == 1.0] = np.inf
    return lam


def _orders(most: int, alpha_bars: Levels, *, falling: bool, always: bool = False) -> list[int]:
    """The order of each step. Where the last lands at 1 it is 1; `falling`: 2 at most just before, `always` or where
    steps are few."""
    steps = len(alpha_bars) - 1
    orders = [min(most, i + 1) for i in range(steps)]
    if alpha_bars[-1] == 1.0:
        orders[-1] = 1
        if falling and steps > 1 and (always or steps < _FEW_STEPS):
            orders[-2] = min(orders[-2], 2)
    return orders


def _with_ring(weights: UpdateWeights, past: Sequence[Sequence[float]], kept: Literal["x0", "eps"]) -> UpdateWeights:
    """Enter the weights of what earlier evaluations kept: `past[i]` of evaluations i-1, i-2, …"""
    num_slots = max(map(len, past))
    for row, values in enumerate(past):
        for back, value in enumerate(values, start=1):
            slot = (row - back) % num_slots
            getattr(weights, f"c_h{slot}")[row] = value
            if value == 0.0:
                continue
            getattr(weights, f"m_{kept}")[row - back] = 1.0
            weights.slot[row - back] = slot
    return weights
