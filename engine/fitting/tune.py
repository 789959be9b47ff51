"""Tuning an engine: plans of few evaluations, fitted to its network, and how good they are on noises held out.

A function over an engine, which is a method of `skipstep.Engine`.

    trajectories of the training noises -> timesteps by dynamic programming -> weights by least squares
        -> timesteps moved on the grid while that helps -> drawn for other noises, beside textbook solvers
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, Unpack

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.plan_set import PlanSet
from skipstep.calls.request import MAX_SEED, Conditions
from skipstep.calls.trajectory import Progress
from skipstep.errors import InputError, PlanError, check_callable, check_integer, check_items, check_number
from skipstep.fitting.reference import Denoiser, Reference, conditions_of, grid_of, integrate, network_options
from skipstep.fitting.timesteps import EXPONENTS, choose_nodes, growth, step_errors
from skipstep.fitting.weights import WeightFit, rmse
from skipstep.latency.table import format_table
from skipstep.loops.contract import Array, Sampler
from skipstep.plans.fit import Fit
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages
from skipstep.reporting import LOGGER

Features = Callable[[Array], NDArray[Any]]
# How far a node is moved, in places of the grid.
_MOVES: Final = (-3, -1, 1, 3)
# Trajectories that decide between plans; all of them fit the one that is chosen.
_DECIDING: Final = 16
_FEWEST_NOISES: Final = 8
# A grid of twice as many nodes may end no further away, as a share of the images' own spread.
_CONVERGED: Final = 0.05
_TEXTBOOK: Final = ("ddim", "dpm_solver_pp_2m")
_OBJECTIVE: Final = "mean squared distance to the states of converged trajectories, step by step"


class FittableEngine(Sampler, Protocol):
    """An engine that says which network it holds."""

    plans: PlanSet


@dataclass(frozen=True, slots=True)
class TunedPlan:
    """What was found for one number of steps.

    `rmse` by the name of the solver, "fitted" among them, on noises held out; `distance` likewise, where features were
    given. `plan` is the one that is offered: the fitted plan where it is nearer to the converged images and no further
    from them in distribution, else the best textbook plan.
    """

    steps: int
    plan: Plan
    fitted: Plan
    rmse: Mapping[str, float]
    distance: Mapping[str, float]
    seconds: float

    @property
    def offered(self) -> bool:
        """Whether the fitted plan is the one that is offered."""
        return self.plan.key == self.fitted.key


@dataclass(frozen=True, slots=True)
class TuneReport:
    """The plans by steps, and how far trajectories over half as many nodes end from the converged ones."""

    found: tuple[TunedPlan, ...]
    guidance_scale: float
    noises: int
    held_out: int
    convergence: float

    @property
    def plans(self) -> list[Plan]:
        """The plans that are offered, one for each number of steps."""
        return [each.plan for each in self.found]

    def __str__(self) -> str:
        names = list(self.found[0].rmse)
        distances = list(self.found[0].distance)
        header = ("steps", *(f"{name}, RMSE" for name in names), *(f"{name}, distance" for name in distances))
        rows = [
            (
                str(each.steps),
                *(f"{each.rmse[name]:.4f}" for name in names),
                *(f"{each.distance[name]:.3g}" for name in distances),
                "fitted" if each.offered else each.plan.solver,
                f"{each.seconds:.0f}",
            )
            for each in self.found
        ]
        note = (
            f"RMSE to the converged images of {self.held_out} noises that the fit did not see, at guidance scale "
            f"{self.guidance_scale:g}; these are converged to {self.convergence:.4f}."
        )
        return f"{format_table((*header, 'offered', 'seconds'), rows)}\n{note}"


def tune(
    engine: FittableEngine,
    *,
    steps: Iterable[int] = (4, 6, 8),
    noises: int = 64,
    held_out: int = 64,
    seed: int = 1 << 32,
    nodes: int = 56,
    rounds: int = 2,
    features: Features | None = None,
    progress: Progress | None = None,
    **conditions: Unpack[Conditions],
) -> TuneReport:
    """Fit a plan for each number of `steps` to this engine's network (skipstep.fitting), and compare it.

    noises          trajectories to fit to, of the seeds `seed`, seed + 1, …; the noises held out follow them.
    nodes           timesteps of a trajectory. The report says how far twice as many are.
    rounds          of moving each timestep; 0 keeps those of the dynamic programme.
    features        images `[N, C, H, W]` to features `[N, F]`, for a Fréchet distance to the converged images: a plan
                    is then offered only if it is no further than the best textbook plan. It takes F below the noises.
    progress        called as progress(done, total), in units of about equal time.
    conditions      as for `sample`, one for each noise or one for all; without class_labels each class in turn.
                    guidance_scale is one number, that of the product: a plan is for scales near it.

    The same arguments find the same plans. Nothing is added to the engine: call add_plan with what the report offers.
    Raises InputError, PlanError for a network whose trajectories do not converge, and NonFiniteError.
    """
    counts = _checked_steps(engine, steps)
    noises = check_integer("noises", noises, low=_FEWEST_NOISES, high=1 << 16, remedy="pass 64: fewer fit the noises")
    held_out = check_integer("held_out", held_out, low=_FEWEST_NOISES, high=1 << 16)
    seed = check_integer("seed", seed, low=0, high=MAX_SEED - noises - held_out)
    nodes = check_integer("nodes", nodes, low=max(8, 2 * max(counts)), high=1 << 12)
    rounds = check_integer("rounds", rounds, low=0, high=1 << 10)
    given = conditions.get("guidance_scale")
    guidance_scale = 1.0 if given is None else check_number("guidance_scale", given)
    check_callable("features", features, "images")
    check_callable("progress", progress, "done, total")
    engine.runner.check()

    def denoiser(first: int, count: int) -> Denoiser:
        seeds = np.arange(seed + first, seed + first + count, dtype=np.uint64)
        return Denoiser.of(engine, seeds, **conditions_of(engine.network, count, conditions))

    training, other = denoiser(0, noises), denoiser(noises, held_out)
    report = _Counter(progress, 3 * nodes + len(counts) * nodes)
    grid = grid_of(training.schedule, nodes)
    LOGGER.info("trajectories of %d noises over %d timesteps", noises, len(grid))
    reference = integrate(training, grid, progress=report)
    converged = integrate(training.few(_FEWEST_NOISES), grid_of(training.schedule, 2 * nodes))
    convergence = rmse(converged.ends, reference.ends[:_FEWEST_NOISES])
    if not convergence <= _CONVERGED * float(np.std(converged.ends)):
        raise PlanError(
            got=f"trajectories that end {convergence:.3g} apart over {len(grid)} and {len(converged.nodes)} timesteps",
            expected=f"at most {_CONVERGED:.0%} of the images' spread, {np.std(converged.ends):.3g}",
            remedy=f"pass nodes={2 * nodes}, or check prediction_type and schedule",
        )
    LOGGER.info("trajectories of %d noises held out", held_out)
    unseen = integrate(other, grid, progress=report)
    first, later = step_errors(reference)
    factor = growth(reference, np.array([training.level(t) for t in grid]))
    search = WeightFit(training.few(min(_DECIDING, noises)), reference.few(min(_DECIDING, noises)))
    found = []
    for count in counts:
        started = time.perf_counter()
        starts = {choose_nodes(first * factor**p, later * factor**p, count) for p in EXPONENTS}
        chosen = min(sorted(starts), key=lambda each: search.fit(each)[1])
        chosen = _moved(search, chosen, len(grid), rounds)
        weights, _ = WeightFit(training, reference).fit(chosen)
        fitted = _fitted_plan(engine, grid, chosen, weights, guidance_scale, noises, seed)
        found.append(_compared(fitted, other, unseen, features, started))
        LOGGER.info("%d steps: %s", count, found[-1].rmse)
        report(nodes)
    report.finish()
    return TuneReport(tuple(found), guidance_scale, noises, held_out, convergence)


def _moved(search: WeightFit, nodes: tuple[int, ...], count: int, rounds: int) -> tuple[int, ...]:
    """Each node but the first in turn moved along the grid, while that brings the end nearer."""
    best = search.fit(nodes)[1]
    for _ in range(rounds):
        before = nodes
        for place in range(1, len(nodes)):
            low = nodes[place - 1]
            high = nodes[place + 1] if place + 1 < len(nodes) else count
            for move in _MOVES:
                moved = nodes[place] + move
                if not low < moved < high:
                    continue
                candidate = (*nodes[:place], moved, *nodes[place + 1 :])
                error = search.fit(candidate)[1]
                if error < best:
                    nodes, best = candidate, error
                    break
        if nodes == before:
            break
    return nodes


def _fitted_plan(
    engine: FittableEngine,
    grid: Sequence[int],
    nodes: Sequence[int],
    weights: NDArray[np.float32],
    guidance_scale: float,
    noises: int,
    seed: int,
) -> Plan:
    fit = Fit(engine.plans.network_digest, guidance_scale, noises, seed, _OBJECTIVE)
    timesteps = [grid[node] for node in nodes]
    return Plan(**network_options(engine), timesteps=timesteps, solver="fitted", weights=weights.tolist(), fit=fit)


def _compared(
    fitted: Plan, denoiser: Denoiser, unseen: Reference, features: Features | None, started: float
) -> TunedPlan:
    candidates = {"fitted": fitted}
    for solver in _TEXTBOOK:
        candidates[solver] = Plan(**denoiser.options, steps=len(fitted.timesteps), spacing="trailing", solver=solver)
    request = replace(denoiser.request, x_T=denoiser.noise)
    drawn = {name: denoiser.engine.runner.run(Stages.of([plan]), request) for name, plan in candidates.items()}
    errors = {name: rmse(images, unseen.ends) for name, images in drawn.items()}
    distances: dict[str, float] = {}
    if features is not None:
        wanted = np.asarray(features(unseen.ends), np.float64)
        distances = {name: frechet(np.asarray(features(x), np.float64), wanted) for name, x in drawn.items()}
    best = min(_TEXTBOOK, key=lambda name: errors[name])
    offered = errors["fitted"] < errors[best] and not distances.get("fitted", 0.0) > distances.get(best, 0.0)
    assert isinstance(fitted.fit, Fit), "it was made with one"
    fit = replace(fitted.fit, rmse=errors["fitted"], textbook_rmse=errors[best])
    fitted = replace(fitted, steps=None, fit=fit)
    plan = fitted if offered else candidates[best]
    seconds = time.perf_counter() - started
    return TunedPlan(len(fitted.timesteps), plan, fitted, errors, distances, seconds)


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The Fréchet distance of normal distributions with the means and covariances of features `[N, F]` (Heusel et al.
    2017, arXiv 1706.08500). Raises InputError for fewer samples than features."""
    if a.ndim != 2 or a.shape != b.shape or len(a) <= a.shape[1]:
        raise InputError(
            got=f"features {list(a.shape)} and {list(b.shape)}",
            expected="[N, F] of both, with more samples N than features F",
            remedy="raise held_out, or pass features of fewer dimensions",
        )
    of_a, of_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    # tr √(AB) is the sum of the singular values of √A·√B.
    values = np.linalg.svd(_root(of_a) @ _root(of_b), compute_uv=False)
    distance = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.trace(of_a) + np.trace(of_b) - 2.0 * values.sum()
    return float(max(distance, 0.0))


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root


def _checked_steps(engine: FittableEngine, steps: Iterable[int]) -> list[int]:
    remedy = "pass steps=[4, 6, 8]"
    given = check_items("steps", steps, expected="numbers of steps", remedy=remedy)
    most = network_options(engine)["schedule"].num_timesteps
    counts = sorted({check_integer("steps", each, low=1, high=min(64, most), remedy=remedy) for each in given})
    if not counts:
        raise InputError(got="steps=[]", expected="at least one", remedy=remedy)
    return counts


class _Counter:
    """Progress in units of about equal time; at the end all of them are done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, units: int = 1) -> None:
        self._done = min(self._total, self._done + units)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        self(self._total)
