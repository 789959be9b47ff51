"""Checking and completing the options of a plan. Everything here raises PlanError."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from skipstep.arrays import number_array
from skipstep.errors import PlanError, check_choice, check_integer, check_items, check_number, shown
from skipstep.plans.parameterization import PREDICTION_TYPES, TIME_INPUTS, time_inputs
from skipstep.plans.schedule import NoiseSchedule
from skipstep.plans.solvers import SOLVERS
from skipstep.plans.spacing import Spacing, diffusers_timesteps, space_timesteps
from skipstep.plans.update_weights import BETWEEN, UpdateWeights

# The coefficient table is float32.
LARGEST: Final = float(np.finfo(np.float32).max)


def check_solver_options(solver: str, **options: object) -> None:
    """Refuse options, other than None, that the solver does not take."""
    for name, value in options.items():
        if value is not None and name not in SOLVERS[solver].takes:
            supporting = ", ".join(key for key, other in SOLVERS.items() if name in other.takes)
            raise PlanError(
                got=f"{name}={shown(value)} with solver={solver!r}",
                expected=f"an option that this solver supports; {name} is supported by {supporting}",
                remedy=f"leave {name} out, or change the solver",
            )


def resolve_guidance(
    interval: tuple[float, float] | None,
    weights: Sequence[float] | None,
    levels: NDArray[np.float64],
    steps: NDArray[np.int64],
    *,
    solver: str,
) -> NDArray[np.float64]:
    """The weight of guidance `[E]` for evaluations at these `levels` of alpha_bar, which belong to these `steps`: the
    call's guidance scale g counts as 1 + weight·(g - 1), and where the weight is 0 the network is evaluated once."""
    if interval is None and weights is None:
        return np.ones(len(levels))
    name, given = ("guidance_interval", interval) if weights is None else ("guidance_weights", weights)
    array, count = number_array(given), 2 if weights is None else int(steps[-1]) + 1
    fits = array is not None and array.shape == (count,) and bool(np.all((array >= 0.0) & (array <= LARGEST)))
    found: NDArray[np.float64] = np.zeros(len(levels))
    if fits and array is not None and weights is None:
        low, high = array
        # Noise to signal is infinite at alpha_bar = 0.
        ratios = np.sqrt((1.0 - levels) / np.maximum(levels, np.finfo(np.float64).tiny))
        found = ((ratios >= low) & (ratios <= high)).astype(np.float64)
    elif fits and array is not None:
        found = array.astype(np.float64)[steps]
    if not fits or (interval is not None and weights is not None) or not np.any(found) or SOLVERS[solver].upward:
        raise PlanError(
            got=f"{name}={shown(given)}" + (" of an inversion" if SOLVERS[solver].upward else ""),
            expected="(low, high) in noise to signal, with an evaluation inside"
            if weights is None
            else f"{count} numbers, one for each step, of at least 0 and not all 0, without guidance_interval",
            remedy="pass guidance_interval=(0.2, 5.0), or leave it out",
        )
    return found


def network_inputs(
    weights: UpdateWeights,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    *,
    time_input: str,
    shift: int,
    nearest: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The network's time inputs `[E]`, and the levels `[E]` that they stand for.

    `shift`: how many timesteps later than its level an evaluation's input stands. `nearest`: of a level between the
    training's timesteps the nearest of them, else a fractional one.
    """
    inputs, levels = np.empty(len(weights.level)), weights.level.copy()
    for row, place in enumerate(weights.grid + shift):
        if 0 <= place < len(timesteps) and weights.grid[row] != BETWEEN:
            inputs[row] = timesteps[place]
        else:
            inputs[row] = schedule.timestep_at(float(weights.level[row]))
            if nearest or weights.grid[row] != BETWEEN:
                inputs[row] = round(inputs[row])
        if inputs[row] % 1.0 == 0.0:
            levels[row] = schedule.alpha_bar[int(inputs[row])]
    if time_input != "timestep":
        inputs = time_inputs(time_input, levels)
    if not np.all(np.isfinite(inputs)):
        raise PlanError(
            got=f"time_input={time_input!r} at a timestep with alpha_bar = 0 (zero terminal SNR)",
            expected=f"a noise level with some image left, where {time_input} is finite",
            remedy="leave the last timestep out, or use a schedule that ends with some image left",
        )
    return inputs, levels


def resolve_timesteps(
    schedule: NoiseSchedule,
    given: Sequence[int],
    *,
    steps: int | None,
    spacing: Spacing | None,
    offset: int,
    stride: int | Literal["diffusers"] | None,
) -> tuple[tuple[int, ...], bool, int | None]:
    """The timesteps, decreasing: those given, or `steps` of them by `spacing`; whether no spacing of ours makes them;
    and the stride."""
    if spacing is not None:
        check_choice("spacing", spacing, get_args(Spacing), error=PlanError)
    offset = check_integer("steps_offset", offset, low=0, high=schedule.num_timesteps, error=PlanError)
    last = schedule.num_timesteps - 1
    expected = f"strictly decreasing integers in [0, {last}]"
    remedy = "leave timesteps out, or pass a list of them, from the noisiest to the cleanest"
    given = check_items("timesteps", given, expected=expected, remedy=remedy, error=PlanError)
    if len(given) == 0:
        if steps is None or spacing is None:
            raise PlanError(
                got="neither steps with a spacing nor timesteps",
                expected="one of the two",
                remedy="pass steps=20, or timesteps=[...] from the noisiest to the cleanest",
            )
        if stride is None:
            return space_timesteps(spacing, schedule, steps=steps, offset=offset), False, None
        check_choice(
            "stride", stride, ("diffusers",), remedy="leave it out, or pass timesteps as well", error=PlanError
        )
        timesteps, stride = diffusers_timesteps(spacing, schedule, steps=steps, offset=offset)
        return timesteps, True, stride
    try:
        timesteps = tuple(check_integer("timestep", t, low=0, error=PlanError) for t in given)
    except PlanError as error:
        raise PlanError(
            got=f"timesteps={shown(given)}",
            expected=expected,
            remedy="round them; the network was trained at integer timesteps",
        ) from error
    decreasing = all(t > s for t, s in itertools.pairwise(timesteps))
    if not decreasing or timesteps[0] >= schedule.num_timesteps:
        raise PlanError(
            got=f"timesteps={shown(given)}",
            expected=expected,
            remedy="sort them from the noisiest to the cleanest and drop repetitions",
        )
    if steps is not None and check_integer("steps", steps, low=1, error=PlanError) != len(timesteps):
        raise PlanError(
            got=f"steps={steps} beside {len(timesteps)} timesteps",
            expected="one of the two, or two that agree",
            remedy="leave steps out",
        )
    if stride is not None:
        remedy = "pass a number of timesteps, or steps and a spacing instead of timesteps"
        stride = check_integer("stride", stride, low=1, high=last + 1, remedy=remedy, error=PlanError)
    return timesteps, True, stride


def resolve_parameterization(prediction_type: str, time_input: str, sigma_data: float | None) -> float | None:
    """`sigma_data` of a network that takes one, 0.5 where none is given."""
    remedy = "pass what the network was trained to predict; a diffusers scheduler_config.json names it"
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES, remedy=remedy, error=PlanError)
    check_choice(
        "time_input", time_input, TIME_INPUTS, remedy="pass what the network was trained with", error=PlanError
    )
    if prediction_type == "edm":
        given = 0.5 if sigma_data is None else sigma_data
        return check_number("sigma_data", given, low=0.0, high=LARGEST, above=True, error=PlanError)
    if sigma_data is not None:
        raise PlanError(
            got=f"sigma_data={shown(sigma_data)} with prediction_type={prediction_type!r}",
            expected="prediction_type='edm' beside it",
            remedy="leave sigma_data out",
        )
    return None


def resolve_clip(
    clip: float | str | None,
    *,
    quantile: float | None,
    maximum: float | None,
    unclipped: Literal["inversion", "paper"] | None,
) -> float | Literal["dynamic"] | None:
    """The bound on the predicted image, "dynamic", or None; `unclipped` names what never clips, if the plan is such."""
    if clip is not None and not isinstance(clip, str):
        clip = check_number("clip", clip, low=0.0, high=LARGEST, above=True, error=PlanError)
    for name, value in (("dynamic_quantile", quantile), ("dynamic_maximum", maximum)):
        if value is not None and clip != "dynamic":
            raise PlanError(
                got=f"{name}={shown(value)} with clip={clip!r}",
                expected="clip='dynamic' beside it",
                remedy=f"pass clip='dynamic', or leave {name} out",
            )
    if clip == "auto":
        return None if unclipped else 1.0
    if clip is None:
        return None
    if unclipped is not None:
        upward = unclipped == "inversion"
        why = "an inversion that clips cannot be undone" if upward else "the paper's step does not clip"
        raise PlanError(
            got=f"clip={clip!r} in " + ("an inversion" if upward else "the paper's convention"),
            expected=f"no clip: {why}",
            remedy="leave clip out" + ("" if upward else ", or use convention='diffusers' or 'guided'"),
        )
    if not isinstance(clip, str):
        return clip
    if clip != "dynamic":
        raise PlanError(
            got=f"clip={clip!r}",
            expected="a bound on the predicted image, 'auto', 'dynamic' or None",
            remedy="leave clip out to clip as the convention does",
        )
    if quantile is None:
        raise PlanError(
            got="clip='dynamic' without dynamic_quantile",
            expected="the quantile at which to threshold, in (0, 1]",
            remedy="pass dynamic_quantile=0.995, as Imagen does",
        )
    check_number("dynamic_quantile", quantile, low=0.0, high=1.0, above=True, error=PlanError)
    if maximum is not None:
        check_number("dynamic_maximum", maximum, low=1.0, high=LARGEST, error=PlanError)
    return "dynamic"


def check_final_alpha_bar(final_alpha_bar: float, schedule: NoiseSchedule, last_timestep: int) -> float:
    """The level of the result, which has no more noise than the last timestep."""
    level = float(schedule.alpha_bar[last_timestep])
    final = check_number("final_alpha_bar", final_alpha_bar, low=0.0, high=1.0, above=True, error=PlanError)
    if final < level:
        raise PlanError(
            got=f"final_alpha_bar={final:.9g} after timestep {last_timestep} with alpha_bar {level:.9g}",
            expected="a result with no more noise than the last timestep visited",
            remedy="use final_alpha_bar=1.0, or stop at an earlier timestep",
        )
    return final
