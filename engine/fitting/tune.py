"""Tuning an engine: plans of few evaluations, fitted to its network, and how good they are on noises held out.

A function over an engine, which is a method of `skipstep.Engine`.

    trajectories of the training noises -> timesteps by dynamic programming -> weights by least squares
        -> timesteps moved on the grid while that helps -> drawn for other noises, beside textbook solvers
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final, Protocol, Unpack

import numpy as np

from skipstep.arrays import number_array
from skipstep.backends.denoiser import Keep
from skipstep.calls.inputs import Prompted
from skipstep.calls.plan_set import PlanSet
from skipstep.calls.request import MAX_SEED
from skipstep.calls.trajectory import Progress
from skipstep.errors import InputError, PlanError, check_callable, check_integer, check_items, shown
from skipstep.fitting.reference import Denoiser, conditions_of, grid_of, integrate, network_options
from skipstep.fitting.report import Features, HeldOut, TuneReport
from skipstep.fitting.resume import KeptParts
from skipstep.fitting.timesteps import EXPONENTS, choose_nodes, growth, step_errors
from skipstep.fitting.weights import WeightFit, rmse
from skipstep.loops.contract import Sampler
from skipstep.plans.fit import Fit
from skipstep.plans.plan import Plan
from skipstep.reporting import LOGGER

# How far a node is moved, in places of the grid.
_MOVES: Final = (-3, -1, 1, 3)
# Trajectories that decide between plans; all of them fit the one that is chosen.
_DECIDING: Final = 16
_FEWEST_NOISES: Final = 8
# A grid of twice as many nodes may end no further away, as a share of the images' own spread.
_CONVERGED: Final = 0.05
_OBJECTIVE: Final = "mean squared distance to the states of converged trajectories, step by step"


class FittableEngine(Sampler, Protocol):
    """An engine that says which network it holds, and how it runs it."""

    plans: PlanSet
    backend: str
    precision: str


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
    keep: Keep | None = None,
    **conditions: Unpack[Prompted],
) -> TuneReport:
    """Fit a plan for each number of `steps` to this engine's network (skipstep.fitting), and compare it.

    noises          trajectories to fit to, of the seeds `seed`, seed + 1, …; the noises held out follow them.
    nodes           timesteps of a trajectory. The report says how far twice as many are.
    rounds          of moving each timestep; 0 keeps those of the dynamic programme.
    features        samples `[N, …]` to features `[N, F]`, for a Fréchet distance to the converged images: a plan
                    is then offered only if it is no further than the best textbook plan. It takes F below `held_out`.
                    Where it returns the classes that it sees too, `[N]`, the report says how many are those asked for.
                    skipstep.fitting.judge.OnnxJudge makes one of an ONNX file.
    progress        called as progress(done, total), in units of about equal time.
    keep            where what was computed is kept, such as skipstep.bundles.kept.CacheSlot: an interrupted call goes
                    on where it was. It takes a network whose digest is known.
    conditions      as for `sample`, one for each noise or one for all; without class_labels each class in turn.
                    A list of prompts may have any length: they take turns, those held out after those fitted to.
                    guidance_scale is that of the product, or several, over which the noises are spread: a plan is for
                    scales near them.

    The same arguments find the same plans. Nothing is added to the engine: call add_plan with what the report offers,
    and with `report.held`, the engine's own plans with the quality that was measured beside.
    Raises InputError, PlanError for a network whose trajectories do not converge, and NonFiniteError.
    """
    counts = _checked_steps(engine, steps)
    noises = check_integer("noises", noises, low=_FEWEST_NOISES, high=1 << 16, remedy="pass 64: fewer fit the noises")
    held_out = check_integer("held_out", held_out, low=_FEWEST_NOISES, high=1 << 16)
    seed = check_integer("seed", seed, low=0, high=MAX_SEED - noises - held_out)
    nodes = check_integer("nodes", nodes, low=max(8, 2 * max(counts)), high=1 << 12)
    rounds = check_integer("rounds", rounds, low=0, high=1 << 10)
    guidance_scale = conditions.pop("guidance_scale", None)
    scales = _checked_scales(guidance_scale)
    check_callable("features", features, "images")
    check_callable("progress", progress, "done, total")
    check_callable("keep", keep, "description, parts")
    engine.runner.check()

    def denoiser(first: int, count: int) -> Denoiser:
        seeds = np.arange(seed + first, seed + first + count, dtype=np.uint64)
        given = conditions_of(engine.network, count, conditions, first)
        if guidance_scale is not None:
            # Each class under each scale: where classes or prompts take turns, the scale changes after all of them.
            prompts = conditions.get("prompt")
            turns = len(prompts) if isinstance(prompts, list | tuple) else engine.network.num_classes
            given["guidance_scale"] = [scales[i // (turns or 1) % len(scales)] for i in range(count)]
        return Denoiser.of(engine, seeds, **given)

    training, other = denoiser(0, noises), denoiser(noises, held_out)
    report = _Counter(progress, 3 * nodes + len(counts) * nodes)
    grid = grid_of(training.schedule, nodes)
    kept = KeptParts.of(
        keep,
        (training, other),
        network=engine.plans.network_digest,
        runs_on=(engine.backend, engine.precision),
        nodes=nodes,
        rounds=rounds,
    )
    LOGGER.info("trajectories of %d noises over %d timesteps", noises, len(grid))
    reference = kept.reference("training", grid, lambda: integrate(training, grid, progress=report))
    twice = grid_of(training.schedule, 2 * nodes)
    converged = kept.reference("convergence", twice, lambda: integrate(training.few(_FEWEST_NOISES), twice))
    convergence = rmse(converged.ends, reference.ends[:_FEWEST_NOISES])
    if not convergence <= _CONVERGED * float(np.std(converged.ends)):
        raise PlanError(
            got=f"trajectories that end {convergence:.3g} apart over {len(grid)} and {len(converged.nodes)} timesteps",
            expected=f"at most {_CONVERGED:.0%} of the images' spread, {np.std(converged.ends):.3g}",
            remedy=f"pass nodes={2 * nodes}, or check prediction_type and schedule",
        )
    LOGGER.info("trajectories of %d noises held out", held_out)
    ends = kept.reference("held out", grid, lambda: integrate(other, grid, progress=report)).ends
    unseen = HeldOut(other, ends, features)
    first, later = step_errors(reference)
    factor = growth(reference, np.array([training.level(t) for t in grid]))
    search = WeightFit(training.few(min(_DECIDING, noises)), reference.few(min(_DECIDING, noises)))
    found = []
    for count in counts:
        started = time.perf_counter()

        def search_nodes(count: int = count) -> tuple[int, ...]:
            starts = {choose_nodes(first * factor**p, later * factor**p, count) for p in EXPONENTS}
            chosen = min(sorted(starts), key=lambda each: search.fit(each)[1])
            return _moved(search, chosen, len(grid), rounds)

        chosen = kept.nodes(count, search_nodes)
        weights, _ = WeightFit(training, reference).fit(chosen)
        highest = max(scales) if len(scales) > 1 else None
        fit = Fit(engine.plans.network_digest, min(scales), noises, seed, _OBJECTIVE, highest_guidance_scale=highest)
        timesteps = [grid[node] for node in chosen]
        fitted = Plan(**training.options, timesteps=timesteps, solver="fitted", weights=weights.tolist(), fit=fit)
        found.append(unseen.compare(fitted, time.perf_counter() - started))
        LOGGER.info("%d steps: %s", count, found[-1].rmse)
        report(nodes)
    held = [plan for plan in engine.plans.values() if engine.plans.fits_guidance(plan, np.array(scales, np.float32))]
    measured = unseen.measured(held, min(scales))
    report.finish()
    return TuneReport(tuple(found), measured, scales, noises, held_out, convergence)


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


def _checked_steps(engine: FittableEngine, steps: Iterable[int]) -> list[int]:
    remedy = "pass steps=[4, 6, 8]"
    given = check_items("steps", steps, expected="numbers of steps", remedy=remedy)
    most = network_options(engine)["schedule"].num_timesteps
    counts = sorted({check_integer("steps", each, low=1, high=min(64, most), remedy=remedy) for each in given})
    if not counts:
        raise InputError(got="steps=[]", expected="at least one", remedy=remedy)
    return counts


def _checked_scales(given: Any) -> tuple[float, ...]:
    array = number_array([1.0] if given is None else given)
    if array is None or array.ndim > 1 or array.size == 0 or not np.isfinite(array).all():
        raise InputError(
            got=f"guidance_scale={shown(given)}",
            expected="a finite number, or several",
            remedy="pass 2.0, or leave it out",
        )
    return tuple(array.ravel().tolist())


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
