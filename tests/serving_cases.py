"""Requests for a batcher: a small engine whose bits do not depend on the batch, and random requests of every kind."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from engines import build
from tiny_networks import Labelled

from skipstep import Engine, Plan

SHAPE = (3, 4, 4)


def serving_engine(**options: Any) -> Engine:
    """Elementwise, so that a row has the same bits in any batch; guided, and with plans of several structures."""
    engine = build(Labelled(), plans=[3], sample_shape=SHAPE, num_classes=4, null_label=3, **options)
    defaults = dict(engine.plan_defaults)
    for further in (
        {"steps": 1},
        {"steps": 4, "eta": 1.0},
        {"steps": 5, "solver": "dpm_solver_pp_2m"},
        {"steps": 2, "solver": "heun"},
        {"steps": 6, "guidance_interval": (0.1, 3.0)},
        {"steps": 3, "clip": "dynamic", "dynamic_quantile": 0.9},
    ):
        engine.add_plan(Plan(**{**defaults, **further}))
    return engine


def random_request(engine: Engine, rng: np.random.Generator, *, num_samples: int = 1) -> dict[str, Any]:
    """Arguments of `engine.sample`: a plan, seeds and labels, with guidance in every second request."""
    plans = list(engine.plans.values())
    request: dict[str, Any] = {
        "plan": plans[rng.integers(len(plans))],
        "seeds": rng.integers(0, 2**40, num_samples).tolist(),
        "class_labels": rng.integers(0, 4, num_samples).tolist(),
    }
    if rng.random() < 0.5:
        request["guidance_scale"] = float(rng.uniform(1.5, 4.0))
        if rng.random() < 0.3:
            request["guidance_rescale"] = float(rng.uniform(0.1, 1.0))
    return request


SECONDS = 60.0


class Troubled(Labelled):
    """NaN for the label 2, and an error for every batch that holds the label 1."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if (labels == 1).any():
            raise RuntimeError("label 1")
        return super().forward(x, t, labels).masked_fill((labels == 2).view(-1, 1, 1, 1), torch.nan)


class Gate:
    """A callback that holds the batcher's thread at its first step, until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened, self.events = threading.Event(), threading.Event(), []

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        self.reached.set()
        assert self.opened.wait(SECONDS)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "skipstep-batcher"]
