"""diffusers' scheduler configuration as a noise schedule and the options of plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from skipstep.plans.diffusers_config import read_diffusers_config
from skipstep.plans.parameterization import PredictionType
from skipstep.plans.schedule import NoiseSchedule
from skipstep.plans.spacing import Spacing


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The contents of a scheduler configuration; the fields are those of `skipstep.Plan`."""

    schedule: NoiseSchedule
    prediction_type: PredictionType
    clip: float | Literal["dynamic"] | None
    dynamic_quantile: float | None
    dynamic_maximum: float | None
    spacing: Spacing
    steps_offset: int
    final_alpha_bar: float

    def plan_options(self) -> dict[str, Any]:
        """The keyword arguments of `Plan` that sample as the configuration says; a step count completes them."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def read_scheduler_config(source: str | Path | Mapping[str, Any]) -> SchedulerConfig:
    """Read a `scheduler_config.json`, the folder that holds one, or its contents as a mapping.

    Raises ModelFormatError for a file that is missing or no JSON object, ScheduleError for a key or value that is not
    supported.
    """
    read = read_diffusers_config(source)
    schedule = NoiseSchedule.from_diffusers(source)
    return SchedulerConfig(
        schedule=schedule,
        prediction_type=read.prediction_type,  # type: ignore[arg-type]
        clip=read.clip,
        dynamic_quantile=read.dynamic_quantile,
        dynamic_maximum=read.dynamic_maximum,
        spacing=read.timestep_spacing,  # type: ignore[arg-type]
        steps_offset=read.steps_offset,
        final_alpha_bar=1.0 if read.set_alpha_to_one else float(schedule.alpha_bar[0]),
    )
