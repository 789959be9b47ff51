"""What a fitted plan carries: its weights, and what they were fitted to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.arrays import number_array
from skipstep.errors import BundleError, InputError, PlanError, shown
from skipstep.plans.solvers import FITTED_COLUMNS
from skipstep.storage.untrusted import Length, Sha256, Within, read_dataclass

# How far a call's guidance scale may be from the one that a plan was fitted at, as a factor.
_GUIDANCE_FACTOR: Final = 2.0
_LARGEST_WEIGHT: Final = 1e4
_Error = Annotated[float, Within(0.0, 1e6)]


@dataclass(frozen=True, slots=True)
class Fit:
    """Where a plan's weights come from.

    network         sha256 of the network, None where it is unknown, as for a module.
    guidance_scale  of the trajectories, 1 for none.
    noises, seed    how many trajectories there were, and the seed of the first.
    objective       what was made small, in words.
    rmse            root mean square distance to the converged images, of noises that the fit did not see; pixels.
    textbook_rmse   that of the best textbook solver of as many evaluations.
    """

    network: Sha256 | None
    guidance_scale: Annotated[float, Within(-1e6, 1e6)]
    noises: Annotated[int, Within(1)]
    seed: Annotated[int, Within(0, 2**64 - 1)]
    objective: Annotated[str, Length(1, 200)]
    rmse: _Error | None = None
    textbook_rmse: _Error | None = None


def read_fit(given: Fit | Mapping[str, Any]) -> Fit:
    """A checked Fit, of one or of a mapping such as JSON holds. Raises PlanError."""
    try:
        return read_dataclass(Fit, asdict(given) if isinstance(given, Fit) else given, "fit")
    except BundleError as error:
        raise PlanError(
            got=error.got, expected="the facts of skipstep.plans.fit.Fit", remedy="leave fit out"
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


def check_guidance(fit: Any, scales: NDArray[np.float32] | None) -> None:
    """Raise InputError where a call's guidance is far from that of the fit."""
    if not isinstance(fit, Fit):
        return
    low, high = sorted((fit.guidance_scale / _GUIDANCE_FACTOR, fit.guidance_scale * _GUIDANCE_FACTOR))
    used = np.ones(1, np.float32) if scales is None else scales
    if np.any((used < low) | (used > high)):
        raise InputError(
            got=f"guidance_scale={shown(used.tolist())} with a plan that was fitted at {fit.guidance_scale:g}",
            expected=f"a scale from {low:g} to {high:g}",
            remedy="tune at this scale (engine.tune), or add the plan with allow_mismatch=True",
        )
