"""The public functions of a pipeline's engine, with values that belong nowhere."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from argument_walk import walk
from tiny_pipelines import tiny_pipeline

from skipstep import Engine, accelerate

SHAPE = (2, 3, 8, 8)


@pytest.mark.slow
def test_editing_of_pictures():
    with Engine.build(str(tiny_pipeline("ldm")[1]), plans=[2], device="cpu", backend="torch") as engine:
        pictures = np.zeros((2, 3, 16, 16), np.float32)
        walk("invert", functools.partial(engine.invert), lambda: {"images": pictures, "steps": 2}, SHAPE)
        between = {"a": pictures[0], "b": 1, "n": 2, "steps": 2}
        walk("interpolate", functools.partial(engine.interpolate), lambda: dict(between), SHAPE)


@pytest.mark.slow
def test_accelerated_pipelines():
    pipe = tiny_pipeline("ldm")[0]
    walk("accelerate", accelerate, lambda: {"pipe": pipe, "plans": [2], "device": "cpu", "backend": "torch"}, SHAPE)


def test_a_result_or_an_error_of_ours():
    with Engine.build(str(tiny_pipeline("ldm")[1]), plans=[2], device="cpu", backend="torch") as engine:
        pictures, latents = np.zeros((2, 3, 16, 16), np.float32), np.zeros(SHAPE, np.float32)
        calls = {
            "encode": lambda: {"image": pictures},
            "decode": lambda: {"latents": latents},
            "preview": lambda: {"latents": latents},
            "sample": lambda: {"steps": 2, "seeds": [1, 2], "image": pictures, "mask": pictures[:, :1] + 1},
        }
        for name, arguments in calls.items():
            walk(name, functools.partial(getattr(engine, name)), arguments, SHAPE)
