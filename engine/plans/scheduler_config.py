"""diffusers' scheduler configuration as a noise schedule and the options of plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from skipstep.plans.diffusers_config import read_diffusers_config, scheduler_contents
from skipstep.plans.family_config import FAMILIES, read_family
from skipstep.plans.parameterization import PredictionType, State, TimeInput
from skipstep.plans.schedule import NoiseSchedule
from skipstep.plans.spacing import Spacing


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The contents of a scheduler configuration. The fields are those of `skipstep.Plan`, but for `state`, what the
    network reads of a noised sample (skipstep.plans.parameterization)."""

    schedule: NoiseSchedule
    prediction_type: PredictionType
    final_alpha_bar: float
    clip: float | Literal["dynamic"] | None = None
    dynamic_quantile: float | None = None
    dynamic_maximum: float | None = None
    spacing: Spacing = "linspace"
    steps_offset: int = 0
    solver: str = "ddim"
    time_input: TimeInput = "timestep"
    state: State = "vp"
    sigma_data: float | None = None

    def plan_options(self) -> dict[str, Any]:
        """The keyword arguments of `Plan` that sample as the configuration says; a step count completes them."""
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "state"}
        for name, usual in (("solver", "ddim"), ("time_input", "timestep"), ("sigma_data", None)):
            if options[name] == usual:
                del options[name]
        return options


def read_scheduler_config(source: str | Path | Mapping[str, Any]) -> SchedulerConfig:
    """Read a `scheduler_config.json`, the folder that holds one, or its contents as a mapping.

    The plans of a file are DDIM's, whatever sampler it names, and LCM's for that.
    Raises ModelFormatError for a file that is missing or no JSON object, ScheduleError for a key or value that is not
    supported.
    """
    contents = scheduler_contents(source)
    class_name = contents.get("_class_name")
    if isinstance(class_name, str) and class_name in FAMILIES:
        return SchedulerConfig(**read_family(class_name, contents))
    read = read_diffusers_config(contents)
    schedule = NoiseSchedule.from_diffusers(contents)
    is_consistency = class_name == "LCMScheduler"
    return SchedulerConfig(
        schedule=schedule,
        prediction_type=read.prediction_type,  # type: ignore[arg-type]
        final_alpha_bar=1.0 if read.set_alpha_to_one else float(schedule.alpha_bar[0]),
        clip=read.clip,
        dynamic_quantile=read.dynamic_quantile,
        dynamic_maximum=read.dynamic_maximum,
        spacing="lcm" if is_consistency else read.timestep_spacing,  # type: ignore[arg-type]
        steps_offset=read.steps_offset,
        solver="lcm" if is_consistency else "ddim",
    )
