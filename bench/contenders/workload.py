"""The protocol of contenders: build(subject, setup) → prepare(workload) → call.

All get one network, one plan, the same initial noise, labels and threads. A contender is built once for a model, for
all plans and batch sizes; it is prepared for each case; each call then draws the samples of that case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skipstep.bench.gpu.device import BenchDevice, bench_device
from skipstep.bench.models import Subject
from skipstep.plans.plan import Plan

Samples = NDArray[np.float32]
# Samples [B, C, H, W], a NumPy array or a tensor; on a GPU the work may still be under way.
Draw = Callable[[], Any]

# How far samples may be from the float32 reference's, relative to its largest value, by what the network computes in.
# Two float32 implementations differ by up to 1e-5 in a network's output, and the first step magnifies that by
# 1/sqrt(alpha_bar_T), 157 for the usual schedule: 2e-3. Half precision rounds each activation by 2^-11 or 2^-8; a state
# in half precision rounds at every step besides: on a CPU the CIFAR-10 architecture is off by 0.06 then. A wrong loop
# is off by about 1.
_TOLERANCES: Mapping[str, float] = {"float32": 2e-3, "float16": 1e-1, "bfloat16": 2e-1}


@dataclass(frozen=True)
class Setup:
    """What a contender is built for: the plans and batch sizes to come, the device, and the network's dtype.

    `compile_seconds` is how long a compiler may take before its contender is given up. `simulated`: a dry run of the
    GPU gate, in which the CPU stands for a GPU.
    """

    plans: tuple[Plan, ...]
    batch_sizes: tuple[int, ...]
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    compile_seconds: float = 120.0
    simulated: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.simulated or self.device.startswith("cuda")

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def accelerator(self) -> BenchDevice:
        return bench_device(simulated=not self.device.startswith("cuda"))


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
class BuiltContender:
    """A contender with its network. `prepare` makes it ready for a case, `facts` adds to the case's result, `close`
    frees it."""

    prepare: Callable[[Workload], Draw]
    facts: Callable[[Workload], dict[str, Any]] = lambda workload: {}
    close: Callable[[], None] = lambda: None


def lacks_nothing(subject: Subject, setup: Setup) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to draw samples, on every device that it supports.

    `build` makes it for a model. `lacks` says what this machine or model lacks of what it needs, None if nothing.
    `pictures`: it returns pixels, so samples are compared within [-1, 1]. `draws`: False for a network that is run
    without a sampler, whose output is not checked. `half_state`: it keeps x_t in the network's dtype. `precision`: the
    network's, where it is not the run's. `ours`: an engine of skipstep. `from_bundle`: deployed as a bundle, which
    `backend` runs. `needs_export`: deployed as an exported file.
    """

    name: str
    build: Callable[[Subject, Setup], BuiltContender]
    lacks: Callable[[Subject, Setup], str | None] = lacks_nothing
    pictures: bool = False
    draws: bool = True
    half_state: bool = False
    ours: bool = False
    from_bundle: bool = False
    needs_export: bool = False
    precision: str | None = None
    backend: str = "auto"

    def tolerance_for(self, setup: Setup) -> float:
        return _TOLERANCES[self.precision or setup.dtype] * (2 if self.half_state and setup.dtype != "float32" else 1)


def to_numpy(samples: Any) -> Samples:
    drawn: Samples = samples.float().cpu().numpy() if isinstance(samples, torch.Tensor) else samples
    return drawn
