"""Which layers of a step network go to 8 bits, so that the samples stay within a bound: found by measurement.

Each layer's error is measured alone, at the end of a whole trajectory. Such errors are nearly independent: those of
several layers add up in square. So layers are taken in the order of squared error for the operations that they save,
up to where the sum meets the bound. Then every plan draws samples that no choice has seen, in rounds; layers are given
back, and the rest is tried on other new samples, until the bound holds.
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

    Of samples in [-1, 1], which some go a little beyond; of those beyond 2, such as latents, in parts of half the
    largest.
    """

    largest: float
    rms: float

    @classmethod
    def between(cls, found: Array, exact: Array) -> PixelError:
        difference = np.abs(found - exact) / max(1.0, float(np.abs(exact).max()) / 2)
        return cls(float(difference.max()), float(np.sqrt(np.mean(difference**2))))

    def within(self, other: PixelError) -> bool:
        return self.largest <= other.largest and self.rms <= other.rms


# What 8 bits may change in any sample, and what the samples may use up of it that decide: by the tail of the shipped
# network's errors about one time in ten the largest of as many other samples is more than twice theirs.
BOUND: Final = PixelError(0.1, 0.01)
_HELD: Final = PixelError(BOUND.largest / 2, BOUND.rms / 2)
# With what the first choice starts: the largest error is some thirty times the root mean square.
_START: Final = _HELD.largest / 30
_GIVEN_BACK: Final = 0.8
# Of new samples, each as many as those that calibrate.
ROUNDS: Final = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """The `layers` that go to 8 bits, of how many, their share of the network's operations, and by plan the error of
    `samples` that no choice has seen. `tried`: the choices before, each until it was beyond the bound."""

    layers: tuple[str, ...]
    candidates: int
    share: float
    errors: Mapping[str, PixelError]
    samples: int
    tried: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """As a bundle's manifest states them."""
        largest = max((each.largest for each in self.errors.values()), default=0.0)
        return {**asdict(self), "layers": len(self.layers), "bound": asdict(BOUND), "largest": largest}


def choose_layers(
    step: bytes,
    candidates: Sequence[str],
    quantized: Callable[[Sequence[str]], bytes],
    draw: Callable[[bytes, str, int], Array],
    plans: Sequence[str],
    *,
    report: Callable[[str], object] = lambda message: None,
) -> Choice:
    """The layers among `candidates` with which every plan's samples stay within the bound.

    `quantized(layers)` is the step network with these in 8 bits; `draw(step, plan, number)` samples of a plan with a
    step network, others for each number: 0 are those that calibrate, with which layers are measured alone in the first
    plan. Raises ExportError, which says what was tried, where no layer can go.
    """
    flops, squares = operations(step), {}
    exact = draw(step, plans[0], 0)
    for number, name in enumerate(candidates, 1):
        squares[name] = PixelError.between(draw(quantized([name]), plans[0], 0), exact).rms ** 2
        report(f"measure layer {number} of {len(candidates)}")
    ordered = sorted(candidates, key=lambda name: squares[name] / max(flops[name], 1))
    chosen, left = ordered[:1], _START**2 - sum(squares[name] for name in ordered[:1])
    for name in ordered[1:]:
        if squares[name] <= left:
            chosen.append(name)
            left -= squares[name]
    tried: list[str] = []
    while chosen:
        first = 1 + ROUNDS * len(tried)
        errors = _errors(step, quantized(chosen), draw, plans, range(first, first + ROUNDS))
        share = sum(flops[name] for name in chosen) / max(sum(flops.values()), 1)
        if all(each.within(_HELD) for each in errors.values()):
            return Choice(tuple(chosen), len(candidates), share, errors, ROUNDS * len(exact), tuple(tried))
        *_, worst = errors.values()
        tried.append(f"{len(chosen)} layers, {share:.0%} of the operations: {worst.largest:.2g} and {worst.rms:.2g}")
        report(f"too much in 8 bits: {tried[-1]}")
        del chosen[min(len(chosen) - 1, math.floor(len(chosen) * _GIVEN_BACK)) :]
    raise ExportError(
        got=f"no choice among {len(candidates)} layers for 8 bits that keeps the samples; off by at least, and as root "
        f"mean square, with {'; '.join(tried)}",
        expected=f"at most {_HELD.largest:.2g} at any place of {ROUNDS * len(exact)} new samples of each plan, and "
        f"{_HELD.rms:.2g} as root mean square",
        remedy="use float16 or bfloat16 on a GPU, bfloat16 with backend='openvino', or float32",
    )


def _errors(
    step: bytes, graph: bytes, draw: Callable[[bytes, str, int], Array], plans: Sequence[str], numbers: Sequence[int]
) -> dict[str, PixelError]:
    """By plan, of all its samples, up to where one is beyond what may be used up."""
    errors: dict[str, PixelError] = {}
    for plan in plans:
        found: list[Array] = []
        exact: list[Array] = []
        for number in numbers:
            found.append(draw(graph, plan, number))
            exact.append(draw(step, plan, number))
            errors[plan] = PixelError.between(np.concatenate(found), np.concatenate(exact))
            if not errors[plan].within(_HELD):
                return errors
    return errors


def operations(step: bytes) -> dict[str, int]:
    graph = at_batch_one(load_graph(step)).graph
    shapes, _ = shapes_and_sizes(graph)
    return {node.name: node_flops(node, shapes) for node in graph.node}
