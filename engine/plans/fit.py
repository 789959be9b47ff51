"""What a plan carries that was measured: a fitted plan's weights and what they were fitted to, and a quality."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from skipstep.arrays import number_array
from skipstep.errors import BundleError, InputError, PlanError, shown
from skipstep.plans.solvers import FITTED_COLUMNS
from skipstep.storage.untrusted import ADDED_LATER, Length, Sha256, Within, read_dataclass

# How far a call's guidance scale may be from the one that a plan was fitted at, as a factor.
_GUIDANCE_FACTOR: Final = 2.0
_LARGEST_WEIGHT: Final = 1e4
_Scale = Annotated[float, Within(-1e6, 1e6)]
_Error = Annotated[float, Within(0.0, 1e6)]
AnyPlan = TypeVar("AnyPlan")  # skipstep.plans.plan.Plan, which imports this.
Facts = TypeVar("Facts", bound="Fit | Quality")


@dataclass(frozen=True, slots=True)
class Fit:
    """Where a plan's weights come from.

    network         sha256 of the network, None where it is unknown, as for a module.
    guidance_scale  of the trajectories, 1 for none; the lowest where there were several, up to the highest.
    noises, seed    how many trajectories there were, and the seed of the first.
    objective       what was made small, in words.
    rmse            root mean square distance to the converged images, of noises that the fit did not see; pixels.
    textbook_rmse   that of the best textbook solver of as many evaluations.
    """

    network: Sha256 | None
    guidance_scale: _Scale
    noises: Annotated[int, Within(1)]
    seed: Annotated[int, Within(0, 2**64 - 1)]
    objective: Annotated[str, Length(1, 200)]
    rmse: _Error | None = None
    textbook_rmse: _Error | None = None
    highest_guidance_scale: Annotated[_Scale | None, ADDED_LATER] = None

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The guidance scales that the plan is for."""
        highest = self.guidance_scale if self.highest_guidance_scale is None else self.highest_guidance_scale
        scales = (self.guidance_scale, highest)
        reached = [scale * factor for scale in scales for factor in (1 / _GUIDANCE_FACTOR, _GUIDANCE_FACTOR)]
        return min(reached), max(reached)


@dataclass(frozen=True, slots=True)
class Quality:
    """How near a plan's images come to the converged ones: root mean square distance over noises that no fit has seen,
    in pixels, at a guidance scale. Less is better; what was measured at different scales is not compared."""

    rmse: _Error
    guidance_scale: _Scale


def read_fit(given: Fit | Mapping[str, Any]) -> Fit:
    """A checked Fit, of one or of a mapping such as JSON holds. Raises PlanError."""
    return _read(Fit, given, "fit")


def read_quality(given: Quality | Mapping[str, Any] | None, fit: Fit | Mapping[str, Any] | None) -> Quality | None:
    """A checked Quality, likewise; that of the fit where none is given. Raises PlanError."""
    if given is not None:
        return _read(Quality, given, "quality")
    return Quality(fit.rmse, fit.guidance_scale) if isinstance(fit, Fit) and fit.rmse is not None else None


def with_quality(plan: AnyPlan, quality: Quality | None) -> AnyPlan:
    """The plan with what was measured of its images; its tables and its key are the same."""
    measured = copy.copy(plan)
    object.__setattr__(measured, "quality", quality)
    return measured


def _read(kind: type[Facts], given: Facts | Mapping[str, Any], name: str) -> Facts:
    try:
        return read_dataclass(kind, asdict(given) if isinstance(given, Fit | Quality) else given, name)
    except BundleError as error:
        raise PlanError(
            got=error.got, expected=f"the facts of skipstep.plans.fit.{kind.__name__}", remedy=f"leave {name} out"
        ) from error


def check_weights(weights: Sequence[Sequence[float]] | None, steps: int, final_alpha_bar: float) -> NDArray[np.float32]:
    """The weights of a fitted plan, float32 `[S, 5]`. Raises PlanError."""
    array = number_array(weights)
    shape = (steps, len(FITTED_COLUMNS))
    fits = array is not None and array.shape == shape and bool(np.all(np.abs(array) <= _LARGEST_WEIGHT))
    if not fits or array is None or np.any(array[-1, 2:]):
        raise PlanError(
            got=f"weights={shown(weights)}",
            expected=f"finite numbers {list(shape)}, at most {_LARGEST_WEIGHT:g}, whose last row leaves no history",
            remedy="pass what engine.tune found, unchanged",
        )
    if final_alpha_bar != 1.0:
        raise PlanError(
            got=f"final_alpha_bar={final_alpha_bar:g} of a fitted plan",
            expected="1: it was fitted to lead to the image without noise",
            remedy="leave final_alpha_bar out",
        )
    return array.astype(np.float32)


def refuse_fitted(solver: str, what: str) -> None:
    """Raise PlanError if the solver is a fitted one, of whose plan `what` is asked."""
    if solver == "fitted":
        raise PlanError(
            got=f"{what} of a fitted plan",
            expected="a textbook solver: a fitted plan's steps belong together, from the noise to the image",
            remedy="pass a plan of another solver, such as engine.add_plan(20)",
        )


def check_fit(fit: Any, *, networks: Collection[str | None]) -> None:
    """Raise PlanError for a plan that was fitted to another network than these."""
    if isinstance(fit, Fit) and fit.network is not None and fit.network not in networks:
        raise PlanError(
            got=f"a plan that was fitted to the network {fit.network[:16]}…",
            expected=f"one that was fitted to this network, {' or '.join(str(each)[:16] for each in networks)}…",
            remedy="tune this network (engine.tune), or pass allow_mismatch=True to add_plan",
        )


def fits_guidance(fit: Any, scales: NDArray[np.float32] | None) -> bool:
    """Whether a call's guidance is near that of the fit; of a plan without one it is."""
    if not isinstance(fit, Fit):
        return True
    low, high = fit.guidance_range
    used = np.ones(1, np.float32) if scales is None else scales
    return bool(np.all((used >= low) & (used <= high)))


def check_guidance(fit: Any, scales: NDArray[np.float32] | None) -> None:
    """Raise InputError where a call's guidance is far from that of the fit."""
    if not fits_guidance(fit, scales):
        low, high = fit.guidance_range
        used = [1.0] if scales is None else scales.tolist()
        raise InputError(
            got=f"guidance_scale={shown(used)} with a plan that was fitted at {fit.guidance_scale:g}",
            expected=f"a scale from {low:g} to {high:g}",
            remedy="tune at this scale (engine.tune), or add the plan with allow_mismatch=True",
        )
