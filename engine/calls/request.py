"""From what a caller passes to `Engine.sample` to checked arrays with one entry per sample.

Scalars apply to every sample, sequences name each one; all sequences of a call have the same length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from skipstep.arrays import batch_rows, float32, from_dlpack, host_floats, is_tensor, may_share_memory, number_array
from skipstep.calls.condition_rows import resolve_conditions
from skipstep.errors import InputError, check_integer, shown
from skipstep.networks.spec import LABELS, PROMPTS, NetworkSpec

MAX_SEED = 2**64 - 1
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
# Of one call: far more than fit in memory for any network of use.
MAX_SAMPLES = 1 << 24


class Conditions(TypedDict, total=False):
    """The conditions of a call, as its caller passes them.

    class_labels            an int, or one per sample; left out, a network with a null label draws unconditionally.
    prompt_embeds           float `[B, L, D]`, or `[L, D]` for all samples: what the text encoder gives for the prompts.
    negative_prompt_embeds  the same for the unconditional half of guidance; needed with guidance_scale.
    guidance_scale          classifier-free guidance u + scale·(c - u); 1 is none. A number, or one per sample.
    guidance_rescale        how much of the spread that guidance adds is taken back, 0 to 1. A number, or one each.
    conditions              the network's other conditions by name, `[B, …]` or one for all samples; labels and prompts
                            may be here too (skipstep.Condition, NetworkSpec.all_conditions).
    negative_conditions     the same for the unconditional half of guidance; needed for those whose null is "given".
    """

    class_labels: int | Sequence[int] | None
    prompt_embeds: Any
    negative_prompt_embeds: Any
    guidance_scale: float | Sequence[float] | None
    guidance_rescale: float | Sequence[float] | None
    conditions: Mapping[str, Any] | None
    negative_conditions: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """B samples: `seeds` uint64 `[B]`, `x_T` float32 `[B, *sample_shape]`; `guidance` and `rescale` float32 `[B]`;
    `conditions` by name `[B, …]`, or `[1, …]` for all samples, and `negative_conditions` of the half without, those
    that the caller gave.

    What a call does not use is None; at least one of `seeds` and `x_T` is given. x_T is a NumPy array, or a tensor of
    the device that the engine runs on, where the caller gave one.
    """

    num_samples: int
    seeds: NDArray[np.uint64] | None
    x_T: Any
    guidance: NDArray[np.float32] | None
    rescale: NDArray[np.float32] | None = None
    conditions: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    negative_conditions: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def class_labels(self) -> NDArray[np.int64] | None:
        return self.conditions.get(LABELS)

    @property
    def num_copies(self) -> int:
        """The batch multiplier: 2 with classifier-free guidance, else 1."""
        return 1 if self.guidance is None else 2

    def condition_bytes(self) -> tuple[tuple[str, bytes], ...]:
        """Of all that a network's step inputs follow from, beside timesteps and the number of copies."""
        halves = (self.conditions, self.negative_conditions)
        return tuple((name, array.tobytes()) for half in halves for name, array in half.items())

    def apart_from(self, out: Any) -> SampleRequest:
        """This request, with copies of the arrays that may share memory with `out`: samples are written there while
        later parts of the request are still to be read."""
        return self._changed(lambda array: deepcopy(array) if may_share_memory(array, out) else array)

    def chunk(self, start: int, batch_size: int) -> SampleRequest:
        """Samples start … start + batch_size - 1; past the end the last sample is repeated to fill the batch."""
        if (start, batch_size) == (0, self.num_samples):
            return self
        index = np.minimum(np.arange(start, start + batch_size), self.num_samples - 1)
        # What has one row is for all samples, also of the chunk.
        chunk = self._changed(
            lambda array: batch_rows(array, index),
            lambda array: array if len(array) == 1 else batch_rows(array, index),
        )
        return replace(chunk, num_samples=batch_size)

    def _changed(self, change: Callable[[Any], Any], of_condition: Callable[[Any], Any] | None = None) -> SampleRequest:
        """With `change` of each array, and `of_condition` of each condition's where that differs."""
        changed: dict[str, Any] = {}
        for name in ("seeds", "x_T", "guidance", "rescale"):
            array = getattr(self, name)
            changed[name] = None if array is None else change(array)
        for name in ("conditions", "negative_conditions"):
            changed[name] = {key: (of_condition or change)(rows) for key, rows in getattr(self, name).items()}
        return replace(self, **changed)


def resolve_request(
    network: NetworkSpec,
    *,
    seeds: int | Sequence[int] | None,
    x_T: Any,
    class_labels: int | Sequence[int] | None = None,
    prompt_embeds: Any = None,
    negative_prompt_embeds: Any = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_rescale: float | Sequence[float] | None = None,
    conditions: Mapping[str, Any] | None = None,
    negative_conditions: Mapping[str, Any] | None = None,
    adds_noise: bool = False,
    num_plans: int = 1,
    latents_name: str = "x_T",
    device: str = "cpu",
) -> SampleRequest:
    """Check and complete the arguments of one call; `num_plans` above 1 is one per sample. Raises InputError.

    `latents_name` is what the caller calls x_T; given as a tensor on `device` it stays there.
    """
    if seeds is None and (x_T is None or adds_noise):
        raise InputError(
            got="no seeds" if x_T is None else "x_T without seeds for a plan that adds noise",
            expected="a seed per sample" if x_T is None else "seeds as well: they key the noise of every step",
            remedy="pass seeds=[...]"
            + (", or the initial noise as x_T=" if x_T is None else ", or use a plan with eta=0"),
        )
    latents = None if x_T is None else resolve_latents(x_T, network, name=latents_name, device=device)
    named = _named("conditions", conditions, {LABELS: class_labels, PROMPTS: prompt_embeds})
    negative = _named("negative_conditions", negative_conditions, {PROMPTS: negative_prompt_embeds})
    scales = _resolve_guidance(guidance_scale, network)
    given: dict[str, NDArray[Any] | None] = {
        "seeds": None if seeds is None else resolve_seeds(seeds),
        "class_labels": None if LABELS in network.conditions else _resolve_labels(named.pop(LABELS, None), network),
        "guidance_scale": scales,
        "guidance_rescale": _resolve_rescale(guidance_rescale, None if network.takes_guidance else guidance_scale),
    }
    lengths = {name: len(array) for name, array in given.items() if array is not None and array.ndim}
    if latents is not None:
        lengths[latents_name] = len(latents)
    guided = not network.takes_guidance and scales is not None and any(each != 1.0 for each in scales.ravel().tolist())
    labels = given["class_labels"]
    rows = resolve_conditions(network, named, negative, labels=labels, guided=guided, scales=scales)
    lengths |= rows.lengths
    if num_plans > 1:
        lengths["plans"] = num_plans
    if len(set(lengths.values())) > 1:
        raise InputError(
            got=", ".join(f"{length} {name}" for name, length in lengths.items()),
            expected="the same number of each: one per sample",
            remedy="pass lists of one length; a single number applies to every sample",
        )
    num_samples = next(iter(lengths.values()), 1)
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise InputError(
            got=f"{num_samples or 'zero'} samples",
            expected=f"1 to {MAX_SAMPLES}",
            remedy="pass at least one seed" if num_samples == 0 else "draw them in several calls",
        )

    vectors: list[NDArray[Any] | None] = [
        array if array is None or array.ndim else array.repeat(num_samples) for array in given.values()
    ]
    seed_array, labels, guidance, rescale = vectors
    if labels is None and network.num_classes is not None:
        assert network.null_label is not None, "_resolve_labels refuses a call without labels otherwise"
        labels = np.full(num_samples, network.null_label)
    if not guided:
        guidance = None  # A scale of 1 is the conditional prediction itself: half the work, the same result.
    if guidance is None or (rescale is not None and not rescale.any()):
        rescale = None  # Without guidance there is nothing to take back.
    of_samples = rows.given if labels is None else {**rows.given, LABELS: labels}
    return SampleRequest(num_samples, seed_array, latents, guidance, rescale, of_samples, rows.negative)


def _named(name: str, given: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller passed by name, and what it passed as arguments of their own."""
    if given is not None and not isinstance(given, Mapping):
        raise InputError(
            got=f"{name}={shown(given)}", expected="a mapping from names to arrays", remedy=f"pass {name}={{'name': …}}"
        )
    found = {key: value for key, value in (given or {}).items() if value is not None}
    for key, value in others.items():
        if value is not None and key in found:
            raise InputError(
                got=f"{key} twice, in {name} and as an argument of its own",
                expected="one of them",
                remedy="leave one out",
            )
        if value is not None:
            found[key] = value
    return found


def resolve_seeds(seeds: int | Sequence[int]) -> NDArray[np.uint64]:
    """Uint64, scalar or `[B]`. Raises InputError outside [0, MAX_SEED]."""
    return _int_vector("seeds", seeds, low=0, high=MAX_SEED, dtype=np.uint64)


def _resolve_labels(labels: int | Sequence[int] | None, network: NetworkSpec) -> NDArray[np.int64] | None:
    if network.num_classes is None:
        if labels is not None:
            raise InputError(
                got=f"class_labels={shown(labels)} for an unconditional network",
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
    array = _float_vector(scale)
    # Most are one number, for which NumPy's reductions take several times as long.
    if not all(map(math.isfinite, array.ravel().tolist())):
        raise InputError(
            got=f"guidance_scale={shown(scale)}",
            expected="a finite number, or one per sample",
            remedy="pass 1.0 for no guidance, and 1.5 to 4 for more",
        )
    if not (network.can_guide or network.takes_guidance) and (array != 1.0).any():
        raise InputError(
            got=f"guidance_scale={shown(scale)} for a network without a null label",
            expected="a network trained with label dropout: guidance contrasts labelled with unlabelled predictions",
            remedy="leave guidance_scale out, or pass null_label= when building the engine",
        )
    return array


def _resolve_rescale(
    strength: float | Sequence[float] | None, guidance_scale: float | Sequence[float] | None
) -> NDArray[np.float32] | None:
    if strength is None:
        return None
    array = _float_vector(strength)
    if not ((array >= 0.0) & (array <= 1.0)).all():
        raise InputError(
            got=f"guidance_rescale={shown(strength)}",
            expected="a number in [0, 1], or one per sample",
            remedy="pass 0.7, as its authors do, or 0 for none",
        )
    if guidance_scale is None:
        raise InputError(
            got=f"guidance_rescale={shown(strength)} without guidance_scale",
            expected="classifier-free guidance, whose effect on the spread it takes back",
            remedy="pass guidance_scale as well",
        )
    return array


def _float_vector(values: Any) -> NDArray[np.float32]:
    """Float32, scalar or `[B]`, from numbers, a sequence of numbers, NumPy or torch; NaN for anything else."""
    if type(values) is float and abs(values) <= _MAX_FLOAT32:
        return np.array(values, np.float32)
    array = number_array(values)
    if array is None or array.ndim > 1:
        return np.array(np.nan, np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _int_vector(
    name: str, values: int | Sequence[int], *, low: int, high: int, dtype: type[np.integer[Any]]
) -> NDArray[Any]:
    # Python's own integers within the range, as most calls have them: nothing is left to be checked.
    if type(values) is int and low <= values <= high:
        return np.array(values, dtype)
    if type(values) is list:
        values = values[: MAX_SAMPLES + 1]
        if all(type(each) is int and low <= each <= high for each in values):
            return np.array(values, dtype)
    remedy = f"pass {name} in this range" + ("" if isinstance(values, int | np.integer) else ", one per sample")
    if is_tensor(values) or isinstance(values, np.ndarray):
        array = number_array(values)
        if array is not None and array.ndim <= 1 and array.dtype.kind in "iu":
            values = array.tolist()
    if isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray):
        values = values[: MAX_SAMPLES + 1]
        return np.array([check_integer(name, each, low=low, high=high, remedy=remedy) for each in values], dtype=dtype)
    return np.array(check_integer(name, values, low=low, high=high, remedy=remedy), dtype=dtype)


def resolve_latents(x_T: Any, network: NetworkSpec, *, name: str = "x_T", device: str = "cpu") -> Any:
    """Float32 `[B, *sample_shape]`, contiguous, from NumPy, torch or DLPack. Raises InputError, which calls it `name`.

    A tensor on `device`, where that is a GPU, stays there without synchronizing; NaN in it appears in the samples.
    """
    x_T = from_dlpack(name, x_T)
    on_device = device != "cpu" and is_tensor(x_T) and str(x_T.device) == device
    if device != "cpu" and not on_device and str(getattr(x_T, "device", "cpu")).startswith("cuda"):
        raise InputError(
            got=f"{name} on {x_T.device} for an engine on {device}",
            expected=f"a tensor on {device}, or in host memory",
            remedy=f"move it with {name}.to({device!r}), in the order of your own streams",
        )
    if not on_device:
        x_T = float32(host_floats(name, x_T))
    if x_T.ndim == 0 or tuple(x_T.shape[1:]) != network.sample_shape:
        raise InputError(
            got=f"{name} of shape {list(x_T.shape)}",
            expected=f"[B, {', '.join(map(str, network.sample_shape))}]",
            remedy="give one block of that shape per sample",
        )
    if on_device:
        if not x_T.dtype.is_floating_point:
            raise InputError(got=f"{name} of {x_T.dtype}", expected="floating-point numbers", remedy="pass float32")
        return x_T.detach().float().contiguous()
    broken = np.flatnonzero(~np.isfinite(x_T.reshape(len(x_T), -1)).all(axis=1))
    if broken.size:
        raise InputError(
            got=f"NaN or infinity in {name}, samples {broken[:8].tolist()}",
            expected="finite numbers",
            remedy="check where they come from",
        )
    return x_T
