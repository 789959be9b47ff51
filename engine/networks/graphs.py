"""A network as ONNX graphs, split by binding time: what an export gives and what every compiled backend starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

# The name of the symbolic batch dimension in every graph.
BATCH: Final = "batch"


class Binding(IntFlag):
    """What a value depends on, and so when it becomes known: a value depends on all that its inputs depend on."""

    CONSTANT = 0
    PLAN = 1
    PROMPT = 2
    CALL = PLAN | PROMPT
    STEP = 4


@dataclass(frozen=True, slots=True)
class NetworkGraphs:
    """A network by binding time, each part a serialised ONNX model with the symbolic dimension "batch".

    `plan` computes from timesteps, `prompt` from the conditioning, `call` from both and from the values of `plan`;
    `step` predicts from the sample and the values of the other three. Values are matched by name. A part before the
    step is None where nothing is known at that time.
    """

    plan: bytes | None
    prompt: bytes | None
    call: bytes | None
    step: bytes

    @property
    def before_loop(self) -> dict[str, bytes]:
        """The parts that exist, without the step network."""
        parts = {"plan": self.plan, "prompt": self.prompt, "call": self.call}
        return {name: graph for name, graph in parts.items() if graph is not None}


@dataclass(frozen=True, slots=True)
class Partition:
    """The graphs by binding time, and what moved (skipstep.export.partition makes one).

    `crossing` names the values that later graphs read of each earlier one; `nodes` are those of each binding time.
    """

    graphs: NetworkGraphs
    crossing: Mapping[Binding, tuple[str, ...]]
    nodes: Mapping[Binding, tuple[str, ...]]
