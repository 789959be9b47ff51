"""A plan: one way to walk from noise to an image, with every number known before the first call.

A plan is an explicit list of pairs t_i → t_{i+1} that ends at `final_alpha_bar` (1: no noise left), and one row of
coefficients per network evaluation. There is no stride arithmetic: the level that a step leads to is the level at
which the next one starts.

Three conventions differ in what happens to the predicted image x0 and noise eps, by up to half the signal's scale:

    paper       neither is touched                                     (the DDIM paper)
    diffusers   x0 is clipped, eps stays what the network said         (DDIMScheduler's default)
    guided      x0 is clipped, eps is derived again from it            (guided-diffusion; use_clipped_model_output)
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from skipstep.coefficients import PredictionType, coefficient_table
from skipstep.errors import PlanError
from skipstep.kernels.layout import Column, StepFlags
from skipstep.schedule import NoiseSchedule
from skipstep.solvers import SOLVERS
from skipstep.spacing import Spacing, space_timesteps

Convention = Literal["diffusers", "guided", "paper"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """A sampling plan over `schedule`: give `steps` and a `spacing`, or explicit strictly decreasing `timesteps`.

    eta             0 (deterministic) … 1 (DDPM's posterior variance); DDIM's sigma scales with it.
    prediction_type what the network was trained to predict.
    clip            bound on the predicted image, None for none; "auto" is 1.0, and None in the paper's convention.
    final_alpha_bar noise level of the result; diffusers' set_alpha_to_one=False is schedule.alpha_bar[0].
    steps_offset    shifts `leading` spacing, as in diffusers.

    After construction `timesteps` is a tuple, `steps` its length, `spacing` None if the timesteps were given, and
    `clip` a number or None. `alpha_bars`: float64 `[S+1]`, the levels visited; `coefficients`: float32
    `[S, NUM_COLUMNS]` (skipstep.kernels.layout). Both are read-only. Raises PlanError.
    """

    schedule: NoiseSchedule
    steps: int | None = None
    spacing: Spacing | None = "trailing"
    timesteps: Sequence[int] = ()
    solver: str = "ddim"
    eta: float = 0.0
    prediction_type: PredictionType = "epsilon"
    clip: float | Literal["auto"] | None = "auto"
    convention: Convention = "diffusers"
    final_alpha_bar: float = 1.0
    steps_offset: int = 0
    alpha_bars: NDArray[np.float64] = field(init=False, compare=False)
    coefficients: NDArray[np.float32] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NoiseSchedule):
            raise PlanError(
                got=f"schedule of type {type(self.schedule).__name__}",
                expected="a NoiseSchedule",
                remedy="build one, e.g. NoiseSchedule.linear(1000) or NoiseSchedule.from_diffusers(config)",
            )
        if self.solver not in SOLVERS:
            raise PlanError(
                got=f"solver={self.solver!r}", expected=f"one of {', '.join(SOLVERS)}", remedy="pick one of these"
            )
        if self.convention not in CONVENTIONS:
            raise PlanError(
                got=f"convention={self.convention!r}",
                expected=f"one of {', '.join(CONVENTIONS)}",
                remedy="use 'diffusers' for images like diffusers' DDIMScheduler makes",
            )
        eta = _checked_number("eta", self.eta, low=0.0, high=1.0)
        timesteps = self._resolved_timesteps()
        final_alpha_bar = self._checked_final_alpha_bar(timesteps[-1])
        clip = self._resolved_clip()

        alpha_bars = np.append(self.schedule.alpha_bar[list(timesteps)], final_alpha_bar)
        weights = SOLVERS[self.solver](alpha_bars, eta)
        coefficients = coefficient_table(alpha_bars[:-1], weights, prediction_type=self.prediction_type, clip=clip)
        alpha_bars.setflags(write=False)
        coefficients.setflags(write=False)
        for name, value in {
            "steps": len(timesteps),
            "spacing": None if len(self.timesteps) else self.spacing,
            "timesteps": timesteps,
            "eta": eta,
            "clip": clip,
            "final_alpha_bar": final_alpha_bar,
            "alpha_bars": alpha_bars,
            "coefficients": coefficients,
        }.items():
            object.__setattr__(self, name, value)

    @property
    def num_evaluations(self) -> int:
        """How often one sample evaluates the network (twice that where guidance doubles the batch)."""
        return len(self.timesteps)

    @property
    def pairs(self) -> tuple[tuple[int, int | None], ...]:
        """The steps (t, s), from the noisiest; None stands for the final level, which has no timestep."""
        return tuple(zip(self.timesteps, (*self.timesteps[1:], None), strict=True))

    @property
    def flags(self) -> StepFlags:
        """What the step must do beyond its linear part."""
        clips = self.clip is not None
        return StepFlags(
            clip=clips,
            # Unclipped, the noise derived again is the noise that was there.
            rederive_eps=clips and self.convention == "guided",
            add_noise=bool(np.any(self.coefficients[:, Column.SIGMA] > 0.0)),
        )

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits, equal exactly where the results are: a hash of timesteps, table and flags."""
        digest = hashlib.sha256(b"skipstep plan 1")
        digest.update(repr((self.flags, self.timesteps)).encode())
        digest.update(self.coefficients.astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        spacing = self.spacing or "explicit"
        clip = "none" if self.clip is None else f"{self.clip:g}"
        return (
            f"Plan({self.solver}, {self.steps} of {self.schedule.num_timesteps} steps, {spacing}, eta={self.eta:g}, "
            f"{self.prediction_type}, clip={clip}, {self.convention}, key={self.key})"
        )

    def _resolved_timesteps(self) -> tuple[int, ...]:
        num_timesteps = self.schedule.num_timesteps
        if len(self.timesteps) == 0:
            if self.steps is None or self.spacing is None:
                raise PlanError(
                    got="neither steps with a spacing nor timesteps",
                    expected="one of the two",
                    remedy="pass steps=20, or timesteps=[...] from the noisiest to the cleanest",
                )
            return space_timesteps(
                self.spacing, num_timesteps=num_timesteps, steps=self.steps, offset=self.steps_offset
            )
        try:
            timesteps = tuple(operator.index(t) for t in self.timesteps)
        except TypeError as error:
            raise PlanError(
                got=f"timesteps={list(self.timesteps)!r}",
                expected="integers",
                remedy="round them; the network was trained at integer timesteps",
            ) from error
        decreasing = all(t > s for t, s in itertools.pairwise(timesteps))
        if not decreasing or timesteps[-1] < 0 or timesteps[0] >= num_timesteps:
            raise PlanError(
                got=f"timesteps={list(timesteps)!r}",
                expected=f"strictly decreasing integers in [0, {num_timesteps - 1}]",
                remedy="sort them from the noisiest to the cleanest and drop repetitions",
            )
        if self.steps is not None and self.steps != len(timesteps):
            raise PlanError(
                got=f"steps={self.steps} beside {len(timesteps)} timesteps",
                expected="one of the two, or two that agree",
                remedy="leave steps out",
            )
        return timesteps

    def _resolved_clip(self) -> float | None:
        if self.clip == "auto":
            return None if self.convention == "paper" else 1.0
        if self.clip is None:
            return None
        if self.convention == "paper":
            raise PlanError(
                got=f"clip={self.clip!r} in the paper's convention",
                expected="no clip: the paper's step does not touch the predicted image",
                remedy="leave clip out, or use convention='diffusers' or 'guided'",
            )
        return _checked_number("clip", self.clip, low=0.0, high=math.inf, open_low=True)

    def _checked_final_alpha_bar(self, last_timestep: int) -> float:
        level = float(self.schedule.alpha_bar[last_timestep])
        final = _checked_number("final_alpha_bar", self.final_alpha_bar, low=0.0, high=1.0, open_low=True)
        if final < level:
            raise PlanError(
                got=f"final_alpha_bar={final:.9g} after timestep {last_timestep} with alpha_bar {level:.9g}",
                expected="a result with no more noise than the last timestep visited",
                remedy="use final_alpha_bar=1.0, or stop at an earlier timestep",
            )
        return final


def _checked_number(name: str, value: object, *, low: float, high: float, open_low: bool = False) -> float:
    numeric = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    number = float(value) if numeric else math.nan  # type: ignore[arg-type]
    inside = (low < number if open_low else low <= number) and number <= high and math.isfinite(number)
    if not inside:
        raise PlanError(
            got=f"{name}={value!r}",
            expected=f"a finite number {'above' if open_low else 'from'} {low:g}"
            + ("" if math.isinf(high) else f" to {high:g}"),
            remedy=f"pass {name} within this range",
        )
    return number
