"""`skipstep.accelerate`: a diffusers pipeline object whose denoising loop is an engine's, and everything else its own.

A call is the pipeline's own, from its arguments to its output. Two of its parts are replaced for its duration: the
scheduler, by one with the timesteps of a plan, and the network, by one that notes what the loop gives it. The whole
loop is drawn at its first step, or a step at a time where something else happens between the steps: a callback, fresh
noise of the call's generator, a picture that is kept in part. Needs torch and diffusers.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Unpack

import numpy as np

from skipstep.calls.request import SampleRequest, resolve_request
from skipstep.engine import Engine
from skipstep.errors import EngineStateError, InputError, PlanNotFoundError, check_integer
from skipstep.kernels.layout import Column
from skipstep.networks.condition import Condition
from skipstep.networks.spec import PROMPTS
from skipstep.pipelines.building import FAMILIES
from skipstep.pipelines.spec import MASKED
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages
from skipstep.reporting import LOGGER

if TYPE_CHECKING:
    from skipstep.building import BuildOptions

_PARTS: Final = ("unet", "scheduler")
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
    known = family.__name__ in FAMILIES and "ControlNet" not in family.__name__
    if not known or not family.__module__.startswith("diffusers.") or "engine" in vars(family):
        raise InputError(
            got=f"a {base.__name__} whose call is not one of diffusers, or accelerated already",
            expected=f"one of {', '.join(each for each in FAMILIES if 'ControlNet' not in each)}",
            remedy="pass Engine.build the pipeline instead, and its embeddings to engine.sample",
        )
    name = type(pipe.scheduler).__name__
    for option in ("sample_shape", "conditions"):
        if options.get(option) is not None:
            raise _refused(f"{option}=", "leave it out: the pipeline says it; height= and width= set the size")
    shape = _sample_shape(pipe, options.pop("height", None), options.pop("width", None))
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
    parts = (*(getattr(pipe, part) for part in _PARTS), _adapters(pipe))

    @functools.wraps(base.__call__)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if any(now is not then for now, then in zip((self.unet, self.scheduler), parts, strict=False)) or (
            _adapters(self) != parts[-1]
        ):
            raise EngineStateError(
                got="a pipeline whose network, adapters or scheduler changed after it was accelerated",
                expected="those that the engine was made of",
                remedy="call skipstep.accelerate again with the pipeline as it is now",
            )
        return _call(self, base, engine, arguments, named)

    made = copy.copy(pipe)
    told = {"__call__": call, "__module__": base.__module__, "__doc__": base.__doc__, "engine": engine}
    made.__class__ = type(base.__name__, (base,), told)
    return made


def _sample_shape(pipe: Any, height: int | None, width: int | None) -> tuple[int, int, int]:
    decoder, config = getattr(pipe, "vae", None) or pipe.vqvae, pipe.unet.config
    factor = 2 ** (len(decoder.config.block_out_channels) - 1)
    usual = config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size] * 2
    sides = []
    for name, pixels, side in zip(("height", "width"), (height, width), usual, strict=True):
        pixels = side * factor if pixels is None else check_integer(name, pixels, low=factor, remedy="pass pixels")
        if pixels % factor:
            near = round(pixels / factor) * factor
            raise InputError(got=f"{name}={pixels}", expected=f"a multiple of {factor}", remedy=f"pass {name}={near}")
        sides.append(pixels // factor)
    return config.out_channels, *sides


def _adapters(pipe: Any) -> tuple[Any, ...]:
    return tuple(getattr(pipe.unet, "peft_config", None) or ())


def _call(pipe: Any, base: Any, engine: Engine, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
    signature = inspect.signature(base.__call__)
    given = dict(signature.bind(pipe, *arguments, **named).arguments)
    given |= given.pop("kwargs", {})
    for name in _REFUSED:
        if given.get(name) is not None:
            raise _refused(f"{name}=", f"leave {name} out, or call the pipeline that this one was made of")
    if engine.network.sample_shape[1:] != _sample_shape(pipe, None, None)[1:]:
        factor = 2 ** (len((getattr(pipe, "vae", None) or pipe.vqvae).config.block_out_channels) - 1)
        sides = zip(("height", "width"), engine.network.sample_shape[1:], strict=True)
        named = {**{name: side * factor for name, side in sides if name in signature.parameters}, **named}
    own = copy.copy(pipe)  # Of this call alone: others may run at the same time.
    own.__class__ = base
    between = given.get("callback_on_step_end") or given.get("callback")
    kept_in_part = given.get("mask_image") is not None and MASKED not in engine.network.conditions
    with ExitStack() as held:
        walk = _Walk(own, engine, bool(between) or kept_in_part, given.get("eta") or 0.0, held)
        own.__dict__.update(unet=_Network(pipe.unet, walk), scheduler=walk)
        return base.__call__(own, *arguments, **named)


def _refused(what: str, remedy: str) -> InputError:
    return InputError(got=f"{what} for an accelerated pipeline", expected="what its engine can do", remedy=remedy)


class _Network:
    """In place of a pipeline's network: it notes what it is given, and predicts zeros that no one reads."""

    def __init__(self, real: Any, walk: _Walk) -> None:
        self._real, self._walk = real, walk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(
        self,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any = None,
        *,
        timestep_cond: Any = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        for name, value in others.items():
            if value is not None:
                raise _refused(f"the network's argument {name}", "call the pipeline that this one was made of")
        channels = self._walk.engine.network.sample_shape[0]
        inputs = {PROMPTS: encoder_hidden_states, **(added_cond_kwargs or {})}
        if sample.shape[1] > channels:
            inputs[MASKED] = sample[:, channels:]
        self._walk.note(sample, {name: value for name, value in inputs.items() if value is not None})
        nothing = sample.new_zeros((len(sample), channels, *sample.shape[2:]))
        return SimpleNamespace(sample=nothing) if return_dict else (nothing,)


class _Walk:
    """In place of a pipeline's scheduler: the timesteps of a plan, and at each step the state that an engine leads to.

    `stepwise`: something may change the latents between the steps.
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(self, pipe: Any, engine: Engine, stepwise: bool, eta: float, held: ExitStack) -> None:
        self.pipe, self.engine, self._stepwise, self._eta, self._held = pipe, engine, stepwise, eta, held
        self._real = pipe.scheduler
        self._inputs: dict[str, Any] = {}
        self._given: dict[str, Any] | None = None
        self._result: Any = None
        self._runs: list[tuple[slice, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **options: Any) -> None:
        import torch

        held = sorted({each.steps or 0 for each in self.engine.plans.values()})
        try:
            plan = self.engine.select_plan(steps=num_inference_steps)
        except PlanNotFoundError as error:
            raise PlanNotFoundError(
                got=f"num_inference_steps={num_inference_steps}, which no plan has",
                expected=error.expected,
                remedy=f"pass one of {held}, or compile_on_miss=True to skipstep.accelerate",
            ) from error
        if self._eta not in (0.0, plan.eta):
            raise _refused(
                f"eta={self._eta:g} and {plan!r}", f"pass skipstep.accelerate a Plan with eta={self._eta:g}, or eta=0"
            )
        if any(value is not None for value in options.values()):  # A consistency model spaces a part of the steps anew.
            own = copy.deepcopy(self._real)
            own.set_timesteps(num_inference_steps, **options)
            plan = replace(plan, steps=None, timesteps=tuple(map(int, own.timesteps)))
        self._plan, self._steps = plan, list(plan.timesteps)
        self.timesteps = torch.tensor(self._steps, device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The first step says it, too."""

    def scale_model_input(self, sample: Any, timestep: Any = None) -> Any:
        return sample

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        level = self._plan.alpha_bars[self._index(timesteps)]
        return float(np.sqrt(level)) * original_samples + float(np.sqrt(1.0 - level)) * noise

    def _index(self, timesteps: Any) -> int:
        return self._steps.index(int(timesteps.flatten()[0]))

    def note(self, sample: Any, inputs: dict[str, Any]) -> None:
        """What the network is given at a step. Raises InputError where a callback changed it after the first."""
        now = {**inputs, "guidance_scale": getattr(self.pipe, "guidance_scale", None)}
        if self._given is None:
            side = self.engine.network.sample_shape[1:]
            if tuple(sample.shape[2:]) != side:
                raise _refused(
                    f"a picture of {' by '.join(map(str, sample.shape[2:]))} latents, not {side[0]} by {side[1]},",
                    "pass height= and width= of these pictures to skipstep.accelerate",
                )
            self._inputs, self._num_rows = inputs, len(sample)
            self._given = {name: each.clone() if hasattr(each, "clone") else each for name, each in now.items()}
            return
        if not self._stepwise:
            return
        for name, first in self._given.items():
            if not bool((now[name] == first).all() if hasattr(first, "all") else now[name] == first):
                raise _refused(f"a callback that changes {name}", "change the latents alone, or call the original")

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True, **_: Any
    ) -> Any:
        if self._result is None:
            self._start(self._index(timestep), sample)
        result = self._advanced(self._index(timestep), sample, generator) if self._runs else self._result
        return SimpleNamespace(prev_sample=result) if return_dict else (result, result)

    def _start(self, index: int, sample: Any) -> None:
        request = self._request(sample)
        plan = self._plan if index == 0 else self._plan.started_at(index)
        stages, runner = Stages.of([plan]), self.engine.runner
        self.engine.plans.check_guidance([plan], request.guidance)
        if not (self._stepwise or stages.adds_noise):
            drawn = runner.loop.new_samples(tuple(sample.shape))
            runner.draw(stages, request, drawn)
            self._result = _like(drawn, sample)
            return
        if self.engine.device != "cpu" and len(self.engine.split(len(sample))) > 1:
            raise _refused(
                f"{len(sample)} pictures in batches of {self.engine.batch_sizes}, a step at a time",
                f"pass batch_sizes=[{len(sample)}] to skipstep.accelerate",
            )
        # The noise comes from the call's generator.
        self._sigmas = stages.table[:, 0, Column.SIGMA].copy() if stages.adds_noise else np.zeros(len(stages))
        flags = tuple(replace(each, add_noise=False) for each in stages.flags)
        stages = replace(stages, flags=flags, structures={})
        self._first, self._ends = index, np.flatnonzero(stages.ends_step)
        for part, its_stages, its_request in runner.parts(stages, request):
            self._runs.append((part, self._held.enter_context(runner.loop.start(its_stages, its_request))))
        self._result = sample

    def _advanced(self, index: int, sample: Any, generator: Any) -> Any:
        from diffusers.utils.torch_utils import randn_tensor

        last = int(self._ends[index - self._first])
        start = 0 if index == self._first else int(self._ends[index - self._first - 1]) + 1
        made = np.empty(tuple(sample.shape), np.float32)
        latents = sample.detach().float().cpu().numpy()
        for part, run in self._runs:
            state = run.state()
            size = part.stop - part.start
            state[:size] = latents[part]
            run.set_state(state)
            for stage in range(start, last + 1):
                run.advance(stage)
            made[part] = run.state()[:size]
        found = _like(made, sample)
        if sigma := float(self._sigmas[last]):
            found = found + sigma * randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
        return found

    def _request(self, sample: Any) -> SampleRequest:
        network, count = self.engine.network, len(sample)
        guided = self._num_rows == 2 * count
        halves: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for name, rows in self._inputs.items():
            without, given = (rows[:count], rows[count:]) if guided else (rows, rows)
            halves[0][name] = given.detach().float().cpu().numpy()
            if guided and network.all_conditions[name].null == "given":
                halves[1][name] = without.detach().float().cpu().numpy()
            elif not bool((without == given).all()):
                raise _refused(f"another {name} for the unconditional half of guidance", "pass the same for both")
        return resolve_request(
            network,
            seeds=None,
            x_T=sample.detach().float().to(self.engine.device),
            device=self.engine.device,
            guidance_scale=self.pipe.guidance_scale if guided or network.takes_guidance else None,
            guidance_rescale=(getattr(self.pipe, "guidance_rescale", None) or None) if guided else None,
            conditions=halves[0],
            negative_conditions=halves[1] or None,
        )


def _like(drawn: Any, sample: Any) -> Any:
    import torch

    return torch.as_tensor(drawn).to(device=sample.device, dtype=sample.dtype)
