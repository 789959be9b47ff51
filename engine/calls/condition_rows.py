"""A call's conditions: from what the caller passes by name to checked rows, one per sample or one for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.arrays import float32, from_dlpack, host_array, host_floats, is_tensor, number_array, unreadable
from skipstep.errors import InputError, shown
from skipstep.networks.condition import Condition, guidance_rows, null_row
from skipstep.networks.spec import LABELS, PROMPTS, NetworkSpec

Rows = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ConditionRows:
    """Rows `[B, …]`, or `[1, …]` for all samples, by condition: with it, and of the half without where that was given.

    `lengths`: how many samples each names, by what its caller calls it; those for all samples are left out.
    """

    given: Rows
    negative: Rows
    lengths: Mapping[str, int]


def resolve_conditions(
    network: NetworkSpec,
    given: Mapping[str, Any],
    negative: Mapping[str, Any],
    *,
    labels: NDArray[np.int64] | None,
    guided: bool,
    scales: NDArray[np.float32] | None,
) -> ConditionRows:
    """Check and complete what the caller passed by name. `labels` are checked; `scales`: guidance scales, scalar or one
    a sample, for a network that takes them. Raises InputError."""
    found: tuple[Rows, Rows] = {}, {}
    lengths: dict[str, int] = {}
    for half, values in enumerate((given, negative)):
        for name in values:
            _check_known(network, name, half)
        for name, condition in network.all_conditions.items():
            said = _said(network, name, half)
            if name == LABELS and network.num_classes is not None:
                if half == 0 and labels is not None:
                    found[half][name] = labels
                continue
            if condition.from_guidance is not None:
                if half == 0:
                    ones = np.ones(1, np.float32)
                    found[half][name] = guidance_rows(condition, ones if scales is None else scales.reshape(-1))
                continue
            value = values.get(name)
            if value is None:
                if half == 0 and condition.fills:
                    found[half][name] = null_row(condition)
                elif half == 0 or (guided and condition.null == "given"):
                    raise _missing(said, condition, half)
                continue
            rows = condition_array(said, value, condition)
            found[half][name] = rows
            if len(rows) > 1:
                lengths[said] = len(rows)
    return ConditionRows(found[0], found[1] if guided else {}, lengths)


def _check_known(network: NetworkSpec, name: object, half: int) -> None:
    known = network.passed_conditions
    if name in known:
        return
    prefix = "negative_" if half else ""
    if name in (PROMPTS, LABELS) and name not in network.all_conditions:
        spoken = f"{prefix}{'prompt_embeds' if name == PROMPTS else name}"
        what, checkpoint = ("prompts", "text") if name == PROMPTS else ("classes", "class")
        raise InputError(
            got=f"{spoken} for a network without {what}",
            expected="none",
            remedy=f"leave {spoken} out, or load a {checkpoint}-conditional checkpoint",
        )
    raise InputError(
        got=f"{prefix}conditions[{shown(name)}]",
        expected=f"one of {', '.join(known)}" if known else "none: this network takes no conditions",
        remedy="leave it out"
        + (", the null label is the network's" if name == LABELS else "")
        + (", guidance_scale= says it" if name in network.all_conditions and name != LABELS else "")
        + ("" if name in network.all_conditions else "; conditions= of Engine.build declares those of a network"),
    )


def _said(network: NetworkSpec, name: str, half: int) -> str:
    """What a caller calls it."""
    prefix = "negative_" if half else ""
    is_prompt = name == PROMPTS and network.prompt_shape is not None
    return f"{prefix}prompt_embeds" if is_prompt else f"{prefix}conditions[{name!r}]"


def _missing(said: str, condition: Condition, half: int) -> InputError:
    key = said if "[" not in said else said.replace("[", "={", 1).replace("]", ": …}")
    sides = ", ".join(map(str, condition.shape))
    is_prompt = said.endswith("prompt_embeds")
    return InputError(
        got=f"no {said}" + (" beside guidance_scale" if half else ""),
        expected=f"{condition.dtype} [B, {sides}], {'a prompt' if is_prompt else 'one'} per sample or one for all",
        remedy="pass what the text encoder gives for the prompt" + ("; the empty prompt's is usual" if half else "")
        if is_prompt
        else f"pass {key}" + (", or build with null='same' or a number if that stands for none" if half else ""),
    )


def condition_array(said: str, given: Any, condition: Condition) -> NDArray[Any]:
    """`[B or 1, *shape]` from NumPy, torch, DLPack or numbers, of that or of one sample's shape."""
    array = _elements(said, from_dlpack(said, given), condition)
    if array.ndim == len(condition.shape):
        array = array[None]
    if array.ndim != len(condition.shape) + 1 or array.shape[1:] != condition.shape or not len(array):
        sides = ", ".join(map(str, condition.shape))
        raise InputError(
            got=f"{said} of shape {list(array.shape)}",
            expected=f"[B, {sides}], or without B",
            remedy="pad prompts to the number of tokens that the engine was built for"
            if said.endswith("prompt_embeds")
            else "reshape it, or build the engine with the condition's own shape",
        )
    if not np.isfinite(array).all():
        raise InputError(
            got=f"NaN or infinity in {said}", expected="finite numbers", remedy="check where they come from"
        )
    return array


def _elements(said: str, given: Any, condition: Condition) -> NDArray[Any]:
    if said.endswith("prompt_embeds"):
        return float32(host_floats(said, given))
    array = _truth_values(given) if condition.dtype == "bool" else number_array(given)
    if array is not None and condition.dtype == "int64":
        fits = array.dtype.kind in "iu" and (array.size == 0 or int(array.max()) < 1 << 63)
        array = array.astype(np.int64) if fits else None
    if array is None:
        kind = f"dtype {given.dtype}" if hasattr(given, "dtype") else f"type {type(given).__name__}"
        raise InputError(
            got=f"{said} of {kind}",
            expected=f"{condition.dtype}, in a NumPy array, a torch tensor or a list",
            remedy=f"pass {condition.dtype}",
        )
    return float32(array) if condition.dtype == "float32" else np.ascontiguousarray(array)


def _truth_values(given: Any) -> NDArray[np.bool_] | None:
    """Booleans, or integers that are 0 or 1."""
    try:
        readable = is_tensor(given) and unreadable(given) is None
        array = host_array(given) if readable else np.asarray(given)
    except Exception:  # Objects that say they are arrays raise what they like.
        return None
    if array.dtype.kind in "iu" and np.isin(array, (0, 1)).all():
        array = array.astype(np.bool_)
    return array if array.dtype.kind == "b" else None


def filled_rows(network: NetworkSpec, count: int, rng: np.random.Generator | None = None) -> Rows:
    """Rows `[count, …]` of every condition: zeros, or random ones for checks and measurements, no two alike."""
    rows: Rows = {}
    for name, condition in network.all_conditions.items():
        shape = count, *condition.shape
        if name == LABELS and network.num_classes is not None:
            rows[name] = np.arange(count) * (rng is not None) % network.num_classes
        else:
            rows[name] = np.zeros(shape, condition.dtype) if rng is None else random_rows(condition, count, rng)
    return rows


def random_rows(condition: Condition, count: int, rng: np.random.Generator) -> NDArray[Any]:
    """`[count, …]`: standard normals; of integers zeros and ones, which every table of embeddings has."""
    shape = (count, *condition.shape)
    if condition.dtype == "float32":
        return rng.standard_normal(shape, dtype=np.float32)
    return rng.integers(0, 2, shape).astype(condition.dtype)
