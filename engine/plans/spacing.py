"""Timestep spacings: which S of the T training timesteps a plan visits, from the noisiest down.

    leading          t_i = i·⌊T/S⌋ + offset               0 first, the end of the schedule is not reached
    trailing         t_i = round(T·(i+1)/S) - 1            T-1 is always visited
    linspace         t_i = round((T-1)·i/(S-1))            0 and T-1 are always visited, as below
    quadratic        t_i = round((T-1)·(i/(S-1))²)         dense at low noise
    paper_quadratic  t_i = ⌊0.8·T·(i/(S-1))²⌋              as the DDIM paper ran it: the noisiest fifth is left out
    log              t_i = round(T^(i/(S-1))) - 1          denser still
    logsnr           nearest to ln(snr) at equal distances
    karras           nearest to s^(1/7) at equal distances, s² = 1/snr
    lcm              50 timesteps of trailing spacing, of which t_i is number 50 - ⌊50·j/S⌋ for j = S-1-i
    interpolated     (T-1)·i/(S-1), not rounded: a schedule of these S levels alone, linear in sigma between timesteps,
                     as diffusers' EulerDiscreteScheduler visits them; for a network that is told the noise level

for i = 0 … S-1 and snr = alpha_bar/(1 - alpha_bar). The first three are those of Lin et al. 2024 (arXiv 2305.08891,
table 2) and give the indices that diffusers gives; quadratic is the DDIM paper's (arXiv 2010.02502, appendix D.2);
karras is Karras et al. 2022 (arXiv 2206.00364, eq. 5); lcm's are of the timesteps that a latent consistency model was
distilled on (Luo et al. 2023, arXiv 2310.04378), as its scheduler takes them. With S = 1 all but `leading` visit their
noisiest index. Every result has exactly S strictly decreasing indices in [0, T-1]. Where rounding would merge two of
them the request is refused, since the plan would run fewer steps than requested.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import PlanError, check_choice, check_integer
from skipstep.plans.schedule import NoiseSchedule

Spacing = Literal[
    "leading", "trailing", "linspace", "quadratic", "paper_quadratic", "log", "logsnr", "karras", "lcm", "interpolated"
]
# Of training timesteps.
SPACINGS: tuple[str, ...] = get_args(Spacing)[:-1]
_LCM_STEPS = 50


def space_timesteps(spacing: str, schedule: NoiseSchedule, *, steps: int, offset: int = 0) -> tuple[int, ...]:
    """Return `steps` strictly decreasing indices in [0, T - 1].

    `offset` (diffusers' steps_offset) shifts `leading` alone, as it does there.
    Raises PlanError for an unknown spacing, for steps outside [1, T], for a spacing in terms of the signal-to-noise
    ratio where that is zero at the end, and, naming the largest number of steps that works, where that many distinct
    indices do not exist.
    """
    num_timesteps = schedule.num_timesteps
    remedy = "pick one of these, or pass timesteps=[...] to choose every index yourself"
    check_choice("spacing", spacing, SPACINGS, remedy=remedy, error=PlanError)
    steps = check_integer(
        "steps", steps, low=1, high=num_timesteps, remedy="ask for at least one, at most all", error=PlanError
    )
    if spacing in ("logsnr", "karras") and schedule.alpha_bar[-1] == 0.0:
        raise PlanError(
            got=f"spacing={spacing!r} over a schedule with zero terminal SNR",
            expected="a finite signal-to-noise ratio at the last timestep",
            remedy="use trailing spacing, which that schedule was made for",
        )
    ascending = _ascending(spacing, schedule, steps, offset)
    if not _is_valid(ascending, num_timesteps):
        largest = _largest_number_of_steps(spacing, schedule, offset)
        raise PlanError(
            got=f"steps={steps} with {spacing} spacing"
            + (f" and steps_offset={offset}" if spacing == "leading" and offset else ""),
            expected=f"at most {largest} steps: with more, indices in [0, {num_timesteps - 1}] would repeat",
            remedy=f"ask for {largest} steps or fewer, or use trailing spacing",
        )
    return tuple(int(t) for t in ascending[::-1])


def diffusers_timesteps(
    spacing: str, schedule: NoiseSchedule, *, steps: int, offset: int
) -> tuple[tuple[int, ...], int]:
    """The timesteps that diffusers' DDIMScheduler visits, and the stride T // steps that it steps down by.

    It takes the level `stride` below a timestep for that of the next, which it is not where `linspace` rounds, or
    where the steps do not divide T. Raises PlanError for other spacings, and where indices repeat or go beyond T.
    """
    check_choice("spacing", spacing, ("leading", "trailing", "linspace"), error=PlanError)
    num_timesteps = schedule.num_timesteps
    steps = check_integer("steps", steps, low=1, high=num_timesteps, error=PlanError)
    stride = num_timesteps // steps
    # In floating point, as there: halves fall to either side.
    places = {
        "leading": np.arange(steps)[::-1] * float(stride) + offset,
        "trailing": np.arange(num_timesteps, 0, -num_timesteps / steps).round() - 1,
        "linspace": np.linspace(0, num_timesteps - 1, steps).round()[::-1],
    }[spacing].astype(np.int64)
    if len(places) != steps or not _is_valid(places[::-1], num_timesteps):
        raise PlanError(
            got=f"steps={steps} with {spacing} spacing, for which diffusers visits {places.tolist()!r:.200}",
            expected=f"{steps} decreasing indices in [0, {num_timesteps - 1}]",
            remedy="ask for another number of steps, or leave compatibility out",
        )
    return tuple(places.tolist()), stride


def interpolated_levels(schedule: NoiseSchedule, *, steps: int, time_input: str) -> NoiseSchedule:
    """The levels of `interpolated` spacing, as a schedule of their own. Raises PlanError."""
    steps = check_integer("steps", steps, low=1, high=schedule.num_timesteps, error=PlanError)
    if time_input == "timestep" or schedule.alpha_bar[-1] == 0.0:
        raise PlanError(
            got=f"spacing='interpolated' with time_input={time_input!r} over {schedule!r}",
            expected="a network that is told the noise level, and some image left at the last timestep",
            remedy="use linspace or trailing spacing",
        )
    sigmas = np.sqrt(1.0 / schedule.alpha_bar - 1.0)
    places = np.linspace(schedule.num_timesteps - 1, 0, steps)
    return NoiseSchedule.from_sigmas(np.interp(places, np.arange(len(sigmas)), sigmas), name=schedule.name)


@lru_cache
def _largest_number_of_steps(spacing: str, schedule: NoiseSchedule, offset: int) -> int:
    num_timesteps = schedule.num_timesteps
    counts = range(num_timesteps, 0, -1)
    return next((s for s in counts if _is_valid(_ascending(spacing, schedule, s, offset), num_timesteps)), 0)


def _ascending(spacing: str, schedule: NoiseSchedule, steps: int, offset: int) -> NDArray[np.int64]:
    num_timesteps = schedule.num_timesteps
    if spacing == "leading":
        return np.arange(steps) * (num_timesteps // steps) + offset
    if spacing == "trailing":
        return _rounded_ratio(num_timesteps * np.arange(1, steps + 1), steps) - 1
    if spacing == "lcm":
        count = min(_LCM_STEPS, num_timesteps)
        return (count - count * np.arange(steps)[::-1] // steps) * (num_timesteps // count) - 1
    # i of S-1: with S = 1 the whole way.
    i, whole = (np.arange(steps), steps - 1) if steps > 1 else (np.ones(1, np.int64), 1)
    return _BY_SHARE[spacing](schedule, i, whole)


def _is_valid(ascending: NDArray[np.int64], num_timesteps: int) -> bool:
    return bool(ascending[0] >= 0 and ascending[-1] < num_timesteps and np.all(np.diff(ascending) > 0))


def _rounded_ratio(numerator: NDArray[np.int64], denominator: int) -> NDArray[np.int64]:
    """Exact, halves to even: in floating point T·(i+1)/S can fall on either side of a half."""
    quotient, rest = np.divmod(numerator, denominator)
    rounded: NDArray[np.int64] = quotient + (
        (2 * rest > denominator) | ((2 * rest == denominator) & (quotient % 2 == 1))
    )
    return rounded


def _linspace(schedule: NoiseSchedule, i: NDArray[np.int64], whole: int) -> NDArray[np.int64]:
    return _rounded_ratio((schedule.num_timesteps - 1) * i, whole)


def _quadratic(schedule: NoiseSchedule, i: NDArray[np.int64], whole: int) -> NDArray[np.int64]:
    return _rounded_ratio((schedule.num_timesteps - 1) * i**2, whole**2)


def _paper_quadratic(schedule: NoiseSchedule, i: NDArray[np.int64], whole: int) -> NDArray[np.int64]:
    return 4 * schedule.num_timesteps * i**2 // (5 * whole**2)


def _log(schedule: NoiseSchedule, i: NDArray[np.int64], whole: int) -> NDArray[np.int64]:
    return np.rint(float(schedule.num_timesteps) ** (i / whole)).astype(np.int64) - 1


def _logsnr(schedule: NoiseSchedule, i: NDArray[np.int64], whole: int) -> NDArray[np.int64]:
    return _nearest(np.log(1.0 / schedule.alpha_bar - 1.0), i / whole)


def _karras(schedule: NoiseSchedule, i: NDArray[np.int64], whole: int) -> NDArray[np.int64]:
    return _nearest((1.0 / schedule.alpha_bar - 1.0) ** (0.5 / 7), i / whole)


def _nearest(ruler: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices whose places on the increasing `ruler` are nearest to the shares of its length."""
    wanted = ruler[0] + (ruler[-1] - ruler[0]) * shares
    above = np.searchsorted(ruler, wanted).clip(0, len(ruler) - 1)
    below = np.maximum(above - 1, 0)
    nearest: NDArray[np.int64] = np.where(np.abs(ruler[below] - wanted) < np.abs(ruler[above] - wanted), below, above)
    return nearest


_BY_SHARE: dict[str, Callable[[NoiseSchedule, NDArray[np.int64], int], NDArray[np.int64]]] = {
    "linspace": _linspace,
    "quadratic": _quadratic,
    "paper_quadratic": _paper_quadratic,
    "log": _log,
    "logsnr": _logsnr,
    "karras": _karras,
}
