"""The tables file of a bundle: numbers that were computed in float64 when the plans were made.

schedule/NUMBER      alpha_bar of a noise schedule, float64 [T]
KEY/coefficients     a plan's rows of weights, float32 [E, NUM_COLUMNS]
KEY/timesteps        the network's timestep input at each evaluation, float64 [E]
KEY/values/NAME      step inputs that follow from the timestep alone: a row for each distinct timestep, in order; where
                     labels are the only condition and kernels are there, also `by label/PART/NAME` (backends.early)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from numpy.typing import NDArray

from skipstep.bundles.manifest import Manifest, PlanEntry
from skipstep.errors import BundleError, PlanError, ScheduleError
from skipstep.plans.plan import Plan
from skipstep.plans.schedule import NoiseSchedule
from skipstep.plans.stored import with_tables

FILE_NAME: Final = "tables.safetensors"
Arrays = Mapping[str, NDArray[Any]]


def write_tables(schedules: Iterable[NoiseSchedule], plans: Iterable[tuple[Plan, Arrays]]) -> bytes:
    """The file of these schedules, which the manifest refers to by number, and of plans, each with its step inputs."""
    from safetensors.numpy import save

    arrays: dict[str, NDArray[Any]] = {f"schedule/{i}": each.alpha_bar for i, each in enumerate(schedules)}
    for plan, values in plans:
        arrays |= plan_arrays(plan, values)
    return save(arrays)


def plan_arrays(plan: Plan, values: Arrays) -> dict[str, NDArray[Any]]:
    """What the file holds of one plan, with its step inputs."""
    return {
        f"{plan.key}/coefficients": plan.coefficients,
        f"{plan.key}/timesteps": plan.evaluation_timesteps,
        **{f"{plan.key}/values/{name}": array for name, array in values.items()},
    }


def read_plans(manifest: Manifest, arrays: Arrays) -> list[Plan]:
    """The manifest's plans with the numbers of the tables file. Raises BundleError where they do not fit together."""
    return [_read_plan(entry, arrays) for entry in manifest.plans]


def plan_values(plan: Plan, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The stored step inputs of a plan, by name: a row for each of its distinct timesteps."""
    prefix = f"{plan.key}/values/"
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def default_options(manifest: Manifest, arrays: Arrays) -> dict[str, Any]:
    """The options of a step count's plan, its schedule among them; empty where the model names none."""
    if manifest.defaults is None or manifest.default_schedule is None:
        return {}
    return {**manifest.defaults, "schedule": _read_schedule(manifest.default_schedule, arrays)}


def _read_schedule(number: int, arrays: Arrays) -> NoiseSchedule:
    try:
        return NoiseSchedule(arrays[f"schedule/{number}"], name="stored")
    except KeyError as error:
        raise _mismatch(f"no schedule {number}") from error
    except ScheduleError as error:
        raise _mismatch(error.got) from error


def _read_plan(entry: PlanEntry, arrays: Arrays) -> Plan:
    try:
        plan = Plan(schedule=_read_schedule(entry.schedule, arrays), **entry.options)
        stored = with_tables(plan, arrays[f"{entry.key}/coefficients"], arrays[f"{entry.key}/timesteps"])
    except (PlanError, TypeError, KeyError) as error:
        raise _mismatch(f"plan {entry.key}: {error}") from error
    if stored.key != entry.key:
        raise _mismatch(f"plan {entry.key} whose tables have the key {stored.key}")
    return stored


def _mismatch(got: str) -> BundleError:
    return BundleError(
        got=f"a manifest and tables that do not fit together: {got}",
        expected="plans and the tables that they were exported with",
        remedy="export the bundle again with this version of skipstep",
    )
