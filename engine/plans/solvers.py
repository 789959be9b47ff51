"""Solvers as tables: what each network evaluation of a plan does with the predicted image and noise.

The plan visits noise levels alpha_bar (a now, p next). In x̄ = x/√alpha_bar and s = √((1-alpha_bar)/alpha_bar) the
probability-flow ODE is dx̄/ds = eps, so the classical rules apply as they stand, with h = s_p - s_a < 0:

    ddim            x̄_p = x̄ + h·eps: Euler's rule; with eta > 0 some of the noise is fresh       order 1, S evaluations
    dpm_solver_1    the same table (Lu et al. 2022, arXiv 2206.00927, section 3)                  order 1, S
    heun            x̄_p = x̄ + h·(eps_1 + eps_2)/2, eps_2 where Euler's rule leads                order 2, 2S - 1
    rk4             the classical weights 1/6, 1/3, 1/3, 1/6                                      order 4, 4S - 3
    dpm_solver_2    the midpoint rule, exponential in ln s (algorithm 1 there)                    order 2, 2S - 1
    rules of several steps (skipstep.plans.multistep):
    dpm_solver_pp_2m, _3m  on x0 (Lu et al. 2022, arXiv 2211.01095, algorithm 2; its authors' code)  order 2, 2; S
    unipc_2, unipc_3  on x0, predictor and corrector (Zhao et al. 2023, arXiv 2302.04867)         order 3, 4; S
    deis_2, deis_3  on eps, polynomials in ln s (Zhang & Chen 2022, arXiv 2204.13902)             order 2, 3; S
    lms             on eps, Adams-Bashforth for unequal steps in s                                order 4, S
    ipndm           on eps, with its weights for equal steps (Liu et al. 2022, arXiv 2202.09778)  order 2, S
    and:
    flow_heun       Heun's rule in s of flow matching: the slope is eps - x0                      order 2, 2S - 1
    consistency     x0 and fresh noise (Song et al. 2023, arXiv 2303.01469, algorithm 1)          stochastic, S
    lcm             the same, x0 mixed with the state (arXiv 2310.04378, algorithm 3)             stochastic, S
    ddpm            the posterior mean and a variance (Ho et al. 2020, arXiv 2006.11239, eq. 7)   stochastic, S
    ddim_inversion  Euler's rule from the image up to the noise                                   order 1, S
    fitted          weights that were fitted to a network's own trajectories (skipstep.fitting)   S

A rule of several steps begins at order 1. Where the first steps are as long as the others, their error is of order 2,
whatever the rule; UniPC corrects it. Most rules of order above 1 would need the network at the level without noise, or
have no finite weight for it, so the last step, where p = 1, is Euler's. DDIM's variance (Song, Meng, Ermon 2021, arXiv
2010.02502, eq. 12 and 16; their alpha is our alpha_bar) is sigma² = eta²·(1-p)/(1-a)·(1-a/p).

A solver is a function from levels to `UpdateWeights` in float64, one row per evaluation; the loop and the kernel do
not know its name. To add one, write such a function and enter it in `SOLVERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt

import numpy as np

from skipstep.plans.multistep import deis, dpm_solver_pp, ipndm, lms, unipc
from skipstep.plans.parameterization import flow_scale, flow_time
from skipstep.plans.update_weights import (
    BETWEEN,
    UPDATE_COLUMNS,
    Levels,
    SolverOptions,
    UpdateWeights,
    one_row_per_step,
)

# The columns of a fitted plan's weights. The history is a sum that the next step takes as it is: its weight there is 1.
FITTED_COLUMNS = ("c_x", "c_x0", "m_x", "m_x0", "m_h")


@dataclass(frozen=True, slots=True)
class Solver:
    """A function that makes a table, and its properties.

    takes           the options of a plan that it supports; others are refused.
    sees_clip_in_eps  with clipping, eps is derived again from the clipped image in the diffusers convention too.
    diverges_at_zero  it has no finite weights for a step that starts at alpha_bar = 0.
    upward          it leads from the image to the noise.
    """

    weights: Callable[[Levels, SolverOptions], UpdateWeights]
    takes: frozenset[str] = frozenset()
    sees_clip_in_eps: bool = False
    diverges_at_zero: bool = False
    upward: bool = False


def ddim(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """DDIM over `alpha_bars` float64 `[S+1]`; eta = 0 is deterministic, eta = 1 has DDPM's posterior variance."""
    weights = one_row_per_step(alpha_bars)
    a, p = alpha_bars[:-1], alpha_bars[1:]
    # sigma² and 1-p-sigma² share the factor 1-p; taking it out keeps the second from cancelling, and makes both
    # exactly zero at p = 1, so the last step adds no noise and leaves none.
    share = options.eta**2 * (p - a) / (p * (1.0 - a))
    weights.c_x0 = np.sqrt(p)
    weights.c_eps = np.sqrt((1.0 - p) * np.maximum(1.0 - share, 0.0))
    weights.sigma = np.sqrt((1.0 - p) * share)
    return weights


def ddpm(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """Ancestral sampling: the posterior q(x_p | x_a, x0) of steps of any length; beta is 1 - a/p.

    fixed_small has the posterior's own variance, fixed_large beta (the DDIM paper's sigma-hat), and learned_range lets
    the network interpolate between their logarithms (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15).
    """
    weights = one_row_per_step(alpha_bars)
    a, p = alpha_bars[:-1], alpha_bars[1:]
    beta = (p - a) / p
    posterior = (1.0 - p) / (1.0 - a) * beta
    weights.c_x0 = np.sqrt(p) * beta / (1.0 - a)
    weights.c_x = np.sqrt(a / p) * (1.0 - p) / (1.0 - a)
    adds_noise = p < 1.0
    if options.variance == "fixed_small":
        weights.sigma = np.sqrt(posterior)
    elif options.variance == "fixed_large":
        weights.sigma = np.where(adds_noise, np.sqrt(beta), 0.0)
    else:
        low, high = np.log(np.where(adds_noise, posterior, 1.0)) / 2, np.log(np.where(adds_noise, beta, 1.0)) / 2
        weights.sigma = adds_noise.astype(np.float64)
        weights.log_sigma, weights.log_sigma_out = (high + low) / 2, (high - low) / 2
    return weights


def heun(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """Heun's rule. The history holds x̄ + h/2·eps_1, all that the second evaluation needs of the first."""
    weights = _rows(2, alpha_bars)
    for row, a, p in _steps(weights, alpha_bars):
        _euler(weights, row, p)
        if p == 1.0:
            continue
        h = _ratio(p) - _ratio(a)
        weights.m_x[row], weights.m_eps[row] = sqrt(p / a), sqrt(p) * h / 2
        weights.c_h0[row + 1], weights.c_eps[row + 1] = 1.0, sqrt(p) * h / 2
        weights.level[row + 1], weights.grid[row + 1] = p, weights.grid[row] + 1
    return weights


def rk4(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """The classical Runge-Kutta rule. Slot 0 holds x, from which the inner stages start; slot 1 sums up the result.

    The second evaluation's state is √m·(x̄ + h/2·eps_1): a third of it, rescaled, is eps_1's part and a third of x.
    """
    weights = _rows(4, alpha_bars)
    for row, a, p in _steps(weights, alpha_bars):
        if p == 1.0:
            _euler(weights, row, p)
            continue
        h, grid = _ratio(p) - _ratio(a), weights.grid[row]
        middle = _level(_ratio(a) + h / 2)
        # Each inner stage goes from x along the slope just seen, to where the next evaluation stands.
        weights.c_x[row] = sqrt(middle / a)
        weights.c_h0[row + 1 : row + 4] = sqrt(middle / a), sqrt(p / a), 2 / 3 * sqrt(p / a)
        weights.c_eps[row : row + 3] = sqrt(middle) * h / 2, sqrt(middle) * h / 2, sqrt(p) * h
        weights.level[row + 1 : row + 4] = middle, middle, p
        weights.grid[row + 1 : row + 4] = BETWEEN, BETWEEN, grid + 1
        weights.slot[row + 1 : row + 3] = 1
        weights.m_x[row : row + 2] = 1.0, sqrt(p / middle) / 3
        weights.m_h[row + 2] = 1.0
        weights.m_eps[row + 1 : row + 3] = sqrt(p) * h / 3
        weights.c_h1[row + 3], weights.c_eps[row + 3] = 1.0, sqrt(p) * h / 6
    return weights


def dpm_solver_2(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """DPM-Solver-2, singlestep, with the midpoint in ln s (r = 1/2). The history holds the step's first state."""
    weights = _rows(2, alpha_bars)
    for row, a, p in _steps(weights, alpha_bars):
        if p == 1.0:
            _euler(weights, row, p)
            continue
        middle = _level(sqrt(_ratio(a) * _ratio(p)))
        _euler(weights, row, middle)
        weights.m_x[row] = sqrt(p / a)
        weights.c_h0[row + 1], weights.c_eps[row + 1] = 1.0, sqrt(p) * (_ratio(p) - _ratio(a))
        weights.level[row + 1], weights.grid[row + 1] = middle, BETWEEN
    return weights


def flow_heun(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """Heun's rule for y = (1-s)·x0 + s·eps, dy/ds = eps - x0 (skipstep.plans.parameterization). The history holds y and
    half the step along the first slope."""
    weights = _rows(2, alpha_bars)
    for row, a, p in _steps(weights, alpha_bars):
        _euler(weights, row, p)
        if p == 1.0:
            continue
        ends = np.array([a, p])
        (s, s_p), (scale, scale_p) = flow_time(ends).tolist(), flow_scale(ends).tolist()
        half = (s_p - s) / 2
        weights.m_x[row], weights.m_x0[row], weights.m_eps[row] = scale / scale_p, -half / scale_p, half / scale_p
        weights.c_h0[row + 1], weights.c_x0[row + 1], weights.c_eps[row + 1] = 1.0, -half / scale_p, half / scale_p
        weights.level[row + 1], weights.grid[row + 1] = p, weights.grid[row] + 1
    return weights


def consistency(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """The image that a consistency model predicts, noised anew for the next level."""
    weights = one_row_per_step(alpha_bars)
    weights.c_x0, weights.sigma = np.sqrt(alpha_bars[1:]), np.sqrt(1.0 - alpha_bars[1:])
    return weights


def lcm(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """The image of a consistency model, c_skip·x + c_out·x0, and noise for the next level; sigma_data is 0.5, and the
    time that scales them ten times the timestep, as it was trained."""
    weights, time = consistency(alpha_bars, options), 10.0 * options.timesteps
    weights.c_x = weights.c_x0 * 0.25 / (time**2 + 0.25)
    weights.c_x0 *= time / np.sqrt(time**2 + 0.25)
    return weights


def ddim_inversion(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """DDIM upward in noise, over `alpha_bars` that decrease: the first is the image's."""
    weights = one_row_per_step(alpha_bars)
    a, p = alpha_bars[:-1], alpha_bars[1:]
    weights.c_x = np.sqrt(p / a)
    weights.c_eps = np.sqrt(1.0 - p) - np.sqrt(p / a * (1.0 - a))
    return weights


def fitted(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """Weights float32 `[S, 5]` as they are (FITTED_COLUMNS). The first step has no history, and the last keeps none."""
    assert options.weights is not None, "the plan has checked"
    weights = one_row_per_step(alpha_bars)
    for name, column in zip(FITTED_COLUMNS, options.weights.astype(np.float64).T, strict=True):
        setattr(weights, name, column.copy())
    weights.c_h0[1:] = 1.0
    return weights


def dpm_solver_1(alpha_bars: Levels, options: SolverOptions) -> UpdateWeights:
    """DPM-Solver-1 is deterministic DDIM."""
    return ddim(alpha_bars, SolverOptions())


SOLVERS: Mapping[str, Solver] = {
    "ddim": Solver(ddim, takes=frozenset({"eta", "stride"})),
    "ddpm": Solver(ddpm, takes=frozenset({"variance"})),
    "heun": Solver(heun, sees_clip_in_eps=True, diverges_at_zero=True),
    "rk4": Solver(rk4, takes=frozenset({"midpoints"}), sees_clip_in_eps=True, diverges_at_zero=True),
    "dpm_solver_1": Solver(dpm_solver_1),
    "dpm_solver_2": Solver(dpm_solver_2, takes=frozenset({"midpoints"}), sees_clip_in_eps=True, diverges_at_zero=True),
    "flow_heun": Solver(flow_heun, sees_clip_in_eps=True),
    "consistency": Solver(consistency),
    "lcm": Solver(lcm),
    "dpm_solver_pp_2m": Solver(partial(dpm_solver_pp, order=2)),
    "dpm_solver_pp_3m": Solver(partial(dpm_solver_pp, order=3), diverges_at_zero=True),
    "unipc_2": Solver(partial(unipc, order=2)),
    "unipc_3": Solver(partial(unipc, order=3)),
    "deis_2": Solver(partial(deis, order=2), sees_clip_in_eps=True, diverges_at_zero=True),
    "deis_3": Solver(partial(deis, order=3), sees_clip_in_eps=True, diverges_at_zero=True),
    "ipndm": Solver(ipndm, sees_clip_in_eps=True, diverges_at_zero=True),
    "lms": Solver(lms, sees_clip_in_eps=True, diverges_at_zero=True),
    "fitted": Solver(fitted, takes=frozenset({"weights", "fit"})),
    "ddim_inversion": Solver(ddim_inversion, takes=frozenset({"evaluate_at"}), diverges_at_zero=True, upward=True),
}


def one_step_at_a_time(solver: Solver, starts: Levels, ends: Levels, options: SolverOptions) -> UpdateWeights:
    """Each step on its own, from `starts` to `ends` `[S]`, for a solver of one evaluation a step: a step need not begin
    at the level where the one before ended."""
    weights = one_row_per_step(np.append(starts, ends[-1:]))
    for row, pair in enumerate(zip(starts, ends, strict=True)):
        alone = solver.weights(np.array(pair), options)
        for name in UPDATE_COLUMNS:
            getattr(weights, name)[row] = getattr(alone, name)[0]
    return weights


def _ratio(alpha_bar: float) -> float:
    """s, noise to signal."""
    return sqrt((1.0 - alpha_bar) / alpha_bar)


def _level(ratio: float) -> float:
    """The alpha_bar at which noise to signal is `ratio`."""
    return 1.0 / (1.0 + ratio**2)


def _rows(evaluations: int, alpha_bars: Levels) -> UpdateWeights:
    """`evaluations` rows a step, and one for a last step that lands at 1; all at the level where their step starts."""
    counts = [evaluations] * (len(alpha_bars) - 2) + [1 if alpha_bars[-1] == 1.0 else evaluations]
    steps = np.repeat(np.arange(len(counts)), counts)
    return UpdateWeights(alpha_bars[steps], steps, np.append(np.diff(steps) > 0, True))


def _steps(weights: UpdateWeights, alpha_bars: Levels) -> list[tuple[int, float, float]]:
    """(first row, a, p) of each step."""
    firsts = np.searchsorted(weights.grid, np.arange(len(alpha_bars) - 1))
    return [(int(row), float(alpha_bars[i]), float(alpha_bars[i + 1])) for i, row in enumerate(firsts)]


def _euler(weights: UpdateWeights, row: int, p: float) -> None:
    weights.c_x0[row], weights.c_eps[row] = sqrt(p), sqrt(1.0 - p)
