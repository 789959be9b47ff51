"""A plan: one way to walk from noise to an image, with every number known before the first call.

A plan is an explicit list of pairs t_i → t_{i+1} that ends at `final_alpha_bar` (1: no noise left), and one row of
coefficients per network evaluation. The level that a step leads to is the level at which the next one starts.

Three conventions differ in what happens to the predicted image x0 and noise eps, by up to half the signal's scale:

    paper       neither is touched                                     (the DDIM paper)
    diffusers   x0 is clipped, eps stays what the network said         (DDIMScheduler's default)
    guided      x0 is clipped, eps is derived again from it            (guided-diffusion; use_clipped_model_output)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import PlanError, check_choice, check_integer, check_number
from skipstep.kernels.layout import StepFlags
from skipstep.kernels.statistics import Thresholding
from skipstep.plans.coefficients import coefficient_table, stage_flags
from skipstep.plans.fit import Fit, Quality, check_weights, read_fit, read_quality, refuse_fitted
from skipstep.plans.key import plan_key
from skipstep.plans.parameterization import PredictionType, TimeInput
from skipstep.plans.plan_options import (
    check_final_alpha_bar,
    check_solver_options,
    network_inputs,
    resolve_clip,
    resolve_guidance,
    resolve_parameterization,
    resolve_timesteps,
)
from skipstep.plans.schedule import NoiseSchedule, check_schedule
from skipstep.plans.solvers import SOLVERS, one_step_at_a_time
from skipstep.plans.spacing import Spacing, interpolated_levels
from skipstep.plans.update_weights import VARIANCES, SolverOptions, Variance

Convention = Literal["diffusers", "guided", "paper"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """A sampling plan over `schedule`: give `steps` and a `spacing`, or explicit strictly decreasing `timesteps`.

    solver          a name in skipstep.plans.solvers.SOLVERS.
    eta             for ddim: 0 (deterministic) … 1 (DDPM's posterior variance); sigma scales with it.
    variance        for ddpm: "fixed_small", "fixed_large" or "learned_range"; None is fixed_small.
    midpoints       for solvers that look between training timesteps: "fractional" timesteps, found in log-SNR, or the
                    "nearest" integer for a network that knows no others, at the price of the solver's order.
    evaluate_at     for ddim_inversion: the network's timestep input is that of the "target" of each step, as in
                    sampling, or of its "source".
    prediction_type what the network was trained to predict.
    prediction_type what the network predicts, and time_input what it is told of a noise level, both as in
                    skipstep.plans.parameterization; sigma_data is EDM's, 0.5 where it is left out.
    clip            bound on the predicted image, None for none; "auto" is 1.0 where the convention and the solver clip;
                    "dynamic" thresholds at the quantile `dynamic_quantile` of each sample's absolute values, at least 1
                    and at most `dynamic_maximum` (skipstep.kernels.statistics).
    convention      what clipping does to the noise, see above. Runge-Kutta solvers derive it again in both conventions
                    that clip.
    final_alpha_bar noise level of the result; diffusers' set_alpha_to_one=False is schedule.alpha_bar[0].
    steps_offset    shifts `leading` spacing, as in diffusers.
    stride          for ddim: a step leads to the level `stride` timesteps below its own, instead of that of the next
                    timestep. "diffusers": the timesteps and the stride of its DDIMScheduler, to the last index.
    weights, fit    for fitted: float32 `[S, 5]` (skipstep.plans.solvers.FITTED_COLUMNS), and what they were fitted to
                    (skipstep.plans.fit.Fit). The result is without noise: final_alpha_bar is 1.
    guidance_interval  (low, high) in noise to signal, √((1-alpha_bar)/alpha_bar): evaluations outside are made
                    without guidance, on half the batch (Kynkäänniemi et al. 2024, arXiv 2404.07724).
    guidance_weights  instead, a weight for each step: a call's scale g counts as 1 + weight·(g - 1), 0 as outside.
    quality         what was measured of its images (skipstep.plans.fit.Quality), or None; not part of the key.

    After construction `timesteps` is a tuple, `steps` its length, `spacing` None if the timesteps were given, `clip` a
    number, "dynamic" or None, and `stride` a number or None. All of the following are read-only:

    alpha_bars      float64 `[S+1]`, the levels visited. An inversion visits levels and timesteps upward.
    evaluation_timesteps  float64 `[E]`, the network's timestep inputs; E is S for one-stage solvers.
    coefficients    float32 `[E, NUM_COLUMNS]`; `stage_flags`, E of them, say which columns count
                    (skipstep.kernels.layout).
    ends_step       E truth values: whether an evaluation is the last of its step.
    key             sixteen hexadecimal digits, equal if and only if the results are: a hash of timesteps, table, flags.

    Raises PlanError.
    """

    schedule: NoiseSchedule
    steps: int | None = None
    spacing: Spacing | None = "trailing"
    timesteps: Sequence[int] = ()
    solver: str = "ddim"
    eta: float = 0.0
    variance: Variance | None = None
    midpoints: Literal["fractional", "nearest"] = "fractional"
    evaluate_at: Literal["target", "source"] = "target"
    prediction_type: PredictionType = "epsilon"
    time_input: TimeInput = "timestep"
    sigma_data: float | None = None
    clip: float | Literal["auto", "dynamic"] | None = "auto"
    dynamic_quantile: float | None = None
    dynamic_maximum: float | None = None
    convention: Convention = "diffusers"
    final_alpha_bar: float = 1.0
    steps_offset: int = 0
    stride: int | Literal["diffusers"] | None = None
    weights: Sequence[Sequence[float]] | None = None
    fit: Fit | Mapping[str, Any] | None = field(default=None, compare=False)
    guidance_interval: tuple[float, float] | None = None
    guidance_weights: Sequence[float] | None = None
    quality: Quality | Mapping[str, Any] | None = field(default=None, compare=False)
    alpha_bars: NDArray[np.float64] = field(init=False, compare=False)
    evaluation_timesteps: NDArray[np.float64] = field(init=False, compare=False)
    coefficients: NDArray[np.float32] = field(init=False, compare=False)
    stage_flags: tuple[StepFlags, ...] = field(init=False, compare=False)
    ends_step: tuple[bool, ...] = field(init=False, compare=False)
    key: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        for option, chosen, choices in (
            ("solver", self.solver, tuple(SOLVERS)),
            ("convention", self.convention, CONVENTIONS),
            ("midpoints", self.midpoints, ("fractional", "nearest")),
            ("evaluate_at", self.evaluate_at, ("target", "source")),
            ("variance", VARIANCES[0] if self.variance is None else self.variance, VARIANCES),
        ):
            check_choice(option, chosen, choices, error=PlanError)
        sigma_data = resolve_parameterization(self.prediction_type, self.time_input, self.sigma_data)
        levels = isinstance(self.spacing, str) and self.spacing == "interpolated"
        if levels and self.steps is not None and isinstance(self.timesteps, tuple) and not self.timesteps:
            own = interpolated_levels(self.schedule, steps=self.steps, time_input=self.time_input)
            object.__setattr__(self, "schedule", own)
            object.__setattr__(self, "timesteps", tuple(range(self.steps))[::-1])
        solver = SOLVERS[self.solver]
        eta = check_number("eta", self.eta, low=0.0, high=1.0, error=PlanError)
        check_solver_options(
            self.solver,
            eta=eta or None,
            variance=self.variance,
            midpoints=None if self.midpoints == "fractional" else self.midpoints,
            evaluate_at=None if self.evaluate_at == "target" else self.evaluate_at,
            stride=self.stride,
            weights=self.weights,
            fit=self.fit,
        )
        timesteps, given, stride = resolve_timesteps(
            self.schedule,
            self.timesteps,
            steps=self.steps,
            spacing=self.spacing,
            offset=self.steps_offset,
            stride=self.stride,
        )
        final_alpha_bar = check_final_alpha_bar(self.final_alpha_bar, self.schedule, timesteps[-1])
        clip = resolve_clip(
            self.clip,
            quantile=self.dynamic_quantile,
            maximum=self.dynamic_maximum,
            unclipped="inversion" if solver.upward else "paper" if self.convention == "paper" else None,
        )

        alpha_bars = np.append(self.schedule.alpha_bar[list(timesteps)], final_alpha_bar)
        if solver.upward:
            timesteps, alpha_bars = timesteps[::-1], alpha_bars[::-1].copy()
        if solver.diverges_at_zero and np.any(alpha_bars == 0.0):
            raise PlanError(
                got=f"solver={self.solver!r} on a schedule with zero terminal SNR",
                expected="a finite noise-to-signal ratio at every timestep visited",
                remedy="use ddim, ddpm, dpm_solver_pp_2m or unipc_2, or leave the last timestep out",
            )
        table = fit = None
        if self.solver == "fitted":
            table = check_weights(self.weights, len(timesteps), final_alpha_bar)
            fit = None if self.fit is None else read_fit(self.fit)
        options = SolverOptions(eta, self.variance or "fixed_small", table, np.array(timesteps, np.float64))
        if stride is None:
            weights = solver.weights(alpha_bars, options)
        else:
            below = [t - stride for t in timesteps]
            ends = [self.schedule.alpha_bar[t] if t >= 0 else final_alpha_bar for t in below]
            weights = one_step_at_a_time(solver, alpha_bars[:-1], np.array(ends), options)
        # An inversion's first level is the image's, which no timestep has; its others follow.
        shift = {"target": 0, "source": -1}[self.evaluate_at] if solver.upward else 0
        nearest = self.midpoints == "nearest"
        inputs, input_levels = network_inputs(
            weights, timesteps, self.schedule, time_input=self.time_input, shift=shift, nearest=nearest
        )
        steps = np.append(0, np.cumsum(weights.ends_step)[:-1])
        interval, given_weights = self.guidance_interval, self.guidance_weights
        guidance = resolve_guidance(interval, given_weights, input_levels, steps, solver=self.solver)
        coefficients = coefficient_table(
            input_levels,
            weights,
            prediction_type=self.prediction_type,
            sigma_data=sigma_data,
            clip=clip if isinstance(clip, float) else None,
            guidance=guidance,
        )
        for array in (alpha_bars, inputs, coefficients):
            array.setflags(write=False)
        for name, value in {
            "steps": len(timesteps),
            "spacing": None if given else self.spacing,
            "timesteps": timesteps,
            "stride": stride,
            "weights": None if table is None else tuple(map(tuple, table.tolist())),
            "fit": fit,
            "guidance_interval": None if interval is None else tuple(map(float, interval)),
            "guidance_weights": None if given_weights is None else tuple(map(float, given_weights)),
            "quality": read_quality(self.quality, fit),
            "eta": eta,
            "sigma_data": sigma_data,
            "clip": clip,
            # As floats: the key and what is saved do not depend on the type that they were passed in.
            "dynamic_quantile": None if self.dynamic_quantile is None else float(self.dynamic_quantile),
            "dynamic_maximum": None if self.dynamic_maximum is None else float(self.dynamic_maximum),
            "steps_offset": int(self.steps_offset),
            "final_alpha_bar": final_alpha_bar,
            "alpha_bars": alpha_bars,
            "evaluation_timesteps": inputs,
            "coefficients": coefficients,
            "ends_step": tuple(weights.ends_step.tolist()),
            "stage_flags": stage_flags(
                weights,
                coefficients,
                clip=clip,
                # Unclipped, the noise derived again is the noise that was there.
                rederives=clip is not None and (self.convention == "guided" or solver.sees_clip_in_eps),
                learned_variance=self.variance == "learned_range",
                guidance=guidance,
            ),
        }.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "key", self._hash())

    @property
    def num_evaluations(self) -> int:
        """E, the network evaluations (NFE) of a sample; classifier-free guidance doubles their batch."""
        return len(self.evaluation_timesteps)

    @property
    def pairs(self) -> tuple[tuple[int | None, int | None], ...]:
        """The steps (t, s) in order; None stands for the final level, which has no timestep."""
        if isinstance(self.stride, int):
            return tuple((t, t - self.stride if t >= self.stride else None) for t in self.timesteps)
        ends = (None, *self.timesteps) if SOLVERS[self.solver].upward else (*self.timesteps, None)
        return tuple(itertools.pairwise(ends))

    @property
    def is_fractional(self) -> bool:
        """Whether the network's timestep inputs include some between those of its training."""
        return self.time_input == "timestep" and bool(np.any(self.evaluation_timesteps % 1.0))

    @property
    def adds_noise(self) -> bool:
        """Whether steps add fresh noise."""
        return any(flags.add_noise for flags in self.stage_flags)

    @property
    def learns_variance(self) -> bool:
        """Whether the network must have 2C output channels."""
        return any(flags.learned_variance for flags in self.stage_flags)

    @property
    def thresholding(self) -> Thresholding | None:
        """The parameters of dynamic thresholding, where `clip` is "dynamic"."""
        if self.clip != "dynamic" or self.dynamic_quantile is None:
            return None
        return Thresholding(self.dynamic_quantile, math.inf if self.dynamic_maximum is None else self.dynamic_maximum)

    def __repr__(self) -> str:
        spacing = self.spacing or ("explicit" if self.stride is None else f"stride {self.stride}")
        clip = self.clip if isinstance(self.clip, str) else "none" if self.clip is None else f"{self.clip:g}"
        extra = "" if self.num_evaluations == self.steps else f"{self.num_evaluations} evaluations, "
        extra += f"eta={self.eta:g}, " if "eta" in SOLVERS[self.solver].takes else ""
        extra += f"{self.variance or 'fixed_small'}, " if "variance" in SOLVERS[self.solver].takes else ""
        return (
            f"Plan({self.solver}, {self.steps} of {self.schedule.num_timesteps} steps, {spacing}, {extra}"
            f"{self.prediction_type}, clip={clip}, {self.convention}, key={self.key})"
        )

    def inverted(self, *, evaluate_at: Literal["target", "source"] = "target") -> Plan:
        """DDIM inversion over this plan's timesteps, without clipping. Raises PlanError for a fitted plan."""
        refuse_fitted(self.solver, "an inversion")
        return Plan(
            schedule=self.schedule,
            timesteps=self.timesteps,
            solver="ddim_inversion",
            evaluate_at=evaluate_at,
            prediction_type=self.prediction_type,
            time_input=self.time_input,
            sigma_data=self.sigma_data,
            final_alpha_bar=self.final_alpha_bar,
        )

    def started_at(self, step: int) -> Plan:
        """The rest of this plan from its step `step`, in [0, S-1], on: for an image noised to that level.

        Raises PlanError for another `step`, for an inversion, which starts from an image without noise, and past the
        first step of a fitted plan.
        """
        if SOLVERS[self.solver].upward:
            raise PlanError(
                got=f"started_at of {self!r}",
                expected="a plan that leads from noise to an image",
                remedy="call plan.started_at(step).inverted() on the plan that was inverted",
            )
        timesteps = self.timesteps[check_integer("step", step, low=0, high=len(self.timesteps) - 1, error=PlanError) :]
        if step > 0:
            refuse_fitted(self.solver, "a start in the middle")
        kept = None if self.guidance_weights is None else self.guidance_weights[step:]
        return dataclasses.replace(self, steps=None, timesteps=timesteps, quality=None, guidance_weights=kept)

    def options(self) -> dict[str, Any]:
        """The keyword arguments that make this plan again, except its schedule, as plain values."""
        names = [each.name for each in dataclasses.fields(self) if each.init and each.name != "schedule"]
        options = {name: getattr(self, name) for name in names}
        # Of steps with a spacing and explicit timesteps, what the plan was made from.
        downward = self.timesteps[::-1] if SOLVERS[self.solver].upward else self.timesteps
        options["timesteps"] = [] if self.spacing is not None else list(downward)
        options["steps"] = self.steps if self.spacing is not None else None
        # Left out where they are not used: the manifests of older bundles, which have none, keep their bytes.
        for name in ("stride", "weights", "fit", "guidance_interval", "guidance_weights", "quality", "sigma_data"):
            if options[name] is None or (name == "quality" and options[name] == read_quality(None, self.fit)):
                del options[name]
        if self.time_input == "timestep":
            del options["time_input"]
        return {name: dataclasses.asdict(v) if isinstance(v, Fit | Quality) else v for name, v in options.items()}

    def _hash(self) -> str:
        return plan_key(
            self.stage_flags,
            self.thresholding,
            evaluation_timesteps=self.evaluation_timesteps,
            coefficients=self.coefficients,
        )
