"""Golden samples: the builder of a bundle draws them and stores them; any machine can draw them again and compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.bundles.manifest import GoldenEntry
from skipstep.calls.condition_rows import random_rows
from skipstep.calls.request import Conditions
from skipstep.errors import IntegrityError, check_type
from skipstep.networks.spec import PROMPTS, NetworkSpec

if TYPE_CHECKING:
    from skipstep.loops.contract import Sampler

GOLDEN_FILE: Final = "golden.safetensors"
_SEEDS = (0, 1)
_GUIDANCE = 2.0
# Root mean square of the difference over that of the samples. Processors sum a float32 convolution in different
# orders, and the first steps magnify that; with another network, plan or seed the error is over a hundred times this.
_TOLERANCE = 2e-3
# Ten times what float16, and three times what bfloat16 changes the shipped network's samples by
# (bench/results/findings/precision.json); tf32 rounds as float16 does. 8 bits may change a
# sample by a root mean square of 0.01; what that is of the samples depends on their contrast. Another plan or seed is
# an error of 1.
_ROUNDED = {"tf32": 2e-2, "float16": 2e-2, "bfloat16": 1.5e-1, "int8": 1e-1, "fp8": 1e-1}


def draw_golden(sampler: Sampler) -> tuple[GoldenEntry, dict[str, NDArray[Any]]]:
    """Draw two samples with the shortest plan, guided if the network can be: the entry, and the arrays to store."""
    plan = min(sampler.plans.values(), key=lambda plan: (plan.num_evaluations, plan.key))
    golden, arrays = describe_call(sampler.network, plan.key, _SEEDS)
    arrays["x_0"] = _draw(sampler, golden, arrays)
    return golden, arrays


def describe_call(
    network: NetworkSpec, plan: str, seeds: tuple[int, ...]
) -> tuple[GoldenEntry, dict[str, NDArray[Any]]]:
    """A call of a network with labels and random conditions, guided if the network can be: its entry, and its
    arrays."""
    arrays: dict[str, NDArray[Any]] = {}
    rng = np.random.default_rng(0)
    for name, condition in network.passed_conditions.items():
        for prefix in ("", "negative_") if condition.null == "given" else ("",):
            key = f"{prefix}prompt_embeds" if name == PROMPTS else f"{prefix}conditions/{name}"
            arrays[key] = random_rows(condition, 1, rng)
    labels = None
    if network.num_classes is not None:
        labels = tuple(seed % network.num_classes for seed in seeds)
    golden = GoldenEntry(
        file=GOLDEN_FILE,
        plan=plan,
        seeds=seeds,
        class_labels=labels,
        guidance_scale=_GUIDANCE if network.can_guide or network.takes_guidance else None,
        tolerance=_TOLERANCE,
    )
    return golden, arrays


def allowed_error(golden: GoldenEntry, precision: str) -> float:
    """The golden samples are float32; a network whose products are rounded draws them less exactly."""
    return max(golden.tolerance, _ROUNDED.get(precision, 0.0))


def replay_golden(
    sampler: Sampler, golden: GoldenEntry, arrays: Mapping[str, NDArray[Any]], *, precision: str = "float32"
) -> float:
    """Draw them again and return the error, measured like the tolerance. Raises IntegrityError beyond what is allowed
    for the sampler's `precision`."""
    check_type("golden", golden, GoldenEntry, remedy="pass the golden entry of the bundle's manifest")
    check_type("arrays", arrays, Mapping, remedy="pass bundle.read_arrays(golden.file)")
    expected = arrays.get("x_0")
    drawn = _draw(sampler, golden, arrays)
    error = np.inf
    if isinstance(expected, np.ndarray) and expected.shape == drawn.shape:
        error = float(np.sqrt(np.mean((drawn - expected) ** 2) / np.mean(expected**2)))
    if sampler.runner.pipeline is not None:
        sampler.runner.pipeline.check(_ROUNDED.get(precision, 0.0))
    allowed = allowed_error(golden, precision)
    if not error <= allowed:
        raise IntegrityError(
            got=f"golden samples with a relative error of {error:.2g}",
            expected=f"at most {allowed:g}",
            remedy="do not use this bundle here; export it again, and report the machine if it persists",
        )
    return error


def _draw(sampler: Sampler, golden: GoldenEntry, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    plan = sampler.plans[golden.plan]
    conditions = call_conditions(golden, arrays)
    drawn: NDArray[np.float32] = sampler.sample(plan=plan, seeds=golden.seeds, output_type="latent", **conditions)
    return drawn


def call_conditions(golden: GoldenEntry, arrays: Mapping[str, NDArray[Any]]) -> Conditions:
    """The arguments of sample() that the entry and its arrays stand for."""
    conditions: Conditions = {}
    if golden.class_labels is not None:
        conditions["class_labels"] = golden.class_labels
    if golden.guidance_scale is not None:
        conditions["guidance_scale"] = golden.guidance_scale
    guided = golden.guidance_scale is not None
    conditions["prompt_embeds"] = arrays.get("prompt_embeds")
    conditions["negative_prompt_embeds"] = arrays.get("negative_prompt_embeds") if guided else None
    conditions["conditions"] = _named(arrays, "conditions/")
    conditions["negative_conditions"] = _named(arrays, "negative_conditions/") if guided else None
    return conditions


def _named(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
