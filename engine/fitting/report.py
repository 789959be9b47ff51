"""What tuning found, and how good it is on noises that the fit did not see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError
from skipstep.fitting.reference import Denoiser
from skipstep.fitting.weights import rmse
from skipstep.latency.table import format_table
from skipstep.loops.contract import Array
from skipstep.plans.fit import Fit, Quality, with_quality
from skipstep.plans.plan import Plan
from skipstep.plans.solvers import SOLVERS
from skipstep.plans.stages import Stages

Features = Callable[[Array], NDArray[Any]]
TEXTBOOK: Final = ("ddim", "dpm_solver_pp_2m", "unipc_2")


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
    """The plans by steps; the plans that the engine held, with the quality that was measured beside; and how far
    trajectories over half as many nodes end from the converged ones."""

    found: tuple[TunedPlan, ...]
    held: tuple[Plan, ...]
    guidance_scales: tuple[float, ...]
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
            f"{', '.join(f'{scale:g}' for scale in self.guidance_scales)}; these are converged to "
            f"{self.convergence:.4f}."
        )
        return f"{format_table((*header, 'offered', 'seconds'), rows)}\n{note}"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Noises that no fit has seen: their denoiser, and the converged images `ends` `[N, *sample_shape]`."""

    denoiser: Denoiser
    ends: Array
    features: Features | None = None

    def draw(self, plan: Plan) -> Array:
        request = replace(self.denoiser.request, x_T=self.denoiser.noise)
        return self.denoiser.engine.runner.run(Stages.of([plan]), request)

    def compare(self, fitted: Plan, seconds: float) -> TunedPlan:
        """A fitted plan beside the textbook solvers of as many steps; it took `seconds` to find."""
        candidates = {"fitted": fitted}
        for solver in TEXTBOOK:
            options: dict[str, Any] = {"steps": len(fitted.timesteps), "spacing": "trailing", "solver": solver}
            candidates[solver] = Plan(**self.denoiser.options, **options)
        drawn = {name: self.draw(plan) for name, plan in candidates.items()}
        errors = {name: rmse(images, self.ends) for name, images in drawn.items()}
        distances: dict[str, float] = {}
        if self.features is not None:
            wanted = np.asarray(self.features(self.ends), np.float64)
            distances = {n: frechet(np.asarray(self.features(x), np.float64), wanted) for n, x in drawn.items()}
        best = min(TEXTBOOK, key=lambda name: errors[name])
        offered = errors["fitted"] < errors[best] and not distances.get("fitted", 0.0) > distances.get(best, 0.0)
        assert isinstance(fitted.fit, Fit), "it was made with one"
        fit = replace(fitted.fit, rmse=errors["fitted"], textbook_rmse=errors[best])
        fitted = replace(fitted, steps=None, fit=fit)
        textbook = with_quality(candidates[best], Quality(errors[best], fit.guidance_scale))
        plan = fitted if offered else textbook
        return TunedPlan(len(fitted.timesteps), plan, fitted, errors, distances, seconds)

    def measured(self, plans: Iterable[Plan], guidance_scale: float) -> tuple[Plan, ...]:
        """Those of the plans that have a converged image, and are for these scales, with their quality."""
        return tuple(
            with_quality(plan, Quality(rmse(self.draw(plan), self.ends), guidance_scale))
            for plan in plans
            if not plan.adds_noise and not SOLVERS[plan.solver].upward
        )


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
