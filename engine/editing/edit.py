"""Inversion, reconstruction, editing: without fresh noise, an image determines the noise that draws it.

Functions over an engine, which are methods of `skipstep.Engine`. Images are `[B, *sample_shape]` in [-1, 1]; of a
pipeline they are pictures, as for `Engine.encode`, or latents. Each takes the conditions of `Engine.sample` as well:
labels, prompts, guidance (skipstep.calls.inputs.Prompted). `progress` is called as progress(done, total), in network
evaluations of the whole call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import numpy as np

from skipstep.arrays import from_dlpack, is_tensor, unreadable
from skipstep.calls.inputs import CONTROLS, Prompted, embedded
from skipstep.calls.noise import sample_noise
from skipstep.calls.request import (
    Conditions,
    SampleRequest,
    resolve_latents,
    resolve_request,
    resolve_seeds,
)
from skipstep.calls.trajectory import Progress, part_of
from skipstep.editing.inversion import Inversion
from skipstep.editing.inversion import invert as invert_batch
from skipstep.errors import InputError, check_callable, check_choice, check_integer, check_number
from skipstep.kernels.layout import Stream
from skipstep.loops.contract import Array, Sampler
from skipstep.loops.runner import OutputType, check_finite, check_output_type
from skipstep.networks.spec import LABELS
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages


def invert(
    engine: Sampler,
    images: Any,
    *,
    steps: int | None = None,
    plan: Plan | None = None,
    evaluate_at: Literal["target", "source"] = "target",
    refinements: int = 0,
    tolerance: float = 1e-6,
    progress: Progress | None = None,
    **conditions: Unpack[Prompted],
) -> Inversion:
    """The noise from which the sampling plan of `steps` steps, or `plan`, draws `images`.

    evaluate_at   the network's timestep input on the way up: "target", the timestep of the step that
                  samples back, or "source", the textbook's ODE.
    refinements   fixed-point iterations a step, for "target"; each costs one evaluation.
    tolerance     root mean square residual at which a sample needs no more of them.
    progress      called as progress(done, total), in network evaluations; those that are not needed count as done.

    With guidance much above 1 no fixed point need exist; look at the residuals.
    Raises InputError (also for a plan that adds noise: it has no inverse), PlanNotFoundError, and NonFiniteError
    where the network returned NaN.
    """
    check_callable("progress", progress, "done, total")
    sampling = engine.select_plan(steps=steps, plan=plan)
    if sampling.adds_noise:
        raise InputError(
            got=f"inversion of {sampling!r}",
            expected="a plan without fresh noise: what eta > 0 adds cannot be found again",
            remedy="use a plan with eta=0",
        )
    check_choice("evaluate_at", evaluate_at, ("target", "source"))
    tolerance = check_number("tolerance", tolerance, low=0.0)
    refinements = _check_refinements(refinements)
    if refinements and evaluate_at == "source":
        raise InputError(
            got="refinements with evaluate_at='source'",
            expected="evaluate_at='target': only there is the answer a fixed point",
            remedy="leave evaluate_at out",
        )
    request = resolve_request(
        engine.network,
        seeds=None,
        x_T=_of_network(engine, images),
        latents_name="images",
        **embedded(engine.runner.pipeline, engine.network, conditions),
    )
    plan = sampling.inverted(evaluate_at=evaluate_at)
    return _invert(engine, plan, request, refinements=refinements, tolerance=tolerance, progress=progress)


def reconstruct(
    engine: Sampler,
    images: Any,
    *,
    steps: int | None = None,
    plan: Plan | None = None,
    refinements: int = 0,
    output_type: OutputType = "np",
    progress: Progress | None = None,
    **conditions: Unpack[Prompted],
) -> Any:
    """Invert and draw again: how much of an image survives the round trip. Arguments as for `invert`."""
    check_output_type(output_type)
    check_callable("progress", progress, "done, total")
    chosen = engine.select_plan(steps=steps, plan=plan)
    refinements = _check_refinements(refinements)
    shares = (1 + refinements, 1)
    images = _of_network(engine, images)
    up, down = parts_of(progress, [share * num_evaluations(engine, chosen, len(images)) for share in shares])
    found = invert(engine, images, plan=chosen, refinements=refinements, progress=up, **conditions)
    return engine.sample(plan=chosen, x_T=found.latents, output_type=output_type, progress=down, **conditions)


def edit(
    engine: Sampler,
    images: Any,
    *,
    steps: int | None = None,
    plan: Plan | None = None,
    strength: float | None = None,
    noise_level: float | None = None,
    method: Literal["noise", "invert"] = "noise",
    seeds: int | Sequence[int] | None = None,
    source_labels: int | Sequence[int] | None = None,
    source_prompt: str | Sequence[str] | None = None,
    output_type: OutputType = "np",
    progress: Progress | None = None,
    **conditions: Unpack[Prompted],
) -> Any:
    """Draw `images` again from a level part of the way up, with other labels or none.

    strength      in (0, 1]: the share of the plan's steps that is drawn again; or
    noise_level   in (0, 1]: sqrt(1 - alpha_bar) to go up to, at most.
    method        "noise": fresh noise of `seeds` on the image (SDEdit, Meng et al. 2022, arXiv 2108.01073); small
                  strengths keep the layout. "invert": DDIM inversion with `source_labels` or `source_prompt`, which
                  keeps more of it; left out, no label and the prompt of the call.

    Raises InputError, PlanError and PlanNotFoundError.
    """
    chosen = engine.select_plan(steps=steps, plan=plan)
    tail = chosen.started_at(_first_step(chosen, strength=strength, noise_level=noise_level))
    check_choice("method", method, ("noise", "invert"))
    check_callable("progress", progress, "done, total")
    check_output_type(output_type)
    for name, source in (("source_labels", source_labels), ("source_prompt", source_prompt)):
        if source is not None and method == "noise":
            raise InputError(
                got=f"{name} with method='noise'",
                expected="method='invert', which finds the noise of the image as it was labelled",
                remedy=f"leave {name} out, or invert",
            )
    if seeds is None and method == "noise":
        raise InputError(got="no seeds", expected="a seed per image, for the fresh noise", remedy="pass seeds=[...]")
    images = _of_network(engine, images)
    pipeline = engine.runner.pipeline
    target = embedded(pipeline, engine.network, conditions)
    if len(images) == 1 and seeds is not None:
        # One image, edited once with each seed.
        images = np.repeat(images, resolve_seeds(seeds).size, axis=0)
    request = resolve_request(
        engine.network,
        seeds=seeds,
        x_T=images,
        adds_noise=tail.adds_noise,
        latents_name="images",
        **target,
    )
    count = num_evaluations(engine, tail, request.num_samples)
    up, down = parts_of(progress, [0 if method == "noise" else count, count])
    if method == "noise":
        assert request.seeds is not None, "they were checked"
        a = tail.alpha_bars[0]
        z = sample_noise(engine.network, request.seeds, Stream.EDIT)
        latents = (np.sqrt(a) * request.x_T + np.sqrt(1.0 - a) * z).astype(np.float32)
    else:
        named = {name: each for name, each in (target.get("conditions") or {}).items() if name != LABELS}
        given: Conditions = {"prompt_embeds": target.get("prompt_embeds"), "conditions": named}
        if source_prompt is not None:
            kept = {name: each for name, each in conditions.items() if name in (*CONTROLS, "prompt_syntax")}
            given = embedded(pipeline, engine.network, {**kept, "prompt": source_prompt})
        given["class_labels"] = source_labels
        found = resolve_request(engine.network, seeds=None, x_T=images, **given)
        latents = _invert(engine, tail.inverted(), found, progress=up).latents
    result = engine.runner.run(Stages.of([tail]), dataclasses.replace(request, x_T=latents), progress=down)
    return engine.runner.as_output(result, output_type)


def _check_refinements(refinements: int) -> int:
    return check_integer("refinements", refinements, low=0, high=1000, remedy="pass 0, or a few, such as 3")


def num_evaluations(engine: Sampler, plan: Plan, num_samples: int) -> int:
    return len(engine.split(num_samples)) * plan.num_evaluations


def parts_of(progress: Progress | None, sizes: Sequence[int]) -> list[Progress | None]:
    """The progress of each part of a call, in evaluations of the whole call."""
    starts = np.cumsum([0, *sizes]).tolist()
    return [part_of(progress, start, starts[-1]) for start in starts[:-1]]


def _invert(
    engine: Sampler,
    plan: Plan,
    request: SampleRequest,
    *,
    refinements: int = 0,
    tolerance: float = 0.0,
    progress: Progress | None = None,
) -> Inversion:
    engine.runner.check()
    stages = Stages.of([plan])
    total = (1 + refinements) * num_evaluations(engine, plan, request.num_samples)
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1 + refinements
        if progress is not None:
            progress(done, total)

    latents = np.empty((request.num_samples, *engine.network.sample_shape), np.float32)
    residuals = np.empty((len(stages), request.num_samples), np.float32)
    for part, _, padded in engine.runner.parts(stages, request):
        inverted = invert_batch(
            engine.runner.loop,
            stages,
            padded,
            refinements=refinements,
            tolerance=tolerance,
            after_step=after_step,
        )
        size = part.stop - part.start
        latents[part], residuals[:, part] = inverted.latents[:size], inverted.residuals[:, :size]
    check_finite(latents)
    return Inversion(latents, residuals)


def is_picture(engine: Sampler, source: Any) -> bool:
    """Whether this is a picture of the engine's pipeline, or several, and not what its network reads."""
    shape = engine.network.sample_shape
    if engine.runner.pipeline is None or (is_tensor(source) and unreadable(source) is not None):
        return False
    sides = tuple(getattr(source, "shape", ()))
    return hasattr(source, "convert") or (len(sides) > 2 and sides[-len(shape) :] != shape)


def _of_network(engine: Sampler, images: Any) -> Array:
    """`[B, *sample_shape]` of images or latents; pictures of a pipeline are encoded."""
    given = from_dlpack("images", images)
    if is_picture(engine, given) or (engine.runner.pipeline is not None and isinstance(given, list | tuple)):
        given = engine.encode(given)
    resolved: Array = resolve_latents(given, engine.network, name="images")
    return resolved


def _first_step(plan: Plan, *, strength: float | None, noise_level: float | None) -> int:
    """The step to start at, in [0, S-1]."""
    if (strength is None) == (noise_level is None):
        raise InputError(
            got="neither strength nor noise_level" if strength is None else "both strength and noise_level",
            expected="one of them",
            remedy="pass strength=0.6",
        )
    name, value = ("strength", strength) if strength is not None else ("noise_level", noise_level)
    value = check_number(name, value, low=0.0, high=1.0, above=True, remedy="0.3 keeps much of an image, 0.8 little")
    num_steps = len(plan.timesteps)
    if strength is not None:
        return num_steps - max(1, round(strength * num_steps))
    reached = np.sqrt(1.0 - plan.alpha_bars[:-1]) <= value
    if not reached.any():
        raise InputError(
            got=f"noise_level={value!r}, below that of the plan's last step",
            expected=f"at least {np.sqrt(1.0 - plan.alpha_bars[-2]):.3g}",
            remedy="use a plan with more steps, or a higher level",
        )
    return int(np.argmax(reached))
