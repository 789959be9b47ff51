"""Timestep spacings: which S of the T training timesteps a plan visits, from the noisiest down.

    leading     t_i = i·⌊T/S⌋ + offset                      0 first, the end of the schedule is not reached
    trailing    t_i = round(T·(i+1)/S) - 1                   T-1 is always visited
    linspace    t_i = round((T-1)·i/(S-1))                   0 and T-1 are always visited
    quadratic   t_i = round((T-1)·(i/(S-1))²)                dense at low noise
    log         t_i = round(T^(i/(S-1))) - 1                 denser still

for i = 0 … S-1. The first three are those of Lin et al. 2024 (arXiv 2305.08891, table 2) and give the indices that
diffusers gives; quadratic is the DDIM paper's idea (arXiv 2010.02502, section 5) over the whole range. With S = 1
all but `leading` visit T-1. Every result has exactly S strictly decreasing indices in [0, T-1], or there is none:
where rounding would merge two of them the request is refused, since a merged plan runs fewer steps than was asked.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import PlanError

Spacing = Literal["leading", "trailing", "linspace", "quadratic", "log"]
SPACINGS: tuple[str, ...] = get_args(Spacing)


def space_timesteps(spacing: str, *, num_timesteps: int, steps: int, offset: int = 0) -> tuple[int, ...]:
    """Return `steps` strictly decreasing indices in [0, num_timesteps - 1].

    `offset` (diffusers' steps_offset) shifts `leading` alone, as it does there.
    Raises PlanError for an unknown spacing, for steps outside [1, T], and, naming the largest number of steps that
    works, where that many distinct indices do not exist.
    """
    if spacing not in SPACINGS:
        raise PlanError(
            got=f"spacing={spacing!r}",
            expected=f"one of {', '.join(SPACINGS)}",
            remedy="pick one of these, or pass timesteps=[...] to choose every index yourself",
        )
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= num_timesteps:
        raise PlanError(
            got=f"steps={steps!r}",
            expected=f"an integer from 1 to {num_timesteps}, the number of training timesteps",
            remedy="ask for fewer steps"
            if isinstance(steps, int) and steps > num_timesteps
            else "ask for at least one",
        )
    ascending = _ascending(spacing, num_timesteps, int(steps), offset)
    if not _is_valid(ascending, num_timesteps):
        largest = _largest_number_of_steps(spacing, num_timesteps, offset)
        raise PlanError(
            got=f"steps={steps} with {spacing} spacing"
            + (f" and steps_offset={offset}" if spacing == "leading" and offset else ""),
            expected=f"at most {largest} steps: with more, indices in [0, {num_timesteps - 1}] would repeat",
            remedy=f"ask for {largest} steps or fewer, or use trailing spacing",
        )
    return tuple(int(t) for t in ascending[::-1])


@lru_cache
def _largest_number_of_steps(spacing: str, num_timesteps: int, offset: int) -> int:
    counts = range(num_timesteps, 0, -1)
    return next((s for s in counts if _is_valid(_ascending(spacing, num_timesteps, s, offset), num_timesteps)), 0)


def _ascending(spacing: str, num_timesteps: int, steps: int, offset: int) -> NDArray[np.int64]:
    if steps == 1 and spacing in ("linspace", "quadratic", "log"):
        return np.array([num_timesteps - 1])
    return _RULES[spacing](num_timesteps, steps, offset)


def _is_valid(ascending: NDArray[np.int64], num_timesteps: int) -> bool:
    return bool(ascending[0] >= 0 and ascending[-1] < num_timesteps and np.all(np.diff(ascending) > 0))


def _leading(num_timesteps: int, steps: int, offset: int) -> NDArray[np.int64]:
    return np.arange(steps) * (num_timesteps // steps) + offset


def _trailing(num_timesteps: int, steps: int, offset: int) -> NDArray[np.int64]:
    # Exact rationals: in floating point T·(i+1)/S can fall on either side of a half.
    return np.array([round(Fraction(num_timesteps * (i + 1), steps)) - 1 for i in range(steps)])


def _linspace(num_timesteps: int, steps: int, offset: int) -> NDArray[np.int64]:
    return np.array([round(Fraction((num_timesteps - 1) * i, steps - 1)) for i in range(steps)])


def _quadratic(num_timesteps: int, steps: int, offset: int) -> NDArray[np.int64]:
    return np.rint((num_timesteps - 1) * np.linspace(0.0, 1.0, steps) ** 2).astype(np.int64)


def _log(num_timesteps: int, steps: int, offset: int) -> NDArray[np.int64]:
    return np.rint(float(num_timesteps) ** np.linspace(0.0, 1.0, steps)).astype(np.int64) - 1


_RULES: dict[str, Callable[[int, int, int], NDArray[np.int64]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quadratic": _quadratic,
    "log": _log,
}
