"""One benchmark for each contender of each case, grouped by case, in pytest-benchmark's own table and JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from skipstep.bench.measure import Bench
from skipstep.bench.record import environment
from skipstep.latency.calibration import nearest_rank


# Compilation has a limit of its own, and a case a budget.
@pytest.mark.timeout(0)
def test_sampling(case_key: tuple[str, int, int], contender: str, bench: Bench, benchmark: Any) -> None:
    case = bench.case(*case_key)
    found = case.contender(contender)
    assert found is not None, "every contender of a case is in its result"
    if found.status in ("absent", "skipped"):
        pytest.skip(f"{found.status}: {found.reason}")
    assert found.status == "ok", f"{found.status}: {found.reason}"
    benchmark.group = case.name
    benchmark.extra_info.update(
        environment(),
        model=case.model,
        steps=case.steps,
        batch_size=case.batch_size,
        dtype=case.dtype,
        plan_key=case.plan,
        contender=contender,
        backend=found.backend,
        loop=found.loop,
        threads=bench.options.threads,
        nodes_per_step=found.nodes_per_step,
        bytes_per_step=found.bytes_per_step,
        ratio_to_textbook=found.ratio,
        error=found.error,
        tolerance=found.tolerance,
        build_seconds=found.build_seconds,
        warmup_seconds=found.warmup_seconds,
        outside_network=case.outside_network,
        **{f"p{percent}_seconds": nearest_rank(found.seconds, percent) for percent in (50, 90, 99)},
    )
    record(benchmark, found.seconds)


def record(benchmark: Any, seconds: Iterable[float]) -> None:
    """Give pytest-benchmark times that were measured elsewhere: its public calls would measure them anew, one contender
    after the other, and ratios of different minutes mean little."""
    if benchmark.disabled:
        return
    benchmark._mode = "recorded"
    stats = benchmark._make_stats(iterations=1)
    for each in seconds:
        stats.update(each)
