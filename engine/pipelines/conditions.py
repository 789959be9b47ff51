"""What a call passes to a pipeline, prompts and control images, as the conditions that its network reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError, check_choice, check_number
from skipstep.networks.controlnet import CONTROL_SCALE, control_names
from skipstep.networks.spec import NetworkSpec
from skipstep.pipelines.pictures import read_pictures
from skipstep.pipelines.spec import ENLARGED, MASK, PipelineSpec
from skipstep.pipelines.tokenizer import check_prompts

Array = NDArray[np.float32]
# Names of embeddings, also in the graphs.
EMBEDS, POOLED = "embeds", "pooled"
# What a network reads of the picture's size.
_TIME_IDS: Final = "time_ids"
_TEXTS: Final = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_SYNTAXES: Final = ("plain", "a1111")


class Embed(Protocol):
    """EMBEDS, and where the network reads them POOLED and MASK, of prompts: one text for each text encoder."""

    def __call__(self, prompts: Sequence[tuple[str, ...]], *, weighted: bool = False) -> Mapping[str, Array]: ...


def read_conditions(
    spec: PipelineSpec, embed: Embed, network: NetworkSpec, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Raises InputError."""
    made = dict(inputs)
    _add_controls(made, network, made.pop("control_image", None), made.pop(CONTROL_SCALE, None))
    prompt, prompt_2, negative, negative_2 = texts = [made.pop(name, None) for name in _TEXTS]
    syntax = made.pop("prompt_syntax", None)
    weighted = syntax is not None and check_choice("prompt_syntax", syntax, _SYNTAXES) == "a1111"
    if _TIME_IDS in network.all_conditions:
        height, width = (side * spec.factor for side in network.sample_shape[1:])
        _add(made, "", {_TIME_IDS: np.array([height, width, 0, 0, height, width], np.float32)})
    given = made.get("conditions")
    named = isinstance(given, Mapping) and ENLARGED in given
    if ENLARGED in network.conditions and made.get("image") is None and not named:
        raise InputError(
            got="no image for an upscaler",
            expected="what engine.sample draws in twice the size: pictures, or latents as output_type='latent' gives",
            remedy="pass image= to engine.sample",
        )
    said = [name for name, text in zip(_TEXTS, texts, strict=True) if text is not None]
    if not said:
        return made
    if not spec.texts:
        raise InputError(
            got=f"a prompt for a {spec.family}, which reads none", expected="no prompt", remedy="leave it out"
        )
    if prompt is None or made.get("prompt_embeds") is not None:
        raise InputError(
            got=f"{said[0]} without prompt" if prompt is None else "prompt beside prompt_embeds",
            expected="one of prompt and prompt_embeds, and the negative in the same form",
            remedy="pass prompt=, or negative_prompt_embeds= beside prompt_embeds=",
        )

    def add(half: str, first: Any, second: Any, factor: float = 1.0) -> None:
        """A single text's rows are for all samples."""
        found = embed(_columns(spec, half, first, second), weighted=weighted)
        row = 0 if isinstance(first, str) and isinstance(second, str | None) else slice(None)
        made[f"{half}prompt_embeds"] = found[EMBEDS][row] * np.float32(factor)
        others = {MASK: found[MASK][row]} if MASK in found else {}
        if POOLED in found:
            others[pooled_name(network)] = found[POOLED][row] * np.float32(factor)
        _add(made, half, others)

    add("", prompt, prompt_2)
    scale = made.get("guidance_scale")
    if scale is None or network.takes_guidance or not np.any(np.asarray(scale) != 1.0):
        return made
    if negative is None and negative_2 is not None:
        raise InputError(
            got="negative_prompt_2 without negative_prompt",
            expected="the first text encoder's as well",
            remedy="pass negative_prompt='' for an empty one",
        )
    zeros = negative is None and spec.zero_negative
    add("negative_", "" if negative is None else negative, negative_2, 0.0 if zeros else 1.0)
    return made


def pooled_name(network: NetworkSpec) -> str:
    """The condition that pooled embeddings are."""
    return "timestep_cond" if ENLARGED in network.conditions else "text_embeds"


def _add(made: dict[str, Any], half: str, conditions: Mapping[str, Any]) -> None:
    """What the caller passes by name stands; what is no mapping is refused where it is read."""
    given = made.get(f"{half}conditions") or {}
    if conditions and isinstance(given, Mapping):
        made[f"{half}conditions"] = {**conditions, **given}


def _columns(spec: PipelineSpec, half: str, first: Any, second: Any) -> list[tuple[str, ...]]:
    """For every sample a text for each encoder."""
    columns = [check_prompts(f"{half}prompt", first)]
    if second is not None:
        columns.append(check_prompts(f"{half}prompt_2", second))
    if len(columns) > len(spec.texts):
        raise InputError(
            got=f"{half}prompt_2 for a {spec.family}, which has one text encoder",
            expected=f"{half}prompt alone",
            remedy="leave it out",
        )
    count = max(map(len, columns))
    if not {*map(len, columns)} <= {1, count}:
        raise InputError(
            got=f"{len(columns[0])} texts as {half}prompt and {len(columns[1])} as {half}prompt_2",
            expected="the same number of each",
            remedy="pass lists of one length, or one text for all samples",
        )
    filled = [texts * (count // len(texts)) for texts in columns]
    return list(zip(filled[0], *filled[-1:] * (len(spec.texts) - 1), strict=True))


def _add_controls(made: dict[str, Any], network: NetworkSpec, images: Any, scales: Any) -> None:
    """Pictures in [0, 1] for each ControlNet, and their weights. Raises InputError."""
    names = control_names(network.conditions)
    given = made.get("conditions")
    if not names or (isinstance(given, Mapping) and names[0] in given):
        if images is not None or scales is not None:
            raise InputError(
                got=f"{'control_image' if scales is None else CONTROL_SCALE} for an engine without a ControlNet"
                if not names
                else "control_image twice, in conditions and as an argument of its own",
                expected="one that was built with one" if not names else "one of them",
                remedy="pass controlnet=folder to Engine.build, or leave it out",
            )
        return
    if images is None:
        raise InputError(
            got="no control_image", expected="what the ControlNet reads", remedy="pass control_image=picture"
        )
    pictures = list(images) if len(names) > 1 and isinstance(images, list | tuple) else [images]
    weights = list(scales) if isinstance(scales, list | tuple) else [1.0 if scales is None else scales] * len(names)
    for what, values in (("control_image", pictures), (CONTROL_SCALE, weights)):
        if len(values) != len(names):
            raise InputError(
                got=f"{len(values)} as {what}",
                expected=f"a list of one for each of {len(names)} ControlNets",
                remedy="pass them in the order of controlnet= of Engine.build",
            )
    read = {}
    for name, picture in zip(names, pictures, strict=True):
        channels, *size = network.conditions[name].shape
        read[name] = read_pictures("control_image", picture, channels=channels, size=(size[0], size[1]), low=0.0)
    _add(made, "", {**read, CONTROL_SCALE: [check_number(CONTROL_SCALE, weight) for weight in weights]})
