"""`skipstep.accelerate`: a diffusers pipeline object whose denoising loop is an engine's, and everything else its own.

A call is the pipeline's own, from its arguments to its output, with two of its parts replaced for its duration
(skipstep.pipelines.stand_ins). Needs torch and diffusers.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Unpack

from skipstep.engine import Engine
from skipstep.errors import EngineStateError, InputError, check_integer
from skipstep.networks.condition import Condition
from skipstep.pipelines.building import FAMILIES
from skipstep.pipelines.spec import MASKED, UPSCALER
from skipstep.pipelines.stand_ins import Network, Walk, refused
from skipstep.plans.plan import Plan
from skipstep.reporting import LOGGER

if TYPE_CHECKING:
    from skipstep.building import BuildOptions

# Their step counts are drawn as they draw them; those of other schedulers as DDIM does on the same noise levels.
_DRAWN_ALIKE: Final = ("DDIMScheduler", "LCMScheduler")
_REFUSED: Final = (
    *("timesteps", "sigmas", "denoising_start", "denoising_end", "cross_attention_kwargs"),
    *("ip_adapter_image", "ip_adapter_image_embeds"),
)


def accelerate(
    pipe: Any,
    *,
    plans: Iterable[int | Plan],
    batch_sizes: Iterable[int] = (1,),
    compile_on_miss: bool = False,
    **options: Unpack[BuildOptions],
) -> Any:
    """A pipeline of the same class as `pipe`, and with its parts, that draws with an engine, its attribute `engine`.

    pipe             of diffusers: Stable Diffusion 1 and 2, SDXL, LCM, their forms that start from pictures, LDM.
    plans            step counts, from which num_inference_steps of a call chooses, or Plans of other solvers.
    batch_sizes, compile_on_miss, options  as for Engine.build; height= and width= are those of all pictures.

    Arguments and results are those of the class. What cannot be done is refused by name: an adapter, a schedule or a
    network argument of the call's own, and callbacks that change what the network reads; they may read everything, and
    change the latents. Text encoders and autoencoder run as they are, where they are. Raises InputError, and what
    Engine.build raises.
    """
    base = type(pipe)
    family = next((each for each in base.__mro__ if "__call__" in vars(each)), object)
    taken = [each for each in FAMILIES if "ControlNet" not in each and each != UPSCALER]
    if family.__name__ not in taken or not family.__module__.startswith("diffusers.") or "engine" in vars(family):
        raise InputError(
            got=f"a {base.__name__} whose call is not one of diffusers, or accelerated already",
            expected=f"one of {', '.join(taken)}",
            remedy="pass Engine.build the pipeline instead, and its embeddings to engine.sample",
        )
    name = type(pipe.scheduler).__name__
    for option in ("sample_shape", "conditions"):
        if options.get(option) is not None:
            raise refused(f"{option}=", "leave it out: the pipeline says it; height= and width= set the size")
    size, factor = _size(pipe, {side: options.pop(side, None) for side in ("height", "width")})  # type: ignore[misc]
    shape = (pipe.unet.config.out_channels, *(pixels // factor for pixels in size.values()))
    read: dict[str, Condition] = {}
    if extra := pipe.unet.config.in_channels - shape[0]:
        read[MASKED] = Condition((extra, *shape[1:]), null="same", concat_to_state=True)
    if getattr(pipe.unet.config, "addition_embed_type", None) == "text_time":
        read["time_ids"] = Condition((6,))  # A call may have other sizes in the unconditional half.
    options["sample_shape"], options["conditions"] = shape, read or None
    engine = Engine.build(
        pipe,
        plans=plans,
        batch_sizes=batch_sizes,
        compile_on_miss=compile_on_miss,
        # A consistency model's plans visit diffusers' levels as they are.
        compatibility=None if name == "LCMScheduler" else "diffusers",
        **options,
    )
    if name not in _DRAWN_ALIKE and any(plan.solver == "ddim" for plan in engine.plans.values()):
        LOGGER.warning("step counts are drawn as DDIM draws them, not as the pipeline's %s does", name)
    if engine.network.state != "vp":
        raise refused(f"a {name}", "pass Engine.build the pipeline instead, and its embeddings to engine.sample")
    made_of = _state(pipe)

    @functools.wraps(base.__call__)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if _state(self) != made_of:
            raise EngineStateError(
                got="a pipeline whose network, adapters or scheduler changed after it was accelerated",
                expected="those that the engine was made of",
                remedy="call skipstep.accelerate again with the pipeline as it is now",
            )
        return _call(self, base, engine, arguments, named, size)

    made = copy.copy(pipe)
    told = {"__call__": call, "__module__": base.__module__, "__doc__": base.__doc__, "engine": engine}
    made.__class__ = type(base.__name__, (base,), told)
    return made


def _size(pipe: Any, asked: Mapping[str, int | None]) -> tuple[dict[str, int], int]:
    """Pixels by name, and those a side of a latent one."""
    decoder, usual = getattr(pipe, "vae", None) or pipe.vqvae, pipe.unet.config.sample_size
    factor = 2 ** (len(decoder.config.block_out_channels) - 1)
    sides = usual if isinstance(usual, list | tuple) else [usual] * 2
    size = {name: side * factor for name, side in zip(asked, sides, strict=True)}
    for name, pixels in asked.items():
        if pixels is not None:
            size[name] = check_integer(name, pixels, low=factor, remedy="pass pixels")
            if size[name] % factor:
                near = round(size[name] / factor) * factor
                raise InputError(
                    got=f"{name}={pixels}", expected=f"a multiple of {factor}", remedy=f"pass {name}={near}"
                )
    return size, factor


def _state(pipe: Any) -> tuple[Any, ...]:
    """What an engine is made of, and the names of the network's adapters."""
    return pipe.unet, pipe.scheduler, *(getattr(pipe.unet, "peft_config", None) or ())


def _call(pipe: Any, base: Any, engine: Engine, arguments: Any, named: Any, size: Mapping[str, int]) -> Any:
    signature = inspect.signature(base.__call__)
    given = dict(signature.bind(pipe, *arguments, **named).arguments)
    given |= given.pop("kwargs", {})
    for name in _REFUSED:
        if given.get(name) is not None:
            raise refused(f"{name}=", f"leave {name} out, or call the pipeline that this one was made of")
    usual = {name: side for name, side in size.items() if name in signature.parameters and name not in given}
    own = copy.copy(pipe)  # Of this call alone: others may run at the same time.
    own.__class__ = base
    between = given.get("callback_on_step_end") or given.get("callback")
    kept_in_part = given.get("mask_image") is not None and MASKED not in engine.network.conditions
    with ExitStack() as held:
        walk = Walk(own, engine, bool(between) or kept_in_part, given.get("eta") or 0.0, held)
        own.__dict__.update(unet=Network(pipe.unet, walk), scheduler=walk)
        return base.__call__(own, *arguments, **named, **usual)
