"""`engine.sample` beside diffusers' DDIMPipeline in eager float32: same weights, noise, steps and threads.

A case is timed only after both have drawn the same images to TOLERANCE. The recorded `stats` are those of
`engine.sample`; `extra_info` carries the pipeline's median, the ratio taken turn by turn, and the share of the time
that the engine spends outside the network.
"""

from __future__ import annotations

import statistics
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline

from skipstep import Engine, Plan
from skipstep.bench.models import MODELS, BenchModel
from skipstep.bench.record import environment
from skipstep.bench.timing import TimedDenoiser, median_ratio, take_turns
from skipstep.scheduler_config import read_scheduler_config

STEPS = 10
# Two float32 implementations of the same network over ten steps, largest difference of pixels in [0, 1].
TOLERANCE = 1e-3
ROUNDS = {
    ("fashion-mnist", 1): 15,
    ("fashion-mnist", 16): 9,
    ("cifar10-architecture", 1): 7,
    ("cifar10-architecture", 16): 3,
}


@cache
def model_named(name: str) -> BenchModel:
    return MODELS[name]()


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_sampling(name: str, batch_size: int, backend: str, benchmark: Any) -> None:
    model = model_named(name)
    labels = torch.arange(batch_size) % 10 if model.conditional else None
    if labels is not None:
        model.unet.labels = labels
    pipeline = DDIMPipeline(model.unet, model.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    x_T = torch.randn(
        batch_size, model.unet.config.in_channels, *[model.unet.config.sample_size] * 2, generator=seeded()
    )

    def run_diffusers() -> np.ndarray[Any, Any]:
        images = pipeline(batch_size, generator=seeded(), num_inference_steps=STEPS, output_type="np").images
        return np.asarray(images)

    plan = Plan(**read_scheduler_config(dict(model.scheduler.config)).plan_options(), steps=STEPS)
    started = time.perf_counter()
    engine = Engine.build(
        model.unet,
        plans=[plan],
        batch_sizes=[batch_size],
        backend=backend,
        device="cpu",
        num_threads=torch.get_num_threads(),
    )
    build_seconds = time.perf_counter() - started
    arguments: dict[str, Any] = {"plan": plan, "x_T": x_T, "output_type": "np"}
    if labels is not None:
        arguments["class_labels"] = labels.tolist()

    def run_engine() -> np.ndarray[Any, Any]:
        return engine.sample(**arguments)

    ours = run_engine().transpose(0, 2, 3, 1).clip(-1, 1) / 2 + 0.5
    difference = float(np.abs(ours - run_diffusers()).max())
    assert difference < TOLERANCE, "the images differ: no number for this case"

    seconds = take_turns({"diffusers": run_diffusers, "skipstep": run_engine}, rounds=ROUNDS[name, batch_size])
    loop = engine.loops[batch_size]
    timed = TimedDenoiser(loop.denoiser)
    loop.denoiser = timed
    shares = []
    for _ in range(5):
        timed.seconds, started = 0.0, time.perf_counter()
        run_engine()
        shares.append(1.0 - timed.seconds / (time.perf_counter() - started))

    benchmark.group = f"{name}, batch {batch_size}, {STEPS} steps"
    benchmark.extra_info.update(
        environment(),
        threads=torch.get_num_threads(),
        model=name,
        batch_size=batch_size,
        steps=STEPS,
        backend=engine.backend,
        loop=loop.name,
        plan_key=plan.key,
        build_seconds=round(build_seconds, 2),
        diffusers_median_seconds=statistics.median(seconds["diffusers"]),
        skipstep_median_seconds=statistics.median(seconds["skipstep"]),
        ratio_to_diffusers=median_ratio(seconds["diffusers"], seconds["skipstep"]),
        share_outside_network=statistics.median(shares),
        largest_pixel_difference=difference,
    )
    benchmark.pedantic(run_engine, rounds=3)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
