"""A network as graphs by binding time, and the step inputs of its loop.

    plan     values that follow from the timestep alone           once per plan, into tables
    prompt   values that follow from the conditioning alone       once per call, for each prompt or label
    call     values that follow from conditioning and timestep    once per call, for all stages in one batch
    step     values that follow from the state                    at every stage

The export makes the graphs (skipstep.export.partition), a bundle holds them, and every backend runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Values = dict[str, NDArray[np.generic]]

# The symbolic leading dimension of every graph, and what the step graph calls the state and its prediction.
BATCH: Final = "batch"
SAMPLE: Final = "sample"
PREDICTION: Final = "out_sample"
# How inputs end that hold the factors of a LoRA, the same for all samples (skipstep.networks.lora_layers).
LORA_INPUTS: Final = ("lora_down", "lora_up")


class Binding(IntFlag):
    """What a value follows from, and so when it becomes known: a value follows from all that its inputs follow from."""

    CONSTANT = 0
    PLAN = 1
    PROMPT = 2
    CALL = PLAN | PROMPT
    STEP = 4

    @property
    def time(self) -> Binding:
        """When it becomes known: what follows from the state among others, at each evaluation."""
        return Binding.STEP if self & Binding.STEP else self

    def crosses(self, later: Binding) -> bool:
        """Whether a value of this binding time is an input of the other's graph."""
        earlier, later = self.time, later.time
        return earlier not in (Binding.CONSTANT, later) and (later == Binding.STEP or earlier == Binding.PLAN)


@dataclass(frozen=True, slots=True)
class NetworkGraphs:
    """A network by binding time, each part a serialised ONNX model with the symbolic dimension "batch".

    `plan` computes from timesteps, `prompt` from the conditioning, `call` from both, with the values of `plan`; `step`
    predicts from the sample and from what the three computed. Values go by name. All but the last are None where
    nothing is known so early.
    """

    plan: bytes | None
    prompt: bytes | None
    call: bytes | None
    step: bytes

    @property
    def before_loop(self) -> dict[str, bytes]:
        """The parts that run before the loop, those that exist."""
        parts = {"plan": self.plan, "prompt": self.prompt, "call": self.call}
        return {name: graph for name, graph in parts.items() if graph is not None}


@dataclass(frozen=True, slots=True)
class Partition:
    """The graphs by binding time, and what moved.

    `crossing` names the values that later graphs read of each earlier one; `nodes` are those of each binding time.
    """

    graphs: NetworkGraphs
    crossing: Mapping[Binding, tuple[str, ...]]
    nodes: Mapping[Binding, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The step inputs of E stages of N samples: values `[rows, …]` by name, and which row belongs to which sample.

    `plan` and `call` are indexed by stage and sample, int64 `[E, N]`; `prompt` by the sample alone, `[N]`. Equal rows
    are stored once, however many stages and samples read them.
    """

    plan: Values
    call: Values
    prompt: Values
    plan_index: NDArray[np.int64]
    call_index: NDArray[np.int64]
    prompt_index: NDArray[np.int64]

    def per_stage(self, name: str) -> bool:
        """Whether every stage has its own value. Raises KeyError for a name that has none."""
        if name in self.plan or name in self.call:
            return True
        self.prompt[name]
        return False

    def row(self, name: str, stage: int) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
        """The values of that name, and the rows `[N]` of one stage."""
        if name in self.plan:
            return self.plan[name], self.plan_index[stage]
        if name in self.call:
            return self.call[name], self.call_index[stage]
        return self.prompt[name], self.prompt_index

    def expanded(self, name: str) -> NDArray[np.generic]:
        """A row for each stage and sample `[E, N, …]`, or for each sample `[N, …]` where stages share it."""
        if name in self.plan:
            return self.plan[name][self.plan_index]
        if name in self.call:
            return self.call[name][self.call_index]
        return self.prompt[name][self.prompt_index]


class Rows(Protocol):
    """Step inputs as a denoiser in host memory reads them: StepInputs, and what stands for several of them."""

    def row(self, name: str, stage: int) -> tuple[NDArray[np.generic], NDArray[np.int64]]: ...


def fill_buffers(buffers: Mapping[str, NDArray[Any]], values: Rows, stage: int) -> None:
    """Write the rows of one stage into buffers `[N, …]`, by the names of the values."""
    for name, buffer in buffers.items():
        table, rows = values.row(name, stage)
        # "clip" because "raise" would copy; the indices are our own.
        table.take(rows, axis=0, out=buffer, mode="clip")
