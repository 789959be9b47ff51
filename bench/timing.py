"""Side-by-side timing: contenders take turns, and ratios are formed within a turn, so a slow spell hits them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

REST_SECONDS = 0.1


def take_turns(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each call, by contender: one warm-up each, then `rounds` turns in alternating order.

    Before each turn all rest, until the threads that the last contender left waiting for more work are asleep: of two
    libraries in one process, the idle one would otherwise take a core from the other.
    """
    if warm_up:
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        order = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in order:
            time.sleep(REST_SECONDS)
            started = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median of the ratios of each turn."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))
