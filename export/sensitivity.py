"""Which layers of a step network go to 8 bits, so that the samples stay within a bound: found by measurement.

Each layer's error is measured alone, at the end of a whole trajectory. Such errors are nearly independent: those of
several layers add up in square. So layers are taken in the order of squared error for the operations that they save,
up to where the sum meets the bound; the result is measured with every plan, and layers are given back until the bound
holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import ExportError
from skipstep.export.graph_cost import at_batch_one, node_flops, shapes_and_sizes
from skipstep.export.graph_writer import load_graph

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PixelError:
    """Against float32: the largest difference, and the root mean square.

    Of samples in [-1, 1]; of samples beyond that, such as latents, in parts of the largest.
    """

    largest: float
    rms: float

    @classmethod
    def between(cls, found: Array, exact: Array) -> PixelError:
        difference = np.abs(found - exact) / max(1.0, float(np.abs(exact).max()))
        return cls(float(difference.max()), float(np.sqrt(np.mean(difference**2))))

    def within(self, other: PixelError) -> bool:
        return self.largest <= other.largest and self.rms <= other.rms


# What 8 bits may change in any sample.
BOUND: Final = PixelError(0.1, 0.01)
# The search's own: the largest error of many samples is two to four times that of the few that it draws
# (bench/results/findings/tensorrt-precisions.json), and the root mean square about the same.
_SEARCHED: Final = PixelError(BOUND.largest / 2, BOUND.rms / 2)
_GIVEN_BACK: Final = 0.85


@dataclass(frozen=True, slots=True)
class Choice:
    """The `layers` that go to 8 bits, of how many, their share of the network's operations, and the error by plan."""

    layers: tuple[str, ...]
    candidates: int
    share: float
    errors: Mapping[str, PixelError]

    def facts(self) -> dict[str, Any]:
        """As a bundle's manifest states them."""
        largest = max((each.largest for each in self.errors.values()), default=0.0)
        return {**asdict(self), "layers": len(self.layers), "bound": asdict(BOUND), "largest": largest}


def choose_layers(
    step: bytes,
    candidates: Sequence[str],
    quantized: Callable[[Sequence[str]], bytes],
    draw: Callable[[bytes, str], Array],
    plans: Sequence[str],
    *,
    report: Callable[[str], object] = lambda message: None,
) -> Choice:
    """The layers among `candidates` with which every plan's samples stay within the bound.

    `quantized(layers)` is the step network with these in 8 bits, `draw(step, plan)` samples of a plan with a step
    network; layers are measured alone with the first plan. Raises ExportError where no layer can go.
    """
    exact = {plan: draw(step, plan) for plan in plans}

    def measured(layers: Sequence[str], plan: str) -> PixelError:
        return PixelError.between(draw(quantized(layers), plan), exact[plan])

    flops, squares = operations(step), {}
    for number, name in enumerate(candidates, 1):
        squares[name] = measured([name], plans[0]).rms ** 2
        report(f"measure layer {number} of {len(candidates)}")
    chosen, left = [], _SEARCHED.rms**2
    for name in sorted(candidates, key=lambda name: squares[name] / max(flops[name], 1)):
        if squares[name] <= left:
            chosen.append(name)
            left -= squares[name]
    while chosen:
        errors: dict[str, PixelError] = {}
        for plan in plans:
            errors[plan] = measured(chosen, plan)
            if not errors[plan].within(_SEARCHED):
                break
        else:
            share = sum(flops[name] for name in chosen) / max(sum(flops.values()), 1)
            return Choice(tuple(chosen), len(candidates), share, errors)
        report(f"{len(chosen)} layers in 8 bits are too many")
        del chosen[min(len(chosen) - 1, math.floor(len(chosen) * _GIVEN_BACK)) :]
    raise ExportError(
        got=f"a network in which each of {len(candidates)} layers in 8 bits changes the samples too much",
        expected=f"at most {BOUND.largest:g} at any place, and {BOUND.rms:g} as root mean square",
        remedy="use float16 or bfloat16 on a GPU, bfloat16 with backend='openvino', or float32",
    )


def operations(step: bytes) -> dict[str, int]:
    graph = at_batch_one(load_graph(step)).graph
    shapes, _ = shapes_and_sizes(graph)
    return {node.name: node_flops(node, shapes) for node in graph.node}
