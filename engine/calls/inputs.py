"""What a call to an engine of a whole pipeline may pass beside conditions (skipstep.pipelines)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast

from skipstep.calls.request import Conditions
from skipstep.errors import InputError

if TYPE_CHECKING:
    from skipstep.networks.spec import NetworkSpec


class Prompted(Conditions, total=False):
    """Conditions, and for an engine that was built from a latent pipeline's folder:

    prompt           a text for all samples, or one each; negative_prompt the same for the unconditional half of
    negative_prompt  guidance, where the empty prompt is usual. What the text encoder does not read is cut off, with a
                     warning that quotes it.
    prompt_2         what SDXL's second text encoder reads, and negative_prompt_2; the first's where they are left out.
    prompt_syntax    "plain", or "a1111": weights in brackets, (cat:1.3) and [dog] (skipstep.pipelines.prompts).
    control_image    what a ControlNet reads: pictures, PIL or float32 `[B, C, H, W]` in [0, 1]; of several ControlNets
                     a list with those of each. Its weight is
    controlnet_conditioning_scale   a number, or a list of one for each ControlNet; 1 where it is left out.
    """

    prompt: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    prompt_2: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    prompt_syntax: Literal["plain", "a1111"] | None
    control_image: Any
    controlnet_conditioning_scale: float | Sequence[float] | None


class Inputs(Prompted, total=False):
    """Prompts and other conditions, and for an engine that was built from a latent pipeline's folder:

    image            pictures to begin with, PIL or float32 `[B, C, H, W]` in [-1, 1], noised as far as
    strength         says, in (0, 1]: the share of the steps that is walked; 0.8 where it is left out.
    mask             white (1) where the picture is drawn anew and black (0) where it stays; strength is then 1.
    noise            "skipstep", or "torch": the initial noise of diffusers' pipelines with a torch.Generator per seed
                     on the CPU, low 32 bits of the seed; for any engine.
    """

    image: Any
    mask: Any
    strength: float | None
    noise: Literal["skipstep", "torch"] | None


_STARTS: Final = ("image", "mask", "strength", "noise")
_TEXTS: Final = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_syntax")
CONTROLS: Final = ("control_image", "controlnet_conditioning_scale")
_OF_PIPELINES: Final = (*_TEXTS, *CONTROLS, "image", "mask", "strength")
_FURTHER: Final = frozenset((*_STARTS, *_OF_PIPELINES))


class Encoding(Protocol):
    """What makes embeddings of prompts (skipstep.loops.contract.Parts)."""

    def conditions(self, network: NetworkSpec, inputs: Mapping[str, Any]) -> dict[str, Any]: ...


def split_inputs(
    pipeline: Encoding | None, network: NetworkSpec, inputs: Mapping[str, Any]
) -> tuple[Conditions, dict[str, Any]]:
    """The conditions of a call, with embeddings in place of prompts, and what it begins with. Raises InputError."""
    if pipeline is None:
        if _FURTHER.isdisjoint(inputs):  # Most calls, and nothing is spent on them.
            return cast(Conditions, inputs), {}
        refuse_inputs(inputs)
    conditions = dict(inputs) if pipeline is None else pipeline.conditions(network, inputs)
    starts = {name: conditions.pop(name, None) for name in _STARTS}
    for name in _OF_PIPELINES:
        conditions.pop(name, None)
    return cast(Conditions, conditions), {name: value for name, value in starts.items() if value is not None}


def embedded(pipeline: Encoding | None, network: NetworkSpec, inputs: Mapping[str, Any]) -> Conditions:
    """The conditions of a call that begins with pictures of its own. Raises InputError."""
    conditions, starts = split_inputs(pipeline, network, inputs)
    for name in starts:
        raise InputError(
            got=f"{name}= in a call that is about pictures of its own", expected="conditions", remedy="leave it out"
        )
    return conditions


def refuse_inputs(inputs: Mapping[str, Any]) -> None:
    """Raise InputError for what only the engine of a pipeline takes."""
    for name in _OF_PIPELINES:
        if inputs.get(name) is not None:
            raise InputError(
                got=f"{name}= for an engine of a network alone",
                expected="one of a pipeline's folder, with its text encoders and its autoencoder",
                remedy="pass that folder to Engine.build, or prompt_embeds= and x_T= to this engine",
            )
