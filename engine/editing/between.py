"""Samples between two initial noises, or between four: functions over an engine, as those of skipstep.editing.edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from skipstep.arrays import from_dlpack, host_floats
from skipstep.calls.inputs import Prompted, embedded
from skipstep.calls.noise import sample_noise
from skipstep.calls.request import MAX_SEED, resolve_latents
from skipstep.calls.trajectory import Progress
from skipstep.editing.edit import invert, is_picture, num_evaluations, parts_of
from skipstep.editing.interpolation import MAX_POINTS, slerp, slerp_grid
from skipstep.errors import check_callable, check_integer, check_items
from skipstep.kernels.layout import Stream
from skipstep.loops.contract import Array, Sampler
from skipstep.loops.runner import OutputType
from skipstep.plans.plan import Plan


def interpolate(
    engine: Sampler,
    a: Any,
    b: Any,
    n: int,
    *,
    steps: int | None = None,
    plan: Plan | None = None,
    seeds: int | Sequence[int] | None = None,
    output_type: OutputType = "np",
    progress: Progress | None = None,
    **conditions: Unpack[Prompted],
) -> Any:
    """Draw `n` ≥ 2 samples between the initial noises a and b, both included.

    a, b are seeds, or latents float32 `[*sample_shape]`; of a pipeline also pictures, whose noise `invert` finds with
    the conditions of the call, then one for all samples. The way between them is `slerp`. `seeds` key the fresh noise
    of plans that add some. Raises InputError.
    """
    n = check_integer("n", n, low=2, high=MAX_POINTS, remedy="pass n=8; both ends are drawn")
    (start, end), given = _noises(engine, [a, b], n, steps=steps, plan=plan, progress=progress, **conditions)
    return engine.sample(x_T=slerp(start, end, np.linspace(0.0, 1.0, n)), seeds=seeds, output_type=output_type, **given)


def interpolate_grid(
    engine: Sampler,
    corners: Sequence[Any],
    *,
    rows: int,
    columns: int,
    steps: int | None = None,
    plan: Plan | None = None,
    seeds: int | Sequence[int] | None = None,
    output_type: OutputType = "np",
    progress: Progress | None = None,
    **conditions: Unpack[Prompted],
) -> Any:
    """Draw `rows·columns` samples, row by row, between four corners: top left, top right, bottom left and right.

    As `interpolate`, down both sides and then across.
    """
    four = check_items("corners", corners, expected="four seeds or latents", remedy="pass corners=[0, 1, 2, 3]")
    rows, columns = (check_integer(k, v, low=2, high=MAX_POINTS) for k, v in (("rows", rows), ("columns", columns)))
    noises, given = _noises(engine, four, rows * columns, steps=steps, plan=plan, progress=progress, **conditions)
    x_T = slerp_grid(noises, rows=rows, columns=columns)
    return engine.sample(x_T=x_T, seeds=seeds, output_type=output_type, **given)


def _noises(
    engine: Sampler, sources: Sequence[Any], number: int, *, progress: Progress | None, **call: Any
) -> tuple[list[Array], dict[str, Any]]:
    """The initial noises of these samples, and what is left of the call that then draws `number`."""
    check_callable("progress", progress, "done, total")
    found = [source if is_picture(engine, source) else _latents_of(engine, source) for source in sources]
    places = [i for i, source in enumerate(found) if is_picture(engine, source)]
    if places:
        steps, plan = call.pop("steps"), call.pop("plan")
        call = {
            **embedded(engine.runner.pipeline, engine.network, call),
            "plan": engine.select_plan(steps=steps, plan=plan),
        }
        sizes = [num_evaluations(engine, call["plan"], size) for size in (*[1] * len(places), number)]
        *ups, progress = parts_of(progress, sizes)
        for i, up in zip(places, ups, strict=True):
            found[i] = invert(engine, found[i], progress=up, **call).latents[0]
    return found, {**call, "progress": progress}


def _latents_of(engine: Sampler, source: int | Array) -> Array:
    if hasattr(source, "__dlpack__"):
        latents = resolve_latents(host_floats("latents", from_dlpack("latents", source))[None], engine.network)
    else:
        seed = check_integer("seed", source, low=0, high=MAX_SEED, remedy="pass a seed, or latents of one sample")
        latents = sample_noise(engine.network, np.array([seed], np.uint64), Stream.INITIAL)
    first: Array = latents[0]
    return first
