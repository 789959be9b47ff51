"""diffusers, eager and with torch.compile: what most people run.

On the CPU it is DDIMPipeline. On a GPU it is diffusers' DDIMScheduler around the network, with the state in the
network's dtype as in the pipeline, and with timesteps as numbers: the pipeline would copy each one to the device.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

from skipstep.bench.contenders import textbook
from skipstep.bench.contenders.time_box import time_box
from skipstep.bench.contenders.workload import BuiltContender, Contender, Draw, Samples, Setup, Workload
from skipstep.bench.models import FixedLabelUNet, Subject

# The network's output for x_t and a timestep.
Predict = Callable[[Tensor, int], Tensor]
_NETWORK_CALLS = 30


def build(subject: Subject, setup: Setup) -> BuiltContender:
    if setup.on_gpu:
        return _scheduled(subject, setup, lambda unet, workload: _predictor(unet, setup, workload))
    unet = _unet(subject, setup)
    return BuiltContender(lambda workload: _piped(workload, _pipeline(subject, unet), unet))


def build_compiled(subject: Subject, setup: Setup) -> BuiltContender:
    unet = _unet(subject, setup)
    pipeline = _pipeline(subject, unet)
    pipeline.unet = torch.compile(unet)
    return time_boxed(lambda workload: _piped(workload, pipeline, unet), setup)


def build_mode(mode: str) -> Callable[[Subject, Setup], BuiltContender]:
    """On a GPU, compiled in that mode of torch.compile."""

    def build(subject: Subject, setup: Setup) -> BuiltContender:
        def predict(unet: Any, workload: Workload) -> Predict:
            # The compiler is torch's to test: a dry run does without.
            compiled = unet if setup.simulated else torch.compile(unet, mode=mode, dynamic=False)

            def call(*arguments: Tensor) -> Any:
                # Its graphs reuse the memory of what an earlier call returned, once they may.
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                return compiled(*arguments)

            return _predictor(call, setup, workload)

        built = _scheduled(subject, setup, predict)
        return time_boxed(built.prepare, setup)

    return build


def build_replayed(subject: Subject, setup: Setup) -> BuiltContender:
    """The network as one graph, replayed at every step by a scheduler in Python."""
    replays: dict[int, Callable[[], None]] = {}

    def predict(unet: Any, workload: Workload) -> Predict:
        dtype = getattr(torch, setup.dtype)
        x_t = torch.zeros(workload.x_T.shape, device=setup.torch_device, dtype=dtype)
        timestep = torch.zeros(workload.batch_size, device=setup.torch_device, dtype=torch.int64)
        output = torch.zeros_like(x_t)

        @torch.inference_mode()
        def evaluate() -> None:
            output.copy_(unet(x_t, timestep).sample)

        replay = replays[workload.batch_size] = setup.accelerator.graph(evaluate)

        def replayed(x: Tensor, t: int) -> Tensor:
            x_t.copy_(x)
            timestep.fill_(t)
            replay()
            return output

        return replayed

    def facts(workload: Workload) -> dict[str, Any]:
        """Seconds of the network alone."""
        replay, seconds = replays[workload.batch_size], setup.accelerator.seconds
        seconds(replay)
        return {"network_seconds": statistics.median(seconds(replay) for _ in range(_NETWORK_CALLS))}

    return BuiltContender(_scheduled(subject, setup, predict).prepare, facts)


def _scheduled(subject: Subject, setup: Setup, predict_for: Callable[[Any, Workload], Predict]) -> BuiltContender:
    unet, dtype = _unet(subject, setup), getattr(torch, setup.dtype)

    def prepare(workload: Workload) -> Draw:
        scheduler = DDIMScheduler.from_pretrained(subject.path, subfolder="scheduler")
        x_T = torch.from_numpy(workload.x_T).to(setup.torch_device)
        _label(unet, workload, setup)
        predict = predict_for(unet, workload)

        @torch.inference_mode()
        def draw() -> Tensor:
            scheduler.set_timesteps(workload.steps)
            x = x_T.to(dtype)
            for t in scheduler.timesteps.tolist():
                x = scheduler.step(predict(x, t), t, x).prev_sample
            return x.float()

        return draw

    return BuiltContender(prepare)


def _predictor(network: Any, setup: Setup, workload: Workload) -> Predict:
    timestep = torch.zeros(workload.batch_size, device=setup.torch_device, dtype=torch.int64)

    def predict(x: Tensor, t: int) -> Tensor:
        timestep.fill_(t)
        predicted: Tensor = network(x, timestep).sample
        return predicted

    return predict


def time_boxed(prepare: Callable[[Workload], Draw], setup: Setup) -> BuiltContender:
    failures: list[str] = []

    def boxed(workload: Workload) -> Draw:
        if failures:  # What did not compile in time once would take as long again.
            raise TimeoutError(f"{failures[0]}, at an earlier case")
        draw = prepare(workload)
        # The first call of each shape compiles. Dynamo's own error would name neither the limit nor the remedy.
        try:
            with time_box(setup.compile_seconds, "compilation"):
                draw()
        except TimeoutError as error:
            failures.append(str(error))
            raise
        return draw

    return BuiltContender(boxed)


def _unet(subject: Subject, setup: Setup) -> Any:
    return textbook.on_device(subject.module, setup)


def _label(unet: Any, workload: Workload, setup: Setup) -> None:
    if isinstance(unet, FixedLabelUNet) and workload.labels is not None:
        unet.labels = torch.from_numpy(workload.labels).to(setup.torch_device)


def _pipeline(subject: Subject, unet: Any) -> DDIMPipeline:
    scheduler = DDIMScheduler.from_pretrained(subject.path, subfolder="scheduler")
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _piped(workload: Workload, pipeline: DDIMPipeline, unet: Any) -> Draw:
    setup = Setup((), ())

    def draw() -> Samples:
        _label(unet, workload, setup)
        images = pipeline(
            workload.batch_size,
            generator=workload.generator,
            num_inference_steps=workload.steps,
            output_type="np",
        ).images
        return np.asarray(2.0 * images - 1.0, np.float32).transpose(0, 3, 1, 2)

    return draw


def lacks(subject: Subject, setup: Setup) -> str | None:
    if subject.spec.prompt_shape is not None:
        return "DDIMPipeline takes no prompts"
    return textbook.lacks(subject, setup)


def lacks_compiler(subject: Subject, setup: Setup) -> str | None:
    if setup.on_gpu:
        return "measured on a CPU; on a GPU there are its modes reduce-overhead and max-autotune"
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler, and this machine has none"
    return lacks(subject, setup)


def lacks_gpu(subject: Subject, setup: Setup) -> str | None:
    return lacks(subject, setup) if setup.on_gpu else f"runs on a GPU; this run measures {setup.device}"


PIPELINES = (
    Contender("diffusers", build, lacks, pictures=True, half_state=True),
    Contender("diffusers-compile", build_compiled, lacks_compiler, pictures=True),
    Contender("network-graph", build_replayed, lacks_gpu, half_state=True),
    Contender("diffusers-reduce-overhead", build_mode("reduce-overhead"), lacks_gpu, half_state=True),
    Contender("diffusers-max-autotune", build_mode("max-autotune"), lacks_gpu, half_state=True),
)
