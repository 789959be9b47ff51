"""Where a call begins: noise, a picture (image to image), or a picture of which a part is drawn anew (inpainting). An
upscaler begins with noise beside a picture of half the size.

noise="torch" draws in the order of diffusers' pipelines with a list of generators: for image to image first that of the
picture's latents, then that which is added, as for an upscaler; for an inpainting network the added noise, then the
masked picture's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.condition_rows import condition_array
from skipstep.calls.noise import sample_noise
from skipstep.calls.request import Conditions, resolve_latents, resolve_seeds
from skipstep.calls.torch_noise import TorchNoise
from skipstep.errors import InputError, check_choice, check_number
from skipstep.kernels.layout import Stream
from skipstep.loops.contract import Parts
from skipstep.loops.observers import Blend
from skipstep.networks.condition import Condition
from skipstep.networks.spec import NetworkSpec
from skipstep.pipelines.pictures import read_masks, read_pictures
from skipstep.pipelines.spec import ENLARGED, MASKED
from skipstep.plans.plan import Plan

Array = NDArray[np.float32]
# As diffusers' pipelines have them.
_STRENGTH, _STRENGTH_OF_A_PART = 0.8, 1.0
_NOISES: Final = ("skipstep", "torch")


@dataclass(frozen=True, slots=True)
class Begun:
    """The plans that are left to walk, what they start from, the conditions, and what changes the state on the way."""

    plans: list[Plan]
    x_T: Any
    conditions: Conditions
    blend: Blend | None = None


def begin(
    autoencoder: Parts | None,
    network: NetworkSpec,
    plans: Sequence[Plan],
    conditions: Conditions,
    *,
    seeds: Any,
    x_T: Any,
    image: Any = None,
    mask: Any = None,
    strength: float | None = None,
    noise: str | None = None,
) -> Begun:
    """Raises InputError. `x_T`, where it is given, is the noise that a picture gets."""
    source = check_choice("noise", "skipstep" if noise is None else noise, _NOISES)
    masked, enlarges = MASKED in network.conditions, ENLARGED in network.conditions
    plans, seeds = list(plans), None if seeds is None else resolve_seeds(seeds)
    prompts: Any = conditions.get("prompt_embeds")
    num_prompts = len(prompts) if getattr(prompts, "ndim", 0) == 3 else 1
    _check_together(image, mask, strength, network)
    if source == "torch":
        _check_torch(seeds, x_T, plans)
    if image is None:
        if source == "torch":
            x_T = _Noise(network, _rows(seeds, max(num_prompts, len(plans))), None, source).added()
        return Begun(plans, x_T, conditions)
    if autoencoder is None or (network.state != "vp" and not enlarges):
        raise InputError(
            got="image for an engine without an encoder of pictures, or of another noise process",
            expected="one that was built from a pipeline's folder with an autoencoder and a DDPM-like schedule",
            remedy="leave image out, or use engine.edit for a network of pixels",
        )
    small_size = [side // 2 if enlarges else side for side in network.sample_shape[1:]]
    size = (small_size[0] * autoencoder.factor, small_size[1] * autoencoder.factor)
    ready = enlarges and getattr(image, "shape", ())[-3:] == (network.sample_shape[0], *small_size)
    if ready:
        pictures = condition_array("image", image, Condition((network.sample_shape[0], *small_size)))
    else:
        pictures = read_pictures("image", image, channels=autoencoder.channels, size=size)
    masks = None if mask is None else read_masks(mask, size=size)
    given = None if x_T is None else resolve_latents(x_T, network)
    counts = [
        len(pictures),
        1 if masks is None else len(masks),
        num_prompts,
        len(plans),
        1 if seeds is None else seeds.size,
    ]
    count = max(*counts, 1 if given is None else len(given))
    if seeds is None and given is None:
        raise InputError(got="no seeds", expected="a seed per sample, for the noise", remedy="pass seeds=[...]")
    if not {*counts} <= {1, count}:
        named = zip(("images", "masks", "prompts", "plans", "seeds"), counts, strict=True)
        raise InputError(
            got=", ".join(f"{number} {name}" for name, number in named if number > 1),
            expected="one for all samples, or one each",
            remedy="pass lists of one length",
        )
    drawn = _Noise(network, None if seeds is None else _rows(seeds, count), given, source)
    if enlarges:
        low = pictures if ready else _latents(autoencoder, pictures, count, drawn)
        # The noise alone is x: diffusers adds no image, but for leading timesteps noise in the image's place.
        spread = [1.0 if plan.spacing == "leading" else 1.0 - plan.alpha_bars[0] for plan in plans]
        x_T = drawn.added() * np.sqrt(np.array(spread, np.float32)).reshape(-1, 1, 1, 1)
        return Begun(plans, x_T, _beside(conditions, ENLARGED, low.repeat(2, axis=2).repeat(2, axis=3)))
    share = _STRENGTH if masks is None else _STRENGTH_OF_A_PART
    share = check_number("strength", share if strength is None else strength, low=0.0, high=1.0, above=True)
    tails = [_tail(plan, share) for plan in plans]
    pure = masks is not None and share == 1.0
    latents = None if pure and masked else _latents(autoencoder, pictures, count, drawn)
    added = drawn.added()
    x_T = added if pure or latents is None else _noised(latents, added, _column(tails, 0, count))
    if masks is None or latents is None or masked:
        if masks is not None:
            hole = _latents(autoencoder, pictures * (masks < 0.5), count, drawn)
            small = np.broadcast_to(_small(masks, autoencoder.factor), (count, 1, *network.sample_shape[1:]))
            conditions = _beside(conditions, MASKED, np.concatenate([small, hole], axis=1))
        return Begun(tails, x_T, conditions)
    small, kept = np.repeat(_small(masks, autoencoder.factor), count // len(masks), axis=0), latents
    last = len(tails[0].timesteps) - 1

    def blend(step: int, first: int, x_t: Array) -> Array:
        part = slice(first, first + len(x_t))
        levels = np.ones((count, 1, 1, 1), np.float32) if step == last else _column(tails, step + 1, count)
        proper = _noised(kept[part], added[part], levels[part])
        return (1 - small[part]) * proper + small[part] * x_t

    return Begun(tails, x_T, conditions, blend)


def _beside(conditions: Conditions, name: str, value: Array) -> Conditions:
    """What the caller passes by that name stands; what is no mapping is refused where it is read."""
    given = conditions.get("conditions") or {}
    return {**conditions, "conditions": {name: value, **given}} if isinstance(given, Mapping) else conditions


class _Noise:
    """The normal numbers of a call, in the order in which they are asked for."""

    def __init__(self, network: NetworkSpec, seeds: NDArray[np.uint64] | None, given: Any, source: str) -> None:
        self._network, self._seeds, self._given = network, seeds, given
        self._torch = TorchNoise(seeds) if source == "torch" and seeds is not None else None

    def added(self) -> Array:
        if self._given is not None:
            return np.asarray(self._given, np.float32)
        if self._torch is not None:
            return self._torch.normals(self._network.sample_shape)
        assert self._seeds is not None, "begin refuses a call without either"
        return sample_noise(self._network, self._seeds, Stream.EDIT)

    def of_latents(self, mean: Array, deviation: Array) -> Array:
        """A draw of torch's generators; otherwise the mean, which no seed changes."""
        if self._torch is None or not deviation.any():
            return mean
        return mean + deviation * self._torch.normals(mean.shape[1:])


def _latents(autoencoder: Parts, pictures: Array, count: int, drawn: _Noise) -> Array:
    mean, deviation = autoencoder.moments(pictures)
    if len(mean) < count:
        mean, deviation = (np.repeat(each, count, axis=0) for each in (mean, deviation))
    return drawn.of_latents(mean, deviation)


def _noised(latents: Array, noise: Array, alpha_bar: Array) -> Array:
    return (np.sqrt(alpha_bar) * latents + np.sqrt(1 - alpha_bar) * noise).astype(np.float32)


def _column(plans: Sequence[Plan], step: int, count: int) -> Array:
    """alpha_bar before a step, `[count, 1, 1, 1]`."""
    levels = np.array([plan.alpha_bars[step] for plan in plans], np.float32)
    return np.broadcast_to(levels, (count,)).reshape(-1, 1, 1, 1)


def _small(masks: Array, factor: int) -> Array:
    return masks[:, :, ::factor, ::factor]


def _tail(plan: Plan, strength: float) -> Plan:
    steps = len(plan.timesteps)
    left = min(int(steps * strength), steps)
    if left == 0:
        raise InputError(
            got=f"strength={strength:g} of {steps} steps, which leaves none",
            expected=f"at least {1 / steps:.3g}",
            remedy="pass a higher strength, or more steps",
        )
    return plan if left == steps else plan.started_at(steps - left)


def _rows(seeds: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    return np.full(count, seeds) if seeds.ndim == 0 else seeds


def _check_together(image: Any, mask: Any, strength: Any, network: NetworkSpec) -> None:
    if ENLARGED in network.conditions and (mask is not None or strength is not None):
        raise InputError(
            got="mask or strength for an upscaler", expected="image alone, all of it", remedy="leave them out"
        )
    if image is None and (mask is not None or strength is not None):
        raise InputError(
            got="mask or strength without image", expected="the picture that they are about", remedy="pass image="
        )
    if image is not None and mask is None and MASKED in network.conditions:
        raise InputError(
            got="image without mask for an inpainting network",
            expected="the mask as well: white where the picture is drawn anew",
            remedy="pass mask=; an all-white one draws all of it",
        )


def _check_torch(seeds: Any, x_T: Any, plans: Sequence[Plan]) -> None:
    if seeds is None or x_T is not None:
        raise InputError(
            got="noise='torch' without seeds, or beside x_T", expected="seeds alone", remedy="pass seeds=[...]"
        )
    if any(plan.adds_noise for plan in plans):
        raise InputError(
            got="noise='torch' for a plan that adds noise at every step",
            expected="a plan without fresh noise, eta=0: that of the steps is keyed in its own way",
            remedy="leave noise out, or use a plan with eta=0",
        )
