"""Engines of the families in condition_families, and the textbook's loops over the same networks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from condition_families import ALL, SCALE, SIGMA_DATA, X_T
from engines import build
from onnx_files import batch_axes, write_onnx
from torch import Tensor

from skipstep import Engine, Plan

# A few float32 evaluations and steps in another order of operations, relative to the largest value of a sample.
TOLERANCE = 1e-5


@cache
def engine_of(name: str, backend: str) -> Engine:
    family = ALL[name]
    model: Any = family.network()
    if family.from_file:
        time = torch.zeros(2, dtype=torch.int64)
        values = [torch.from_numpy(np.asarray(each)) for each in family.given.values()]
        inputs = dict(
            zip(("sample", "timestep", *family.given), (torch.zeros(2, *family.shape), time, *values), strict=True)
        )
        folder = Path(tempfile.mkdtemp(prefix="skipstep-families-"))
        model = write_onnx(folder / "unet.onnx", model, inputs, dynamic=batch_axes(list(inputs)))
    given = {"plans": [family.plan], "schedule": None, "batch_sizes": [2], "backend": backend}
    return build(model, **given, **family.options)


Predict = Callable[[Tensor, float, int], tuple[Tensor, Tensor]]


def predictor(name: str, *, guided: bool) -> Predict:
    """predict(x, alpha_bar, timestep) -> the image and the noise in x = √a·x0 + √(1-a)·eps, float64: the network called
    as its own pipelines call it, at its own scale and time."""
    family = ALL[name]
    network, doubled = family.network(), guided and not family.from_guidance
    values = [torch.from_numpy(np.asarray(each)) for each in family.given.values()]
    if doubled:
        nulls = []
        for key, each in zip(family.given, values, strict=True):
            null = family.without.get(key, each)
            nulls.append(torch.full_like(each, null) if isinstance(null, int) else torch.as_tensor(null))
        values = [torch.cat(both) for both in zip(values, nulls, strict=True)]

    def output(x: Tensor, time: float) -> Tensor:
        state = (torch.cat([x, x]) if doubled else x).float()
        dtype = torch.int64 if isinstance(time, int) else torch.float32
        found = family.call(network, state, torch.full((len(state),), time, dtype=dtype), *values).sample
        found = found[:, : len(x[0])].double()  # Without a learned variance.
        if not doubled:
            return found
        conditional, unconditional = found.chunk(2)
        return unconditional + SCALE * (conditional - unconditional)

    def predict(x: Tensor, a: float, t: int) -> tuple[Tensor, Tensor]:
        if family.plan.prediction_type == "edm":  # arXiv 2206.00364, table 1.
            sigma, d = math.sqrt((1 - a) / a), SIGMA_DATA
            plain, both = x / math.sqrt(a), sigma**2 + d**2
            x0 = d**2 / both * plain + sigma * d / math.sqrt(both) * output(
                plain / math.sqrt(both), math.log(sigma) / 4
            )
            return x0, (plain - x0) / sigma
        if family.plan.prediction_type == "flow":  # arXiv 2210.02747: (1-s)·x0 + s·eps, and its velocity.
            s = math.sqrt(1 - a) / (math.sqrt(a) + math.sqrt(1 - a))
            plain = x * math.hypot(1 - s, s)
            velocity = output(plain, 1000 * s)
            return plain - s * velocity, plain + (1 - s) * velocity
        eps = output(x, t)
        return (x - math.sqrt(1 - a) * eps) / math.sqrt(a), eps

    return predict


def levels(plan: Plan) -> list[float]:
    """alpha_bar of the plan's timesteps and of its end."""
    return [*(float(plan.schedule.alpha_bar[int(t)]) for t in plan.timesteps), float(plan.final_alpha_bar)]


@torch.inference_mode()
def textbook(name: str, *, guided: bool) -> np.ndarray:
    """DDIM (eq. 12 of the paper, eta 0)."""
    plan, predict = ALL[name].plan, predictor(name, guided=guided)
    x = torch.from_numpy(X_T[name]).double()
    for t, a, p in zip(plan.timesteps, levels(plan), levels(plan)[1:], strict=False):
        x0, eps = predict(x, a, int(t))
        x = math.sqrt(p) * x0 + math.sqrt(1 - p) * eps
    return x.numpy()


@torch.inference_mode()
def textbook_inversion(name: str, *, guided: bool) -> np.ndarray:
    """The same steps upward, from the rows of X_T as images; the noise of a step is that at the level it leads to."""
    plan, predict = ALL[name].plan, predictor(name, guided=guided)
    x = torch.from_numpy(X_T[name]).double()
    upward = levels(plan)[::-1]
    for t, a, p in zip(plan.timesteps[::-1], upward, upward[1:], strict=False):
        _, eps = predict(x, p, int(t))
        x = math.sqrt(p / a) * x + (math.sqrt(1 - p) - math.sqrt(p * (1 - a) / a)) * eps
    return x.numpy()


def arguments(name: str, *, guided: bool) -> dict[str, Any]:
    given, without = ALL[name].passed
    found: dict[str, Any] = {"plan": ALL[name].plan, "x_T": X_T[name], "conditions": given}
    if guided:
        found |= {"guidance_scale": SCALE, "negative_conditions": without}
    return found


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_drawn(found: np.ndarray, expected: np.ndarray) -> None:
    assert error(found, expected) < TOLERANCE
