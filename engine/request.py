"""From what a caller passes to `Engine.sample` to checked arrays with one entry per sample.

Scalars apply to every sample, sequences name each one; all sequences of a call have the same length.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError
from skipstep.network import NetworkSpec

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """B samples: `seeds` uint64 `[B]`, `x_T` float32 `[B, C, H, W]`, `class_labels` int64, `guidance` float32 `[B]`.

    What a call does not use is None; at least one of `seeds` and `x_T` is there.
    """

    num_samples: int
    seeds: NDArray[np.uint64] | None
    x_T: NDArray[np.float32] | None
    class_labels: NDArray[np.int64] | None
    guidance: NDArray[np.float32] | None

    def chunk(self, start: int, batch_size: int) -> SampleRequest:
        """Samples start … start + batch_size - 1; past the end the last sample is repeated to fill the batch."""
        index = np.minimum(np.arange(start, start + batch_size), self.num_samples - 1)
        return SampleRequest(
            batch_size,
            seeds=None if self.seeds is None else self.seeds[index],
            x_T=None if self.x_T is None else self.x_T[index],
            class_labels=None if self.class_labels is None else self.class_labels[index],
            guidance=None if self.guidance is None else self.guidance[index],
        )


def resolve_request(
    network: NetworkSpec,
    *,
    seeds: int | Sequence[int] | None,
    x_T: Any,
    class_labels: int | Sequence[int] | None,
    guidance_scale: float | Sequence[float] | None,
    adds_noise: bool,
) -> SampleRequest:
    """Check and complete the arguments of one call. Raises InputError."""
    if seeds is None and (x_T is None or adds_noise):
        raise InputError(
            got="no seeds" if x_T is None else "x_T without seeds for a plan with eta > 0",
            expected="a seed per sample" if x_T is None else "seeds as well: they key the noise of every step",
            remedy="pass seeds=[...]"
            + (", or the initial noise as x_T=" if x_T is None else ", or use a plan with eta=0"),
        )
    latents = None if x_T is None else _resolve_latents(x_T, network)
    given = {
        "seeds": _int_vector("seeds", seeds, low=0, high=MAX_SEED, dtype=np.uint64),
        "class_labels": _resolve_labels(class_labels, network),
        "guidance_scale": _resolve_guidance(guidance_scale, network),
    }
    lengths = {name: len(array) for name, array in given.items() if array is not None and array.ndim == 1}
    if latents is not None:
        lengths["x_T"] = len(latents)
    if len(set(lengths.values())) > 1:
        raise InputError(
            got=", ".join(f"{length} {name}" for name, length in lengths.items()),
            expected="the same number of each: one per sample",
            remedy="pass lists of one length; a single number applies to every sample",
        )
    num_samples = next(iter(lengths.values()), 1)
    if num_samples == 0:
        raise InputError(got="zero samples", expected="at least one", remedy="pass at least one seed")

    seed_array, labels, guidance = (
        None if array is None else np.ascontiguousarray(np.broadcast_to(array, num_samples)) for array in given.values()
    )
    if labels is None and network.num_classes is not None:
        assert network.null_label is not None, "_resolve_labels refuses a call without labels otherwise"
        labels = np.full(num_samples, network.null_label)
    if guidance is not None and np.all(guidance == 1.0):
        guidance = None  # A scale of 1 is the conditional prediction itself: half the work, the same result.
    return SampleRequest(num_samples, seed_array, latents, labels, guidance)


def _resolve_labels(labels: int | Sequence[int] | None, network: NetworkSpec) -> NDArray[np.int64] | None:
    if network.num_classes is None:
        if labels is not None:
            raise InputError(
                got=f"class_labels={labels!r} for an unconditional network",
                expected="no labels",
                remedy="leave class_labels out, or load a class-conditional checkpoint",
            )
        return None
    if labels is None:
        if network.null_label is None:
            raise InputError(
                got="no class_labels for a class-conditional network without a null label",
                expected=f"a label in [0, {network.num_classes - 1}] per sample",
                remedy="pass class_labels=[...]",
            )
        return None
    return _int_vector("class_labels", labels, low=0, high=network.num_classes - 1, dtype=np.int64)


def _resolve_guidance(scale: float | Sequence[float] | None, network: NetworkSpec) -> NDArray[np.float32] | None:
    if scale is None:
        return None
    try:
        array = np.asarray(scale, dtype=np.float32)
    except (TypeError, ValueError):
        array = np.array(np.nan, np.float32)
    if array.ndim > 1 or isinstance(scale, bool) or not np.all(np.isfinite(array)):
        raise InputError(
            got=f"guidance_scale={scale!r}",
            expected="a finite number, or one per sample",
            remedy="pass 1.0 for no guidance, and 1.5 to 4 for more",
        )
    if network.null_label is None and np.any(array != 1.0):
        raise InputError(
            got=f"guidance_scale={scale!r} for a network without a null label",
            expected="a network trained with label dropout: guidance contrasts labelled with unlabelled predictions",
            remedy="leave guidance_scale out, or pass null_label= when building the engine",
        )
    return array


def _int_vector(
    name: str, values: int | Sequence[int] | None, *, low: int, high: int, dtype: type[np.integer[Any]]
) -> NDArray[Any] | None:
    if values is None:
        return None
    scalar = isinstance(values, int | np.integer)
    try:
        listed: list[Any] = [values] if scalar else list(values)  # type: ignore[arg-type]
        boolean = any(isinstance(v, bool | np.bool_) for v in listed)
        listed = [operator.index(v) for v in listed]
    except TypeError:
        listed, boolean = [], True
    outside = [v for v in listed if not low <= v <= high]
    if boolean or outside:
        raise InputError(
            got=f"{name}={outside[0] if outside else values!r}",
            expected=f"an integer in [{low}, {high}]" + ("" if scalar else ", one per sample"),
            remedy=f"pass {name} in this range",
        )
    return np.array(listed[0] if scalar else listed, dtype=dtype)


def _resolve_latents(x_T: Any, network: NetworkSpec) -> NDArray[np.float32]:
    if hasattr(x_T, "detach"):
        if x_T.device.type not in ("cpu", "cuda"):
            raise InputError(got=f"x_T on {x_T.device}", expected="a tensor in memory", remedy="move it with x_T.cpu()")
        # NumPy has no bfloat16.
        x_T = (x_T.float() if x_T.dtype.is_floating_point else x_T).detach().cpu().numpy()
    if not isinstance(x_T, np.ndarray) or not np.issubdtype(x_T.dtype, np.floating):
        kind = f"dtype {x_T.dtype}" if isinstance(x_T, np.ndarray) else f"type {type(x_T).__name__}"
        raise InputError(
            got=f"x_T of {kind}",
            expected="floating-point numbers in a NumPy array or a torch tensor",
            remedy="pass standard normal noise as float32",
        )
    if x_T.ndim != 4 or x_T.shape[1:] != network.sample_shape:
        raise InputError(
            got=f"x_T of shape {list(x_T.shape)}",
            expected=f"[B, {', '.join(map(str, network.sample_shape))}]",
            remedy="give one [C, H, W] block per sample",
        )
    broken = np.flatnonzero(~np.isfinite(x_T).all(axis=(1, 2, 3)))
    if broken.size:
        raise InputError(
            got=f"NaN or infinity in x_T, samples {broken[:8].tolist()}",
            expected="finite noise",
            remedy="check where the latents come from",
        )
    return np.ascontiguousarray(x_T, dtype=np.float32)
