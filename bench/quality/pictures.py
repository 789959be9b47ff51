"""The pictures of an evaluation: strips of step counts, trajectories, interpolations and edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from skipstep.bench.quality.evaluation import Evaluation
from skipstep.calls.images import labelled_grid, to_pil

_GUIDANCE = 2.0
_NUM, _EDITED = 10, 5


def draw_pictures(evaluation: Evaluation, folder: Path) -> dict[str, str]:
    """Write the PNG files and return a caption for each name."""
    captions = {}
    for draw in (_step_strip, _trajectory, _interpolation, _corner_grid, _edits):
        name = draw.__name__.removeprefix("_").replace("_", "-")
        captions[name] = draw(evaluation, folder / f"{name}.png")
    return captions


def _drawing(evaluation: Evaluation, first: int, num: int, *, one_class: bool = False) -> dict[str, Any]:
    """The arguments of pictures: the classes, or the prompts, from `first` on, under guidance where it applies."""
    places = np.full(num, first) if one_class else np.arange(first, first + num)
    given = evaluation.conditions(places, _GUIDANCE)
    if "class_labels" not in given and "prompt_embeds" not in given:
        given.pop("guidance_scale")
    return {**given, "output_type": "pil"}


def _names(evaluation: Evaluation, num: int) -> list[str]:
    names = evaluation.engine.network.class_names or [f"class {i}" for i in range(evaluation.num_classes)]
    return [names[i % len(names)] if names else f"seed {i}" for i in range(num)]


def _step_strip(evaluation: Evaluation, path: Path) -> str:
    counts = evaluation.grid.strip_steps
    given = _drawing(evaluation, 0, _NUM)
    rows = [evaluation.engine.sample(plan=evaluation.plan(steps=n), seeds=range(_NUM), **given) for n in counts]
    labels = [f"{n} steps" for n in counts]
    labelled_grid(rows, row_labels=labels, column_labels=_names(evaluation, _NUM)).save(path)
    return f"The same ten seeds by step count, guidance {_GUIDANCE:g}."


def _trajectory(evaluation: Evaluation, path: Path) -> str:
    steps = evaluation.grid.picture_steps
    _, kept = evaluation.engine.sample(
        plan=evaluation.plan(steps=steps),
        seeds=[3],
        trajectory=max(1, steps // 8),
        **_drawing(evaluation, evaluation.num_classes - 1, 1),
    )
    rows = [to_pil(kept.x_t[:, 0]), to_pil(kept.x0[:, 0])]
    columns = [f"step {step + 1}" for step in kept.steps]
    labelled_grid(rows, row_labels=["state", "predicted"], column_labels=columns).save(path)
    return f"A trajectory of {steps} steps: the state x_t, and the image predicted from it."


def _interpolation(evaluation: Evaluation, path: Path) -> str:
    rows, plan = [], evaluation.plan(steps=evaluation.grid.picture_steps)
    for place, ends in enumerate(((1, 2), (5, 9), (4, 12))):
        given = _drawing(evaluation, place, _NUM, one_class=True)
        rows.append(evaluation.engine.interpolate(*ends, _NUM, plan=plan, **given))
    columns = [f"{w:.2f}" for w in np.linspace(0, 1, _NUM)]
    labelled_grid(rows, row_labels=_names(evaluation, len(rows)), column_labels=columns).save(path)
    return f"Between two initial noises, by spherical interpolation: {evaluation.grid.picture_steps} steps, η = 0."


def _corner_grid(evaluation: Evaluation, path: Path) -> str:
    size = 7
    drawn = evaluation.engine.interpolate_grid(
        [1, 2, 3, 4],
        rows=size,
        columns=size,
        plan=evaluation.plan(steps=evaluation.grid.picture_steps),
        **_drawing(evaluation, 0, size * size, one_class=True),
    )
    rows = [drawn[size * r : size * (r + 1)] for r in range(size)]
    labelled_grid(rows, row_labels=[""] * size, column_labels=[""] * size).save(path)
    return f"Between four initial noises, one in each corner: {evaluation.grid.picture_steps} steps."


def _edits(evaluation: Evaluation, path: Path) -> str:
    images = evaluation.reference[:_EDITED]
    given = _drawing(evaluation, evaluation.num_classes - 1, _EDITED, one_class=True)
    plan = evaluation.plan(steps=evaluation.grid.picture_steps)
    rows, names = [to_pil(images)], ["reference"]
    for strength in (0.4, 0.6, 0.8):
        rows.append(evaluation.engine.edit(images, seeds=range(_EDITED), plan=plan, strength=strength, **given))
        names.append(f"noise, {strength:g}")
    labelled_grid(rows, row_labels=names, column_labels=[f"image {i + 1}" for i in range(_EDITED)]).save(path)
    return (
        "Reference images drawn again from fresh noise of three strengths, as the last class where there are classes."
    )
