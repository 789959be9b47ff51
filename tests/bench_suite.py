"""What tests of benchmarks share: a small model with a scheduler, and contenders that misbehave on request."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_networks import tiny_unet

from skipstep.bench.contenders import textbook
from skipstep.bench.contenders.workload import BuiltContender, Contender, Draw, Setup, Workload
from skipstep.bench.models import Subject


def save_model(folder: Path, *, classes: int | None = None, **scheduler: Any) -> Path:
    from diffusers import DDIMScheduler

    tiny_unet(num_class_embeds=classes).save_pretrained(folder / "unet")
    DDIMScheduler(**{"timestep_spacing": "trailing", **scheduler}).save_pretrained(folder / "scheduler")
    return folder


def nap_contender(
    name: str,
    *,
    seconds: float = 0.0,
    change: Callable[[Any], Any] = lambda x: x,
    fails_at: int | None = None,
    build_error: Exception | None = None,
    reason: str | None = None,
) -> Contender:
    """The textbook loop under another name, which rests `seconds` and changes the samples; its call number `fails_at`
    raises."""
    calls = [0]

    def build(subject: Subject, setup: Setup) -> BuiltContender:
        if build_error is not None:
            raise build_error
        built = textbook.build(subject, setup)

        def prepare(workload: Workload) -> Draw:
            draw = built.prepare(workload)

            def slower() -> Any:
                calls[0] += 1
                if calls[0] == fails_at:
                    raise RuntimeError("tired")
                time.sleep(seconds)
                return change(draw())

            return slower

        return BuiltContender(prepare)

    return Contender(name, build, lambda *_: reason)
