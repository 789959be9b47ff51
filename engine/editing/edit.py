"""Inversion, reconstruction, editing, interpolation: without fresh noise, an image determines the noise that draws it.

Functions over an engine, which are methods of `skipstep.Engine`. Images are `[B, *sample_shape]` in [-1, 1]. Each takes
the conditions of `Engine.sample` as well: labels, prompts, guidance (skipstep.calls.request.Conditions). `progress` is
called as progress(done, total), in network evaluations of the whole call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import numpy as np

from skipstep.arrays import from_dlpack, host_floats
from skipstep.calls.noise import sample_noise
from skipstep.calls.request import (
    MAX_SEED,
    Conditions,
    SampleRequest,
    resolve_latents,
    resolve_request,
    resolve_seeds,
)
from skipstep.calls.trajectory import Progress, part_of
from skipstep.editing.interpolation import MAX_POINTS, slerp, slerp_grid
from skipstep.editing.inversion import Inversion
from skipstep.editing.inversion import invert as invert_batch
from skipstep.errors import InputError, check_callable, check_choice, check_integer, check_items, check_number
from skipstep.kernels.layout import Stream
from skipstep.loops.contract import Array, Sampler
from skipstep.loops.runner import OutputType, check_finite, check_output_type
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
    **conditions: Unpack[Conditions],
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
        x_T=images,
        latents_name="images",
        **conditions,
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
    **conditions: Unpack[Conditions],
) -> Any:
    """Invert and draw again: how much of an image survives the round trip. Arguments as for `invert`."""
    check_output_type(output_type)
    check_callable("progress", progress, "done, total")
    chosen = engine.select_plan(steps=steps, plan=plan)
    refinements = _check_refinements(refinements)
    shares = (1 + refinements, 1)
    images = resolve_latents(images, engine.network, name="images")
    up, down = _parts(progress, [share * _num_evaluations(engine, chosen, len(images)) for share in shares])
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
    output_type: OutputType = "np",
    progress: Progress | None = None,
    **conditions: Unpack[Conditions],
) -> Any:
    """Draw `images` again from a level part of the way up, with other labels or none.

    strength      in (0, 1]: the share of the plan's steps that is drawn again; or
    noise_level   in (0, 1]: sqrt(1 - alpha_bar) to go up to, at most.
    method        "noise": fresh noise of `seeds` on the image (SDEdit, Meng et al. 2022, arXiv 2108.01073); small
                  strengths keep the layout. "invert": DDIM inversion with `source_labels`, which keeps more of it.

    Raises InputError, PlanError and PlanNotFoundError.
    """
    chosen = engine.select_plan(steps=steps, plan=plan)
    tail = chosen.started_at(_first_step(chosen, strength=strength, noise_level=noise_level))
    check_choice("method", method, ("noise", "invert"))
    check_callable("progress", progress, "done, total")
    check_output_type(output_type)
    if source_labels is not None and method == "noise":
        raise InputError(
            got="source_labels with method='noise'",
            expected="method='invert', which finds the noise of the image as it was labelled",
            remedy="leave source_labels out, or invert",
        )
    if seeds is None and method == "noise":
        raise InputError(got="no seeds", expected="a seed per image, for the fresh noise", remedy="pass seeds=[...]")
    images = resolve_latents(images, engine.network, name="images")
    if len(images) == 1 and seeds is not None:
        # One image, edited once with each seed.
        images = np.repeat(images, resolve_seeds(seeds).size, axis=0)
    request = resolve_request(
        engine.network,
        seeds=seeds,
        x_T=images,
        adds_noise=tail.adds_noise,
        latents_name="images",
        **conditions,
    )
    num_evaluations = _num_evaluations(engine, tail, request.num_samples)
    up, down = _parts(progress, [0 if method == "noise" else num_evaluations, num_evaluations])
    if method == "noise":
        assert request.seeds is not None, "they were checked"
        a = tail.alpha_bars[0]
        z = sample_noise(engine.network, request.seeds, Stream.EDIT)
        latents = (np.sqrt(a) * request.x_T + np.sqrt(1.0 - a) * z).astype(np.float32)
    else:
        source = resolve_request(
            engine.network,
            seeds=None,
            x_T=images,
            class_labels=source_labels,
            prompt_embeds=conditions.get("prompt_embeds"),
        )
        latents = _invert(engine, tail.inverted(), source, progress=up).latents
    result = engine.runner.run(Stages.of([tail]), dataclasses.replace(request, x_T=latents), progress=down)
    return engine.runner.as_output(result, output_type)


def interpolate(
    engine: Sampler,
    a: int | Array,
    b: int | Array,
    n: int,
    *,
    steps: int | None = None,
    plan: Plan | None = None,
    seeds: int | Sequence[int] | None = None,
    output_type: OutputType = "np",
    progress: Progress | None = None,
    **conditions: Unpack[Conditions],
) -> Any:
    """Draw `n` ≥ 2 samples between the initial noises a and b, both included.

    a, b are seeds, or latents float32 `[*sample_shape]`; the way between them is `slerp`. `seeds`
    key the fresh noise of plans that add some. Raises InputError.
    """
    n = check_integer("n", n, low=2, high=MAX_POINTS, remedy="pass n=8; both ends are drawn")
    x_T = slerp(_latents_of(engine, a), _latents_of(engine, b), np.linspace(0.0, 1.0, n))
    return engine.sample(
        steps=steps, plan=plan, x_T=x_T, seeds=seeds, output_type=output_type, progress=progress, **conditions
    )


def interpolate_grid(
    engine: Sampler,
    corners: Sequence[int | Array],
    *,
    rows: int,
    columns: int,
    steps: int | None = None,
    plan: Plan | None = None,
    seeds: int | Sequence[int] | None = None,
    output_type: OutputType = "np",
    progress: Progress | None = None,
    **conditions: Unpack[Conditions],
) -> Any:
    """Draw `rows·columns` samples, row by row, between four corners: top left, top right, bottom left and right.

    As `interpolate`, down both sides and then across.
    """
    given = check_items("corners", corners, expected="four seeds or latents", remedy="pass corners=[0, 1, 2, 3]")
    x_T = slerp_grid([_latents_of(engine, corner) for corner in given], rows=rows, columns=columns)
    return engine.sample(
        steps=steps, plan=plan, x_T=x_T, seeds=seeds, output_type=output_type, progress=progress, **conditions
    )


def _check_refinements(refinements: int) -> int:
    return check_integer("refinements", refinements, low=0, high=1000, remedy="pass 0, or a few, such as 3")


def _num_evaluations(engine: Sampler, plan: Plan, num_samples: int) -> int:
    return len(engine.split(num_samples)) * plan.num_evaluations


def _parts(progress: Progress | None, sizes: Sequence[int]) -> list[Progress | None]:
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
    total = (1 + refinements) * _num_evaluations(engine, plan, request.num_samples)
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


def _latents_of(engine: Sampler, source: int | Array) -> Array:
    if hasattr(source, "__dlpack__"):
        latents = resolve_latents(host_floats("latents", from_dlpack("latents", source))[None], engine.network)
    else:
        seed = check_integer("seed", source, low=0, high=MAX_SEED, remedy="pass a seed, or latents of one sample")
        latents = sample_noise(engine.network, np.array([seed], np.uint64), Stream.INITIAL)
    first: Array = latents[0]
    return first


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
