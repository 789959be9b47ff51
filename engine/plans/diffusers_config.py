"""diffusers' `scheduler_config.json` as checked values, before a schedule or a plan is made of them.

Every key is supported, refused by name, or named in the log where it concerns the inner workings of another sampler
than DDIM. A key that is missing has the default of the scheduler class that the file names, as in diffusers. Files
carry keys of other classes from one conversion to the next, and DDIMScheduler.from_config takes what it knows of them:
so does this. A key that no class has is refused, since ignoring it could draw other images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from skipstep.errors import ScheduleError, check_integer, check_number, check_path, shown
from skipstep.storage.untrusted import read_json_object

FILE_NAME = "scheduler_config.json"
# A hundred times what networks are trained with: a schedule is an array of this length, and spacings search through it.
MAX_TIMESTEPS: Final = 100_000

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
# Stable Diffusion's files name PNDM, which never clips; its Runge-Kutta warm-up is not part of a schedule.
_PNDM: Mapping[str, Any] = {**_SHARED, "skip_prk_steps": False, "set_alpha_to_one": False}
_SIGMAS: Mapping[str, Any] = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW: Mapping[str, Any] = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_EULER_ANCESTRAL: Mapping[str, Any] = {**_SHARED, "timestep_spacing": "linspace", "rescale_betas_zero_snr": False}
_EULER: Mapping[str, Any] = {
    **_EULER_ANCESTRAL,
    **_SIGMAS,
    "interpolation_type": "linear",
    "sigma_min": None,
    "sigma_max": None,
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
}
_LMS: Mapping[str, Any] = {**_SHARED, **_SIGMAS, "timestep_spacing": "linspace"}
_KDPM2: Mapping[str, Any] = {**_LMS, "beta_start": 0.00085, "beta_end": 0.012}
_DEIS: Mapping[str, Any] = {
    **_LMS,
    **_THRESHOLDING,
    **_FLOW,
    "solver_order": 2,
    "algorithm_type": "deis",
    "solver_type": "logrho",
    "lower_order_final": True,
}
_UNIPC: Mapping[str, Any] = {
    **_LMS,
    **_THRESHOLDING,
    **_FLOW,
    "rescale_betas_zero_snr": False,
    "solver_order": 2,
    "predict_x0": True,
    "solver_type": "bh2",
    "lower_order_final": True,
    "disable_corrector": [],
    "solver_p": None,
    "final_sigmas_type": "zero",
    "sigma_min": None,
    "sigma_max": None,
    "shift_terminal": None,
}
_SINGLESTEP: Mapping[str, Any] = {
    **{key: value for key, value in _SHARED.items() if key not in ("timestep_spacing", "steps_offset")},
    **_THRESHOLDING,
    **_SIGMAS,
    **_FLOW,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}
_MULTISTEP: Mapping[str, Any] = {
    **_SHARED,
    **_SINGLESTEP,
    "timestep_spacing": "linspace",
    "lower_order_final": True,
    "euler_at_final": False,
    "use_lu_lambdas": False,
    "rescale_betas_zero_snr": False,
}
_LCM: Mapping[str, Any] = {
    **_DDIM,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}

# The keys and defaults of each scheduler class whose process is that of a NoiseSchedule. Whatever class a file names,
# step counts become plans of DDIM on its schedule.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "PNDMScheduler": _PNDM,
    "EulerDiscreteScheduler": _EULER,
    "EulerAncestralDiscreteScheduler": _EULER_ANCESTRAL,
    "HeunDiscreteScheduler": {**_KDPM2, **_CLIPPING, "clip_sample": False},
    "KDPM2DiscreteScheduler": _KDPM2,
    "KDPM2AncestralDiscreteScheduler": _KDPM2,
    "LMSDiscreteScheduler": _LMS,
    "DEISMultistepScheduler": _DEIS,
    "UniPCMultistepScheduler": _UNIPC,
    "DPMSolverMultistepScheduler": _MULTISTEP,
    "DPMSolverSinglestepScheduler": _SINGLESTEP,
    "DPMSolverSDEScheduler": {**_KDPM2, "noise_sampler_seed": None},
    "LCMScheduler": _LCM,
    "TCDScheduler": _LCM,
}
# What a class does not say: it never clips, and one has no choice of its timesteps, which are those of linspace.
_UNSAID: Final[Mapping[str, Any]] = {
    **_DDIM,
    "clip_sample": False,
    "timestep_spacing": "linspace",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "use_flow_sigmas": False,
}
_KNOWN: Final[Mapping[str, Any]] = {key: value for each in _DEFAULTS.values() for key, value in each.items()}
# Of other classes, why there is no such schedule.
_OTHER_PROCESSES: Mapping[str, str] = {
    "EDM": "the network reads sigma and a scaled state (EDM); skipstep.read_scheduler_config reads it",
    "FlowMatch": "the state is (1 - s)·image + s·noise; skipstep.read_scheduler_config reads it where levels are fixed",
    "ScoreSdeVe": "noise is added and the image is not made smaller (variance exploding)",
    "KarrasVe": "noise is added and the image is not made smaller (variance exploding)",
    "CMStochasticIterative": "the network leads to the image in one step (a consistency model)",
    "IPNDM": "it has noise levels of its own, which its file does not hold",
}
# What says how another sampler works: its order, which timesteps it visits, how it ends. A value other than the default
# is named in the log and has no effect.
_INNER: Final = frozenset(
    {
        *("skip_prk_steps", "variance_type", "interpolation_type", "sigma_min", "sigma_max", "use_lu_lambdas"),
        *("solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final"),
        *("lambda_min_clipped", "predict_x0", "disable_corrector", "solver_p", "shift_terminal", "noise_sampler_seed"),
        *("original_inference_steps", "timestep_scaling", *_SIGMAS),
        *(key for key in _FLOW if key != "use_flow_sigmas"),
    }
)
# Named once in a process.
_NAMED: set[str] = set()

_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
_CORRECT = "correct the scheduler configuration"
_SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, slots=True)
class DiffusersConfig:
    """The values of the keys, by diffusers' names; `clip` stands for the keys about clipping and thresholding.

    `dynamic_quantile` and `dynamic_maximum` belong to `clip` "dynamic".
    """

    num_train_timesteps: int
    beta_schedule: str
    beta_start: float
    beta_end: float
    trained_betas: tuple[float, ...] | None
    rescale_betas_zero_snr: bool
    prediction_type: str
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    clip: float | Literal["dynamic"] | None
    dynamic_quantile: float | None
    dynamic_maximum: float | None


def read_diffusers_config(source: str | Path | Mapping[str, Any]) -> DiffusersConfig:
    """Read a `scheduler_config.json`, the folder that holds one, or its contents as a mapping.

    Raises ModelFormatError for a file that is missing or no JSON object, ScheduleError for a key or value that is not
    supported.
    """
    contents = scheduler_contents(source)
    class_name = contents.get("_class_name", "DDIMScheduler")
    if not isinstance(class_name, str) or class_name not in _DEFAULTS:
        other = next((why for start, why in _OTHER_PROCESSES.items() if str(class_name).startswith(start)), None)
        raise ScheduleError(
            got=f"_class_name={shown(class_name)}" + ("" if other is None else f": {other}"),
            expected=f"one of {', '.join(_DEFAULTS)}",
            remedy="pass schedule= yourself, if the network predicts for √alpha_bar·image + √(1-alpha_bar)·noise",
        )
    # Names that start with an underscore are diffusers' own notes: its version, the keys it filled in by default.
    keys = {key: value for key, value in contents.items() if not str(key).startswith("_")}
    unknown = sorted(set(keys) - set(_KNOWN), key=str)
    if unknown:
        raise _refused(
            unknown[0], keys[unknown[0]], "a key of the supported schedulers", "remove it if the sampler may ignore it"
        )
    return _interpret(class_name, {**_UNSAID, **_DEFAULTS[class_name], **keys})


def scheduler_contents(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys and values as they stand. Raises ModelFormatError for a file that is missing or no JSON object."""
    if isinstance(source, Mapping):
        return source
    path = Path(check_path("config", source))
    file = path / FILE_NAME if path.is_dir() else path
    return read_json_object(file, remedy="write it with scheduler.save_pretrained(), or pass schedule= instead")


def _interpret(class_name: str, config: Mapping[str, Any]) -> DiffusersConfig:
    if _boolean(config, "use_flow_sigmas"):
        raise _refused("use_flow_sigmas", True, "false", "pass schedule= yourself: flow matching has another process")
    if config["timestep_type"] != "discrete":
        raise _refused("timestep_type", config["timestep_type"], "'discrete'", "use a network that takes timesteps")
    _name_unused(class_name, config)
    for key, value in (("original_inference_steps", 50), ("timestep_scaling", 10.0)):
        if class_name == "LCMScheduler" and config[key] != value:
            raise _refused(key, config[key], str(value), "pass Plans, for example of solver='ddim', and schedule=")
    if class_name == "DDPMScheduler" and config["variance_type"] == "learned":
        raise _refused(
            "variance_type",
            config["variance_type"],
            "a fixed or a learned_range variance",
            "use a deterministic plan with the module itself, which ignores the variance",
        )
    clips = _boolean(config, "clip_sample")
    clip: float | Literal["dynamic"] | None = _number(config, "clip_sample_range") if clips else None
    quantile = maximum = None
    if _boolean(config, "thresholding"):  # This goes before clipping, as in diffusers.
        clip = "dynamic"
        quantile, maximum = _number(config, "dynamic_thresholding_ratio"), _number(config, "sample_max_value")
    length = _integer(config, "num_train_timesteps", low=1, high=MAX_TIMESTEPS)
    # What others call DDIM's set_alpha_to_one.
    ends_at_timestep_0 = _choice(config, "final_sigmas_type", ("zero", "sigma_min")) == "sigma_min"
    return DiffusersConfig(
        num_train_timesteps=length,
        beta_schedule=_choice(config, "beta_schedule", _BETA_SCHEDULES),
        beta_start=_number(config, "beta_start"),
        beta_end=_number(config, "beta_end"),
        trained_betas=_trained_betas(config["trained_betas"], length),
        rescale_betas_zero_snr=_boolean(config, "rescale_betas_zero_snr"),
        prediction_type=_choice(config, "prediction_type", ("epsilon", "v_prediction", "sample")),
        timestep_spacing=_choice(config, "timestep_spacing", _SPACINGS),
        steps_offset=_integer(config, "steps_offset", low=0, high=length),
        set_alpha_to_one=_boolean(config, "set_alpha_to_one") and not ends_at_timestep_0,
        clip=clip,
        dynamic_quantile=quantile,
        dynamic_maximum=maximum,
    )


def _name_unused(class_name: str, config: Mapping[str, Any]) -> None:
    defaults = {**_KNOWN, **_DEFAULTS[class_name]}
    inner = sorted((_INNER - {"variance_type"} if class_name == "DDPMScheduler" else _INNER) & set(config))
    name_unused(class_name, [f"{key}={shown(config[key])}" for key in inner if config[key] != defaults[key]])


def name_unused(class_name: str, unused: Sequence[str]) -> None:
    """Say in the log, once in a process, which keys of a file have no effect."""
    told = f"{class_name}: {', '.join(unused)} concern another sampler, and plans of step counts do not use them"
    if unused and told not in _NAMED:
        from skipstep.reporting import LOGGER  # Logging is slow to import.

        _NAMED.add(told)
        LOGGER.warning("%s", told)


def _trained_betas(betas: Any, length: int) -> tuple[float, ...] | None:
    if betas is None:
        return None
    if not isinstance(betas, list | tuple) or len(betas) != length:
        count = f"{len(betas)} trained_betas" if isinstance(betas, list | tuple) else f"trained_betas={shown(betas)}"
        raise ScheduleError(
            got=f"{count} with num_train_timesteps={length}",
            expected="a list with one beta per timestep",
            remedy="correct num_train_timesteps or the list",
        )
    return tuple(
        check_number("trained_betas", beta, low=0.0, high=1.0, remedy=_CORRECT, error=ScheduleError) for beta in betas
    )


def _refused(key: str, value: object, expected: str, remedy: str) -> ScheduleError:
    return ScheduleError(got=f"{key}={shown(value)} in a scheduler configuration", expected=expected, remedy=remedy)


def _choice(config: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = config[key]
    if not isinstance(value, str) or value not in choices:
        raise _refused(key, value, f"one of {', '.join(choices)}", "pass the plan's settings yourself")
    return str(value)


def _integer(config: Mapping[str, Any], key: str, *, low: int, high: int) -> int:
    return check_integer(key, config[key], low=low, high=high, remedy=_CORRECT, error=ScheduleError)


def _number(config: Mapping[str, Any], key: str) -> float:
    return check_number(key, config[key], low=0.0, above=True, remedy=_CORRECT, error=ScheduleError)


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config[key]
    if not isinstance(value, bool):
        raise _refused(key, value, "true or false", _CORRECT)
    return value
