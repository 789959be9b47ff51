"""The pictures of an evaluation: strips of step counts, trajectories, interpolations and edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from skipstep.bench.quality.data import CLASS_NAMES
from skipstep.bench.quality.evaluation import Evaluation
from skipstep.calls.images import labelled_grid, to_pil

_GUIDANCE = 2.0
_IMAGES: Any = {"guidance_scale": _GUIDANCE, "output_type": "pil"}
_PULLOVER, _SNEAKER, _BOOT = 2, 7, 9


def draw_pictures(evaluation: Evaluation, folder: Path) -> dict[str, str]:
    """Write the PNG files and return a caption for each name."""
    captions = {}
    for draw in (_step_strip, _trajectory, _interpolation, _corner_grid, _edits):
        name = draw.__name__.removeprefix("_").replace("_", "-")
        captions[name] = draw(evaluation, folder / f"{name}.png")
    return captions


def _step_strip(evaluation: Evaluation, path: Path) -> str:
    counts = evaluation.grid.strip_steps
    rows = [
        evaluation.engine.sample(plan=evaluation.plan(steps=steps), seeds=range(10), class_labels=range(10), **_IMAGES)
        for steps in counts
    ]
    labelled_grid(rows, row_labels=[f"{n} steps" for n in counts], column_labels=CLASS_NAMES).save(path)
    return "The same ten seeds by step count, guidance 2."


def _trajectory(evaluation: Evaluation, path: Path) -> str:
    _, kept = evaluation.engine.sample(
        plan=evaluation.plan(steps=evaluation.grid.picture_steps),
        seeds=[3],
        class_labels=_BOOT,
        guidance_scale=_GUIDANCE,
        trajectory=max(1, evaluation.grid.picture_steps // 8),
    )
    rows = [to_pil(kept.x_t[:, 0]), to_pil(kept.x0[:, 0])]
    columns = [f"step {step + 1}" for step in kept.steps]
    labelled_grid(rows, row_labels=["state", "predicted"], column_labels=columns).save(path)
    return f"A trajectory of {evaluation.grid.picture_steps} steps: the state x_t, and the image predicted from it."


def _interpolation(evaluation: Evaluation, path: Path) -> str:
    rows, names = [], []
    for label, ends in ((_SNEAKER, (1, 2)), (_PULLOVER, (5, 9)), (_BOOT, (4, 12))):
        plan = evaluation.plan(steps=evaluation.grid.picture_steps)
        rows.append(evaluation.engine.interpolate(*ends, 10, plan=plan, class_labels=label, **_IMAGES))
        names.append(CLASS_NAMES[label])
    columns = [f"{w:.2f}" for w in np.linspace(0, 1, 10)]
    labelled_grid(rows, row_labels=names, column_labels=columns).save(path)
    return f"Between two initial noises, by spherical interpolation: {evaluation.grid.picture_steps} steps, η = 0."


def _corner_grid(evaluation: Evaluation, path: Path) -> str:
    size = 7
    drawn = evaluation.engine.interpolate_grid(
        [1, 2, 3, 4],
        rows=size,
        columns=size,
        plan=evaluation.plan(steps=evaluation.grid.picture_steps),
        class_labels=_PULLOVER,
        **_IMAGES,
    )
    rows = [drawn[size * r : size * (r + 1)] for r in range(size)]
    labelled_grid(rows, row_labels=[""] * size, column_labels=[""] * size).save(path)
    return f"Between four initial noises, one in each corner: {evaluation.grid.picture_steps} steps."


def _edits(evaluation: Evaluation, path: Path) -> str:
    images, labels = evaluation.test_images(_SNEAKER, 5), [_BOOT] * 5
    plan = evaluation.plan(steps=evaluation.grid.picture_steps)
    rows, names = [to_pil(images)], ["test image"]
    for strength in (0.4, 0.6, 0.8):
        drawing: dict[str, Any] = {"plan": plan, "strength": strength, "class_labels": labels, **_IMAGES}
        rows.append(evaluation.engine.edit(images, seeds=range(5), **drawing))
        names.append(f"noise, {strength:g}")
    inverted = evaluation.engine.edit(
        images,
        plan=plan,
        strength=0.8,
        method="invert",
        source_labels=[_SNEAKER] * 5,
        class_labels=labels,
        **_IMAGES,
    )
    rows.append(inverted)
    names.append("inverted, 0.8")
    labelled_grid(rows, row_labels=names, column_labels=[f"image {i + 1}" for i in range(len(images))]).save(path)
    return "Test images of sneakers drawn again as ankle boots: fresh noise of three strengths, and inversion."
