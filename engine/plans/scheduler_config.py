"""diffusers' `scheduler_config.json`: the noise schedule a network was trained with, and how it wants to be sampled.

Every key is honoured or refused by name. A key that is missing has the default of the scheduler class that the file
names, as in diffusers; a key that no supported class has is refused, since ignoring it would draw other images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from skipstep.errors import ModelFormatError, ScheduleError
from skipstep.plans.coefficients import PREDICTION_TYPES, PredictionType
from skipstep.plans.schedule import BETA_SCHEDULES, NoiseSchedule
from skipstep.plans.spacing import Spacing

FILE_NAME = "scheduler_config.json"

_SHARED: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_CLIPPING: Mapping[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLDING: Mapping[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_DDIM: Mapping[str, Any] = {
    **_SHARED,
    **_CLIPPING,
    **_THRESHOLDING,
    "set_alpha_to_one": True,
    "rescale_betas_zero_snr": False,
}
_DDPM: Mapping[str, Any] = {
    **_SHARED,
    **_CLIPPING,
    **_THRESHOLDING,
    "variance_type": "fixed_small",
    "rescale_betas_zero_snr": False,
}
# Stable Diffusion's files name PNDM, which never clips; its Runge-Kutta warm-up is no part of a schedule.
_PNDM: Mapping[str, Any] = {**_SHARED, "skip_prk_steps": False, "set_alpha_to_one": False}

# The keys and defaults of each scheduler class.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"DDIMScheduler": _DDIM, "DDPMScheduler": _DDPM, "PNDMScheduler": _PNDM}

_SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What a scheduler configuration says; the fields are those of `skipstep.Plan`."""

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

    Raises ModelFormatError for a file that is missing or no JSON object, ScheduleError for a key or value that
    skipstep does not honour.
    """
    given = source if isinstance(source, Mapping) else _read_file(Path(source))
    class_name = given.get("_class_name", "DDIMScheduler")
    if class_name not in _DEFAULTS:
        raise ScheduleError(
            got=f"_class_name={class_name!r}",
            expected=f"one of {', '.join(_DEFAULTS)}",
            remedy="convert it with DDIMScheduler.from_config(scheduler.config), or pass schedule= yourself",
        )
    # Names that start with an underscore are diffusers' own notes: its version, the keys it filled in by default.
    keys = {key: value for key, value in given.items() if not key.startswith("_")}
    unknown = sorted(set(keys) - set(_DEFAULTS[class_name]))
    if unknown:
        raise _refused(unknown[0], keys[unknown[0]], f"a key of {class_name}", "remove it if the sampler may ignore it")
    return _interpret({**_DEFAULTS[class_name], **keys})


def _interpret(config: Mapping[str, Any]) -> SchedulerConfig:
    if config.get("variance_type") == "learned":
        raise _refused(
            "variance_type",
            config["variance_type"],
            "a fixed or a learned_range variance",
            "use a deterministic plan with the module itself, which ignores the variance",
        )
    prediction_type = _choice(config, "prediction_type", PREDICTION_TYPES)
    spacing = _choice(config, "timestep_spacing", _SPACINGS)
    offset = _integer(config, "steps_offset", low=0)
    schedule = _schedule(config)
    if _boolean(config, "rescale_betas_zero_snr", default=False):
        schedule = schedule.rescaled_to_zero_terminal_snr()
    clips = _boolean(config, "clip_sample", default=False)
    clip: float | Literal["dynamic"] | None = _number(config, "clip_sample_range") if clips else None
    quantile = maximum = None
    if _boolean(config, "thresholding", default=False):  # Which goes before clipping, as in diffusers.
        clip, quantile, maximum = (
            "dynamic",
            _number(config, "dynamic_thresholding_ratio"),
            _number(config, "sample_max_value"),
        )
    to_one = _boolean(config, "set_alpha_to_one", default=True)
    return SchedulerConfig(
        schedule=schedule,
        prediction_type=prediction_type,  # type: ignore[arg-type]
        clip=clip,
        dynamic_quantile=quantile,
        dynamic_maximum=maximum,
        spacing=spacing,  # type: ignore[arg-type]
        steps_offset=offset,
        final_alpha_bar=1.0 if to_one else float(schedule.alpha_bar[0]),
    )


def _schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    length = _integer(config, "num_train_timesteps", low=1)
    trained = config["trained_betas"]
    if trained is not None:
        if not isinstance(trained, list | tuple) or len(trained) != length:
            count = (
                f"{len(trained)} trained_betas" if isinstance(trained, list | tuple) else f"trained_betas={trained!r}"
            )
            raise ScheduleError(
                got=f"{count} with num_train_timesteps={length}",
                expected="a list with one beta per timestep",
                remedy="correct num_train_timesteps or the list",
            )
        return NoiseSchedule.from_betas(trained, name="trained_betas")
    name = _choice(config, "beta_schedule", tuple(BETA_SCHEDULES))
    if name == "squaredcos_cap_v2":
        return NoiseSchedule.cosine(length)
    return BETA_SCHEDULES[name](length, beta_start=_number(config, "beta_start"), beta_end=_number(config, "beta_end"))


def _read_file(path: Path) -> Mapping[str, Any]:
    file = path / FILE_NAME if path.is_dir() else path
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFormatError(
            got=f"no readable file {file} ({error.strerror})",
            expected="a diffusers scheduler configuration",
            remedy="pass the file, the folder that holds it, or schedule= instead",
        ) from error
    except ValueError as error:
        raise ModelFormatError(
            got=f"{file}, which is no JSON ({error})",
            expected="a JSON object",
            remedy="write it again with scheduler.save_pretrained()",
        ) from error
    if not isinstance(contents, dict):
        raise ModelFormatError(
            got=f"{file} holding a JSON {type(contents).__name__}",
            expected="a JSON object",
            remedy="write it again with scheduler.save_pretrained()",
        )
    return contents


def _refused(key: str, value: object, expected: str, remedy: str) -> ScheduleError:
    return ScheduleError(got=f"{key}={value!r} in a scheduler configuration", expected=expected, remedy=remedy)


def _choice(config: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = config[key]
    if value not in choices:
        raise _refused(key, value, f"one of {', '.join(choices)}", "pass the plan's settings yourself")
    return str(value)


def _integer(config: Mapping[str, Any], key: str, *, low: int) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise _refused(key, value, f"an integer ≥ {low}", "correct the file")
    return value


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise _refused(key, value, "a positive number", "correct the file")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise _refused(key, value, "true or false", "correct the file")
    return value
