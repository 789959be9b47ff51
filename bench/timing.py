"""Side-by-side timing: contenders take turns, and ratios are formed within a turn, so a slow spell hits them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.backends import Denoiser
from skipstep.conditioning import Conditioning


def take_turns(contenders: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by contender: one warm-up each, then `rounds` turns in alternating order."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        order = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in order:
            started = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the ratios of each turn."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


class TimedDenoiser:
    """A denoiser that adds up the time spent inside the network."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self.batch_size = denoiser.batch_size
        self.input: Any = denoiser.input
        self.output: Any = denoiser.output
        self.seconds = 0.0

    def prepare(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> None:
        self._denoiser.prepare(timesteps, conditioning)

    def enqueue(self, stage: int) -> None:
        started = time.perf_counter()
        self._denoiser.enqueue(stage)
        self.seconds += time.perf_counter() - started
