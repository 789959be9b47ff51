"""What every contender is given: one network, one plan, the same initial noise, labels and threads.

A contender is built once for a model, for all plans and batch sizes; then it is prepared for each case, and what comes
of that draws the samples of the case whenever it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skipstep.bench.models import Subject
from skipstep.plans.plan import Plan

Samples = NDArray[np.float32]
Draw = Callable[[], Samples]

# How far samples may be from the float32 reference's, relative to its largest value, by what the network computes in.
# Two float32 implementations differ by up to 1e-5 in a network's output, and the first step magnifies that by
# 1/sqrt(alpha_bar_T), 157 for the usual schedule: 2e-3. Half precision rounds each activation by 2^-11 or 2^-8; trained
# weights forgive that. Eight-bit integers have no more digits than bfloat16. Another plan is off by far more.
TOLERANCES: Mapping[str, float] = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 2e-1, "int8": 2e-1}


@dataclass(frozen=True)
class Setup:
    """What a contender is built for: the plans and batch sizes to come, and where and in what it computes.

    `compile_seconds` is how long a compiler may take before its contender is given up.
    """

    plans: tuple[Plan, ...]
    batch_sizes: tuple[int, ...]
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    compile_seconds: float = 120.0


@dataclass(frozen=True)
class Workload:
    """One case. `x_T` float32 `[B, C, H, W]` is what diffusers' pipeline draws from `generator`; `labels` int64 `[B]`
    and `prompts` float32 `[B, L, D]` where the network takes them."""

    subject: Subject
    plan: Plan
    batch_size: int
    seed: int = 0

    @property
    def steps(self) -> int:
        assert self.plan.steps is not None, "a plan knows its length"
        return self.plan.steps

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @cached_property
    def x_T(self) -> Samples:
        noise: Samples = torch.randn(self.batch_size, *self.subject.spec.sample_shape, generator=self.generator).numpy()
        return noise

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        classes = self.subject.spec.num_classes
        return None if classes is None else np.arange(self.batch_size) % classes

    @cached_property
    def prompts(self) -> Samples | None:
        shape = self.subject.spec.prompt_shape
        if shape is None:
            return None
        return np.random.default_rng(self.seed).standard_normal((self.batch_size, *shape), dtype=np.float32)

    def conditioning(self) -> dict[str, NDArray[Any]]:
        """What the network takes after sample and timestep, by the names in its graph, in the arguments' order."""
        given = {"encoder_hidden_states": self.prompts, "class_labels": self.labels}
        return {name: array for name, array in given.items() if array is not None}


@dataclass(frozen=True, slots=True)
class Built:
    """A contender with its network in hand. `prepare` makes it ready for a case; `nodes` and `weight_bytes` are what
    one step evaluates and reads, where its graph is there to be counted; `network_alone` runs the network alone."""

    prepare: Callable[[Workload], Draw]
    nodes: int | None = None
    weight_bytes: int | None = None
    network_alone: Callable[[Workload], Callable[[], object]] | None = None


def never_lacks(subject: Subject, setup: Setup) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class ContenderKind:
    """A way to draw samples. `lacks` says what this machine or model has not of what it needs, None if all is there.

    `pictures`: it returns pixels, so samples are compared within [-1, 1]. `precision` is what it computes in where
    that is not the run's; `tolerance` bounds its error where that is not the precision's.
    """

    name: str
    backend: str
    loop: str
    build: Callable[[Subject, Setup], Built]
    lacks: Callable[[Subject, Setup], str | None] = never_lacks
    pictures: bool = False
    precision: str | None = None
    tolerance: float | None = None

    def tolerance_for(self, setup: Setup) -> float:
        return self.tolerance or TOLERANCES[self.precision or setup.dtype]
