"""diffusers' scheduler configurations of the families that are not DDPM's: EDM and flow matching.

As in skipstep.plans.diffusers_config a key is used, refused by name, or named in the log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from skipstep.errors import ScheduleError, check_integer, check_number, shown
from skipstep.plans.diffusers_config import MAX_TIMESTEPS, name_unused
from skipstep.plans.schedule import NoiseSchedule

_EDM: Final[Mapping[str, Any]] = {
    "num_train_timesteps": 1000,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
    "prediction_type": "epsilon",
    "final_sigmas_type": "zero",
}
_FLOW: Final[Mapping[str, Any]] = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}
_REFUSED_FLOW: Final = {"use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None}
# Those that another value of says how another sampler works, with the defaults of diffusers.
_INNER: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"), False),
    **dict.fromkeys(("thresholding", "euler_at_final"), False),
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
}
# Of thresholding and dynamic shifting, which are off.
_IDLE: Final = frozenset(
    {
        *("dynamic_thresholding_ratio", "sample_max_value", "base_shift", "max_shift", "base_image_seq_len"),
        *("max_image_seq_len", "time_shift_type"),
    }
)
FAMILIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
}


def read_family(class_name: str, contents: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a SchedulerConfig. Raises ScheduleError for a key or value that is not supported."""
    keys = {key: value for key, value in contents.items() if not str(key).startswith("_")}
    defaults = FAMILIES[class_name]
    known = {*defaults, *_INNER, *_IDLE, *(_REFUSED_FLOW if defaults is _FLOW else ())}
    for key in sorted(set(keys) - known, key=str):
        raise _refused(key, keys[key], "a key of this scheduler", "remove it if the sampler may ignore it")
    config = {**defaults, **keys}
    unused = {key: value for key, value in _INNER.items() if key in keys and keys[key] != value}
    name_unused(class_name, [f"{key}={shown(keys[key])}" for key in unused])
    length = check_integer(
        "num_train_timesteps", config["num_train_timesteps"], low=1, high=MAX_TIMESTEPS, error=ScheduleError
    )
    return _read_flow(config, length) if defaults is _FLOW else _read_edm(config, length)


def _read_edm(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    for key, choices in (
        ("prediction_type", ("epsilon",)),
        ("sigma_schedule", ("karras", "exponential")),
        ("final_sigmas_type", ("zero", "sigma_min")),
    ):
        if config[key] not in choices:
            raise _refused(key, config[key], f"one of {', '.join(choices)}", "pass schedule= and Plans yourself")
    low, high, rho, sigma_data = (
        check_number(key, config[key], low=0.0, above=True, error=ScheduleError)
        for key in ("sigma_min", "sigma_max", "rho", "sigma_data")
    )
    if config["sigma_schedule"] == "karras":
        schedule = NoiseSchedule.karras(length, sigma_min=low, sigma_max=high, rho=rho)
    else:
        sigmas = np.exp(np.linspace(math.log(high), math.log(low), length))
        schedule = NoiseSchedule.from_sigmas(sigmas, name=f"exponential {low:g} to {high:g}")
    ends_clean = config["final_sigmas_type"] == "zero"
    return {
        "schedule": schedule,
        "prediction_type": "edm",
        "final_alpha_bar": 1.0 if ends_clean else float(schedule.alpha_bar[0]),
        "time_input": "c_noise",
        "state": "edm",
        "sigma_data": sigma_data,
    }


def _read_flow(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    for key, wanted in _REFUSED_FLOW.items():
        if config.get(key, wanted) != wanted:
            remedy = "pass schedule=NoiseSchedule.flow(shift=...) with the shift of your image size"
            raise _refused(key, config[key], shown(wanted), remedy)
    schedule = NoiseSchedule.flow(length, shift=config["shift"])
    return {
        "schedule": schedule,
        "prediction_type": "flow",
        "final_alpha_bar": 1.0,
        "time_input": "flow",
        "state": "flow",
        "sigma_data": None,
    }


def _refused(key: str, value: object, expected: str, remedy: str) -> ScheduleError:
    return ScheduleError(got=f"{key}={shown(value)} in a scheduler configuration", expected=expected, remedy=remedy)
