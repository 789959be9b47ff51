"""What comes from outside as the arguments of `Engine.sample` and `Batcher.submit`: by their names, and bounded.

A plan goes by its key or its step count, or follows from a deadline. Any other name is that of a condition, with
`negative_` in front for the unconditional half of guidance. Only names, numbers and text are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.arrays import number_array
from skipstep.engine import Engine
from skipstep.errors import InputError, PlanNotFoundError, shown
from skipstep.latency.deadline import choose_plan
from skipstep.plans.plan import Plan

PLAN_NAMES = ("steps", "plan", "deadline_ms")
NAMES = ("seeds", "class_labels", "prompt_embeds", "negative_prompt_embeds", "guidance_scale", "guidance_rescale")
NEGATIVE = "negative_"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one request: samples, evaluations of its plan, and bytes of the samples that it is answered with."""

    samples: int = 64
    evaluations: int = 1000
    bytes: int = 1 << 26


def call_arguments(engine: Engine, fields: Mapping[str, Any], limits: Limits | None = None) -> dict[str, Any]:
    """The arguments of a call, for any network; the call checks their values. Raises InputError, PlanNotFoundError, and
    what `deadline_ms` does."""
    arguments: dict[str, Any] = {"conditions": {}, "negative_conditions": {}}
    known = engine.network.passed_conditions
    for name, value in fields.items():
        if name in NAMES:
            arguments[name] = value
        elif name in known:
            arguments["conditions"][name] = value
        elif name.removeprefix(NEGATIVE) in known and name.startswith(NEGATIVE):
            arguments["negative_conditions"][name.removeprefix(NEGATIVE)] = value
        elif name not in PLAN_NAMES:
            raise InputError(
                got=f"{shown(name)} in a request",
                expected=f"names among {', '.join((*PLAN_NAMES, *NAMES, *known))}",
                remedy="leave it out, or call it by its name",
            )
    seeds: Any = fields.get("seeds")
    several = isinstance(seeds, list | tuple) or (isinstance(seeds, np.ndarray) and seeds.ndim)
    num_samples = len(seeds) if several else 1
    if limits is not None:
        _check("samples", num_samples, limits.samples)
        _check("bytes of samples", 4 * num_samples * math.prod(engine.network.sample_shape), limits.bytes)
    arguments["plan"] = plan = _plan(engine, fields, num_samples)
    if limits is not None:
        _check("network evaluations", plan.num_evaluations, limits.evaluations)
    if fields.get("deadline_ms") is not None:
        arguments["deadline_ms"] = fields["deadline_ms"]
    return arguments


def draw_rows(engine: Engine, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """A sample for each row: `columns` of equal length by the same names. Rows of equal plans are drawn together."""
    name = "plan" if "plan" in columns else "steps"
    if "seeds" not in columns or name not in columns:
        raise InputError(
            got=f"rows of {', '.join(columns)}",
            expected="a column seeds, and one of steps or plan",
            remedy="add them: a sample is its seed and its plan",
        )
    samples = np.empty((len(columns["seeds"]), *engine.network.sample_shape), np.float32)
    for rows in _groups(columns[name]):
        fields = {each: column[rows] for each, column in columns.items() if each not in PLAN_NAMES}
        arguments = call_arguments(engine, {**fields, name: columns[name][rows[0]]})
        samples[rows] = engine.sample(**arguments)
    return samples


def _groups(values: NDArray[Any]) -> Iterator[NDArray[np.int64]]:
    for value in dict.fromkeys(values.tolist()):
        yield np.flatnonzero(values == value)


def _plan(engine: Engine, fields: Mapping[str, Any], num_samples: int) -> Plan:
    steps, key, deadline = (fields.get(name) for name in PLAN_NAMES)
    if steps is None and key is None and deadline is not None:
        scales = number_array(fields.get("guidance_scale"))
        guided = engine.network.can_guide and scales is not None and bool((scales != 1.0).any())
        plans, sizes = engine.plans.values(), engine.split(num_samples)
        return choose_plan(engine.calibration, plans, sizes, deadline_ms=deadline, guided=guided)
    if key is None:
        return engine.select_plan(steps=steps)
    found = engine.plans.get(key) if isinstance(key, str) and steps is None else None
    if found is None:
        raise PlanNotFoundError(
            got=f"plan={shown(key)}" + ("" if steps is None else f" beside steps={shown(steps)}"),
            expected=f"one key of {', '.join(engine.plans)}",
            remedy="pick one of these, or pass steps alone",
        )
    return found


def _check(what: str, value: int, most: int) -> None:
    if value > most:
        raise InputError(got=f"a request for {value} {what}", expected=f"at most {most}", remedy="ask for less at once")
