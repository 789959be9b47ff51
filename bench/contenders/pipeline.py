"""diffusers' DDIMPipeline, eager and with torch.compile: what most people run."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from skipstep.bench.contenders import textbook
from skipstep.bench.contenders.time_box import time_box
from skipstep.bench.contenders.workload import Built, ContenderKind, Draw, Samples, Setup, Workload
from skipstep.bench.models import FixedLabelUNet, Subject


def build(subject: Subject, setup: Setup) -> Built:
    return Built(lambda workload: _prepare(workload, _pipeline(subject, setup), _unet(subject, setup)))


def build_compiled(subject: Subject, setup: Setup) -> Built:
    unet = _unet(subject, setup)
    pipeline = _pipeline(subject, setup)
    pipeline.unet = torch.compile(unet)
    failures: list[str] = []

    def prepare(workload: Workload) -> Draw:
        if failures:  # What did not compile in time once would take as long again.
            raise TimeoutError(f"{failures[0]}, at an earlier case")
        draw = _prepare(workload, pipeline, unet)
        # The first call of each shape compiles. Dynamo's own error would name neither the limit nor the remedy.
        try:
            with time_box(setup.compile_seconds, "compilation"):
                draw()
        except TimeoutError as error:
            failures.append(str(error))
            raise
        return draw

    return Built(prepare)


def _unet(subject: Subject, setup: Setup) -> Any:
    return textbook.on_device(subject.module, torch.device(setup.device), getattr(torch, setup.dtype))


def _pipeline(subject: Subject, setup: Setup) -> DDIMPipeline:
    scheduler = DDIMScheduler.from_pretrained(subject.path, subfolder="scheduler")
    pipeline = DDIMPipeline(_unet(subject, setup), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _prepare(workload: Workload, pipeline: DDIMPipeline, unet: Any) -> Draw:
    labels = None if workload.labels is None else torch.from_numpy(workload.labels).to(unet.device)

    def draw() -> Samples:
        if isinstance(unet, FixedLabelUNet) and labels is not None:
            unet.labels = labels
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
    if setup.device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler, and this machine has none"
    return lacks(subject, setup)


DIFFUSERS = ContenderKind("diffusers", backend="torch", loop="DDIMPipeline", build=build, lacks=lacks, pictures=True)
DIFFUSERS_COMPILE = ContenderKind(
    "diffusers-compile",
    backend="torch.compile",
    loop="DDIMPipeline",
    build=build_compiled,
    lacks=lacks_compiler,
    pictures=True,
)
