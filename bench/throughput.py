"""Calls a second when several threads call one engine at once, and how long each of them waits for its samples."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from skipstep.latency.calibration import nearest_rank

CALLERS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Throughput:
    """`callers` threads, each of which called again as soon as it had its samples."""

    callers: int
    calls: int
    calls_per_second: float
    p50_seconds: float
    p99_seconds: float


def throughput(draw: Callable[[], object], *, callers: int, seconds: float) -> Throughput:
    """Call `draw` from so many threads for about so long; at least once each. What one raises is raised."""
    start = threading.Barrier(callers + 1)
    times: list[list[float]] = [[] for _ in range(callers)]
    errors: list[BaseException] = []
    deadline = [0.0]

    def call(mine: list[float]) -> None:
        start.wait()
        try:
            while not mine or time.perf_counter() < deadline[0]:
                begun = time.perf_counter()
                draw()
                mine.append(time.perf_counter() - begun)
        except BaseException as error:  # It belongs to who asked, not to this thread.
            errors.append(error)

    threads = [threading.Thread(target=call, args=(mine,)) for mine in times]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    deadline[0] = started + seconds
    start.wait()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    if errors:
        raise errors[0]
    every = [each for mine in times for each in mine]
    return Throughput(callers, len(every), len(every) / elapsed, nearest_rank(every, 50), nearest_rank(every, 99))


def throughput_as_json(
    draw: Callable[[], object], *, callers: Sequence[int] = CALLERS, seconds: float = 3.0
) -> list[dict[str, Any]]:
    draw()
    return [asdict(throughput(draw, callers=each, seconds=seconds)) for each in callers]
