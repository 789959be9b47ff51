"""From LeRobot's DiffusionPolicy, or a policy of the same form, to a policy engine.

Read of the policy: `config` (horizon, n_obs_steps, n_action_steps, features, normalization_mapping) and `diffusion`,
with its `unet(x [B, horizon, A], timestep, global_cond)`, its `noise_scheduler`, its `num_inference_steps` and the
encoder `_prepare_global_conditioning(batch)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Unpack

import numpy as np

from skipstep.arrays import number_array
from skipstep.engine import Engine
from skipstep.errors import (
    InputError,
    ModelFormatError,
    PlanError,
    check_choice,
    check_integer,
    check_items,
    check_path,
    needs_packages,
    shown,
)
from skipstep.networks.condition import Condition
from skipstep.plans.plan import Plan
from skipstep.plans.scheduler_config import read_scheduler_config
from skipstep.robotics.features import Feature, Kind, Normalisation, PolicySpec
from skipstep.robotics.policy import CONDITION, PolicyEngine
from skipstep.storage.untrusted import read_json_object

if TYPE_CHECKING:
    from skipstep.building import BuildOptions

_PREPROCESSOR: Final = "policy_preprocessor.json"
_MODES: Final[Mapping[str, tuple[Literal["min_max", "mean_std"], str, str]]] = {
    "MIN_MAX": ("min_max", "min", "max"),
    "MEAN_STD": ("mean_std", "mean", "std"),
    "QUANTILES": ("min_max", "q01", "q99"),
    "QUANTILE10": ("min_max", "q10", "q90"),
}
# LeRobot's names of the kinds of features, and of the entries of a batch.
_KINDS: Final[Mapping[str, Kind]] = {"STATE": "state", "VISUAL": "image", "ENV": "environment", "ACTION": "action"}
_VARIANCES: Final = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}


def from_policy(
    policy: Any,
    *,
    plans: Iterable[int | Plan] = (),
    solver: Literal["ddpm", "ddim"] | None = None,
    statistics: Mapping[str, Mapping[str, Any]] | None = None,
    batch_sizes: Iterable[int] = (1,),
    **options: Unpack[BuildOptions],
) -> PolicyEngine:
    """Compile a policy for a control loop.

    policy      LeRobot's DiffusionPolicy, or the folder that its save_pretrained wrote, for which lerobot is needed.
    plans       step counts, which sample as the policy's own scheduler does with that many, or Plans; left out, the
                policy's own number.
    solver      of the step counts, where it is not to be that of the policy's scheduler: "ddim" runs a policy with a
                DDPM scheduler in few steps.
    statistics  of the data set, by feature and then by "min", "max", "mean", "std": LeRobot's dataset_stats. None:
                those beside the policy in a folder; a policy object has none, takes observations that are normalised
                and gives actions that are.
    options     backend, device, num_threads and so on: skipstep.building.BuildOptions.

    Raises InputError, PlanError, ModelFormatError, ExportError, MissingDependencyError.
    """
    reserved = {"conditions", "sample_shape", "scheduler"} & options.keys()
    if reserved:
        raise InputError(
            got=f"{', '.join(sorted(reserved))} beside a policy",
            expected="what the policy itself says",
            remedy="leave it out",
        )
    if solver is not None:
        check_choice("solver", solver, ("ddpm", "ddim"))
    if isinstance(policy, str | os.PathLike):
        folder = Path(check_path("policy", policy))
        policy = _read_folder(folder)
        statistics = read_statistics(folder) if statistics is None else statistics
    _check_form(policy)
    spec = read_spec(policy.config, statistics)
    made = scheduler_plans(policy.diffusion, plans, solver)
    from skipstep.robotics.encoder import export_observations  # Needs torch.

    graph, width = export_observations(policy, spec)
    options["scheduler"] = policy.diffusion.noise_scheduler
    options["sample_shape"] = (spec.horizon, *spec.action.shape)
    options["conditions"] = {CONDITION: Condition((width,), null="same")}
    unet = policy.diffusion.unet
    engine = Engine.build(
        getattr(unet, "_orig_mod", unet),  # What torch.compile was given.
        plans=made,
        batch_sizes=batch_sizes,
        **options,
    )
    return PolicyEngine(engine, spec, graph)


def scheduler_plans(diffusion: Any, plans: Iterable[int | Plan], solver: str | None) -> list[Plan]:
    """The plans of step counts that visit the timesteps of the policy's own scheduler, with its variance."""
    scheduler = diffusion.noise_scheduler
    name, config = type(scheduler).__name__, dict(scheduler.config)
    options = read_scheduler_config({"_class_name": name, **config}).plan_options()
    chosen = solver or name.removesuffix("Scheduler").lower()
    spacing, variance = options["spacing"], config.get("variance_type", "fixed_small")
    if chosen not in ("ddpm", "ddim") or spacing != "leading" or variance not in _VARIANCES:
        raise InputError(
            got=f"a {name} with {spacing} spacing and variance {shown(variance)}",
            expected="DDPMScheduler or DDIMScheduler with leading spacing and a fixed variance, as LeRobot makes them",
            remedy="pass plans=[Plan(...)] with solver='ddim'",
        )
    if chosen == "ddpm":
        options |= {"solver": "ddpm", "variance": _VARIANCES[variance]}
    given = check_items("plans", plans, expected="step counts or Plans", remedy="pass plans=[10]", error=PlanError)
    return [
        each if isinstance(each, Plan) else Plan(**options, steps=check_integer("plans", each, low=1, error=PlanError))
        for each in given or [diffusion.num_inference_steps]
    ]


def read_spec(config: Any, statistics: Mapping[str, Mapping[str, Any]] | None) -> PolicySpec:
    """The times and features in a policy's configuration. Raises InputError for statistics that do not fit."""
    if statistics is not None and not isinstance(statistics, Mapping):
        raise InputError(
            got=f"statistics={shown(statistics)}",
            expected="a mapping by feature and then by 'min', 'max', 'mean' or 'std'",
            remedy="pass dataset.meta.stats",
        )
    modes = {str(kind): getattr(mode, "value", mode) for kind, mode in config.normalization_mapping.items()}

    def feature(name: str, kind: str, shape: Iterable[int]) -> Feature:
        normalisation = None if statistics is None else _normalisation(name, modes.get(kind, "IDENTITY"), statistics)
        return Feature(name, _KINDS[kind], tuple(shape), normalisation)

    observations = [feature("observation.state", "STATE", config.robot_state_feature.shape)]
    observations += [feature(name, "VISUAL", each.shape) for name, each in config.image_features.items()]
    if config.env_state_feature:
        observations.append(feature("observation.environment_state", "ENV", config.env_state_feature.shape))
    action = feature("action", "ACTION", config.action_feature.shape)
    return PolicySpec(config.horizon, config.n_obs_steps, config.n_action_steps, tuple(observations), action)


def _normalisation(name: str, mode: str, statistics: Mapping[str, Mapping[str, Any]]) -> Normalisation | None:
    if mode == "IDENTITY" or name not in statistics:  # As LeRobot: a feature without statistics stays as it is.
        return None
    if mode not in _MODES:
        raise InputError(got=f"the normalisation {mode} of {name!r}", expected=f"one of {', '.join(_MODES)}",
                         remedy="normalise before the call, and leave statistics out")  # fmt: skip
    ours, *keys = _MODES[mode]
    found = []
    for key in keys:
        own = statistics[name]
        numbers = number_array(own[key]) if isinstance(own, Mapping) and key in own else None
        if numbers is None or not numbers.size or not np.all(np.isfinite(numbers)):
            raise InputError(
                got=f"no finite numbers {key!r} among the statistics of {name!r}",
                expected=f"{' and '.join(keys)}, which its normalisation {mode} needs",
                remedy="pass dataset.meta.stats of the data set that the policy was trained on",
            )
        # As float32, in which LeRobot computes.
        found.append(tuple(np.asarray(numbers, np.float32).ravel().tolist()))
    return Normalisation(ours, *found)


def read_statistics(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The data set's statistics in a folder that LeRobot wrote; None where it has no normaliser with statistics."""
    path = folder / _PREPROCESSOR
    if not path.exists():
        return None
    remedy = "save the policy and its preprocessor again with save_pretrained"
    steps = read_json_object(path, remedy=remedy).get("steps")
    files = [
        each.get("state_file")
        for each in (steps if isinstance(steps, list) else ())
        if isinstance(each, dict) and each.get("registry_name") == "normalizer_processor"
    ]
    if not files or files[0] is None:
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from skipstep.storage.verified import read_below

    found: dict[str, dict[str, Any]] = {}
    try:
        tensors = load(read_below(folder, files[0], limit=1 << 28))
    except (SafetensorError, ValueError) as error:
        raise ModelFormatError(
            got=f"{folder / str(files[0])}, which holds no statistics ({error})", expected="a safetensors file",
            remedy=remedy,
        ) from error  # fmt: skip
    for name, array in tensors.items():
        feature, _, key = name.rpartition(".")
        found.setdefault(feature, {})[key] = array
    return found


def _read_folder(folder: Path) -> Any:
    with needs_packages(
        "lerobot, whose class reads the folder of a policy", remedy="pip install lerobot, or pass the policy object"
    ):
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    if not (folder / "config.json").is_file():
        raise ModelFormatError(
            got=f"{folder}, without config.json",
            expected="the folder that a DiffusionPolicy's save_pretrained wrote",
            remedy="download the whole folder and pass its path",
        )
    return DiffusionPolicy.from_pretrained(folder, local_files_only=True)


def _check_form(policy: Any) -> None:
    diffusion = getattr(policy, "diffusion", None)
    parts = ("unet", "noise_scheduler", "num_inference_steps", "_prepare_global_conditioning")
    missing = [f"diffusion.{name}" for name in parts if not hasattr(diffusion, name)]
    if not hasattr(policy, "config") or missing:
        raise InputError(
            got=f"a policy of type {type(policy).__name__} without {', '.join(missing) or 'config'}",
            expected="LeRobot's DiffusionPolicy, or one of the same form",
            remedy="pass the policy object, or the folder that its save_pretrained wrote",
        )
