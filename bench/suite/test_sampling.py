"""`engine.sample` beside diffusers' DDIMPipeline in eager float32: same weights, noise, steps and threads.

All contenders of a case take turns in one process, after all have drawn the same images to TOLERANCE:

    diffusers   DDIMPipeline
    torch       our engine with the module itself, stepwise
    stepwise    our engine with ONNX Runtime, one session run a step
    onnx        our engine with ONNX Runtime, the whole loop as one graph: what it does by default
    network     ten runs of the step network alone, on the same inputs every time: no loop at all

The recorded `stats` are those of the default engine; `extra_info` carries the medians, the ratios taken turn by turn,
and the share of the default engine's time that the network alone does not account for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline

from skipstep import Engine, Plan
from skipstep.backends.onnxruntime import make_session
from skipstep.bench.models import MODELS, BenchModel
from skipstep.bench.record import environment
from skipstep.bench.timing import median_ratio, take_turns
from skipstep.scheduler_config import read_scheduler_config

STEPS = 10
# Two float32 implementations of the same network over ten steps, largest difference of pixels in [0, 1].
TOLERANCE = 1e-3
ROUNDS = {
    ("fashion-mnist", 1): 31,
    ("fashion-mnist", 16): 9,
    ("cifar10-architecture", 1): 9,
    ("cifar10-architecture", 16): 3,
}


@cache
def model_named(name: str) -> BenchModel:
    return MODELS[name]()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_sampling(name: str, batch_size: int, benchmark: Any) -> None:
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
    arguments: dict[str, Any] = {"plan": plan, "x_T": x_T, "output_type": "np"}
    if labels is not None:
        arguments["class_labels"] = labels.tolist()
    engines: dict[str, Engine] = {}
    build_seconds = {}
    for contender, options in {
        "torch": {"backend": "torch"},
        "stepwise": {"backend": "onnxruntime", "loop": "stepwise"},
        "onnx": {"backend": "onnxruntime"},
    }.items():
        started = time.perf_counter()
        engines[contender] = Engine.build(
            model.unet,
            plans=[plan],
            batch_sizes=[batch_size],
            device="cpu",
            num_threads=torch.get_num_threads(),
            **options,  # type: ignore[arg-type]
        )
        build_seconds[contender] = round(time.perf_counter() - started, 2)

    def sampling(engine: Engine) -> Callable[[], np.ndarray[Any, Any]]:
        return lambda: engine.sample(**arguments)

    expected = run_diffusers()
    difference = {}
    for contender, engine in engines.items():
        ours = sampling(engine)().transpose(0, 2, 3, 1).clip(-1, 1) / 2 + 0.5
        difference[contender] = float(np.abs(ours - expected).max())
        assert difference[contender] < TOLERANCE, f"{contender}'s images differ: no number for this case"

    seconds = take_turns(
        {
            "diffusers": run_diffusers,
            **{contender: sampling(engine) for contender, engine in engines.items()},
            "network": network_alone(engines["onnx"], batch_size),
        },
        rounds=ROUNDS[name, batch_size],
    )
    benchmark.group = f"{name}, batch {batch_size}, {STEPS} steps"
    benchmark.extra_info.update(
        environment(),
        threads=torch.get_num_threads(),
        model=name,
        batch_size=batch_size,
        steps=STEPS,
        plan_key=plan.key,
        build_seconds=build_seconds,
        median_seconds={contender: statistics.median(times) for contender, times in seconds.items()},
        ratio_to_diffusers={
            contender: median_ratio(seconds["diffusers"], times)
            for contender, times in seconds.items()
            if contender in engines
        },
        share_outside_network=1.0 - median_ratio(seconds["network"], seconds["onnx"]),
        largest_pixel_difference=difference,
    )
    benchmark.pedantic(sampling(engines["onnx"]), rounds=3)


def network_alone(engine: Engine, batch_size: int) -> Callable[[], None]:
    """The step network as often as a loop runs it, with nothing in between."""
    assert engine._built is not None, "it was built here"
    session = make_session(engine._built.parts().graphs.step, num_threads=torch.get_num_threads())
    rng = np.random.default_rng(0)
    binding = session.io_binding()
    arrays = [
        rng.standard_normal([batch_size if isinstance(d, str) else d for d in each.shape], dtype=np.float32)
        for each in session.get_inputs()
    ]
    for each, array in zip(session.get_inputs(), arrays, strict=True):
        binding.bind_input(each.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    output = np.empty((batch_size, *engine.network.output_shape), np.float32)
    binding.bind_output("out_sample", "cpu", 0, np.float32, output.shape, output.ctypes.data)

    def run() -> None:
        for _ in range(STEPS):
            session.run_with_iobinding(binding)

    run.buffers = arrays, output  # type: ignore[attr-defined]  # The binding does not keep them alive.
    return run


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
