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

# Images [N, *sample_shape] to features [N, F], or to these and the class seen in each image [N].
Features = Callable[[Array], Any]
TEXTBOOK: Final = ("ddim", "dpm_solver_pp_2m", "unipc_2")


@dataclass(frozen=True, slots=True)
class TunedPlan:
    """What was found for one number of steps.

    `rmse` by the name of the solver, "fitted" among them, on noises held out; `distance` likewise, where features were
    given, and `recognised`, the share of images of the class asked for, where these name classes. `plan` is the one
    that is offered: the fitted plan where it is nearer to the converged images and no further from them in
    distribution, else the best textbook plan.
    """

    steps: int
    plan: Plan
    fitted: Plan
    rmse: Mapping[str, float]
    distance: Mapping[str, float]
    recognised: Mapping[str, float]
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
        columns = (("rmse", "RMSE", ".4f"), ("distance", "distance", ".3g"), ("recognised", "recognised", ".1%"))
        shown = [(kind, name, *form) for kind, *form in columns for name in getattr(self.found[0], kind)]
        header = ("steps", *(f"{name}, {title}" for _, name, title, _ in shown))
        rows = [
            (
                str(each.steps),
                *(format(getattr(each, kind)[name], form) for kind, name, _, form in shown),
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
        distances, recognised = self._judged(drawn)
        best = min(TEXTBOOK, key=lambda name: errors[name])
        offered = errors["fitted"] < errors[best] and not distances.get("fitted", 0.0) > distances.get(best, 0.0)
        assert isinstance(fitted.fit, Fit), "it was made with one"
        fit = replace(fitted.fit, rmse=errors["fitted"], textbook_rmse=errors[best])
        fitted = replace(fitted, steps=None, fit=fit)
        textbook = with_quality(candidates[best], Quality(errors[best], fit.guidance_scale))
        plan = fitted if offered else textbook
        return TunedPlan(len(fitted.timesteps), plan, fitted, errors, distances, recognised, seconds)

    def _judged(self, drawn: Mapping[str, Array]) -> tuple[dict[str, float], dict[str, float]]:
        """The distance of each, and the share that is recognised; nothing where there is no judge of it."""
        if self.features is None:
            return {}, {}
        wanted, _ = _judgement(self.features, self.ends)
        found = {name: _judgement(self.features, images) for name, images in drawn.items()}
        labels, recognised = self.denoiser.request.class_labels, dict[str, float]()
        for name, (_, seen) in found.items():
            if seen is not None and labels is not None:
                recognised[name] = float(np.mean(seen == labels))
        return {name: frechet(features, wanted) for name, (features, _) in found.items()}, recognised

    def measured(self, plans: Iterable[Plan], guidance_scale: float) -> tuple[Plan, ...]:
        """Those of the plans that have a converged image, and are for these scales, with their quality."""
        return tuple(
            with_quality(plan, Quality(rmse(self.draw(plan), self.ends), guidance_scale))
            for plan in plans
            if not plan.adds_noise and not SOLVERS[plan.solver].upward
        )


def _judgement(features: Features, images: Array) -> tuple[NDArray[np.float64], NDArray[Any] | None]:
    """Features, and the classes seen. Raises InputError for what is neither."""
    given = features(images)
    found, seen = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    found, seen = np.asarray(found, np.float64), None if seen is None else np.asarray(seen)
    if found.shape[:1] != (len(images),) or (seen is not None and seen.shape != (len(images),)):
        raise InputError(
            got=f"features {list(found.shape)}" + ("" if seen is None else f" and classes {list(seen.shape)}"),
            expected=f"[N, F], and [N] where it names classes, for N = {len(images)} images",
            remedy="return one row, and one class, for each image",
        )
    return found, seen


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
