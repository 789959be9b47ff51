"""The benchmark: one test for each model, batch size, step count and contender, timed by pytest-benchmark.

A contender is checked before it is timed: its samples must be those of the textbook loop. Before every timed round the
textbook loop is run and timed as well, so each round has a ratio that survives a machine whose speed wanders.
"""

from __future__ import annotations

from typing import Any

import pytest

from skipstep.bench.options import CaseKey
from skipstep.bench.session import Absent, BenchSession


# Compilation has a limit of its own, and a case has a budget.
@pytest.mark.timeout(0)
def test_sampling(case: CaseKey, contender: str, bench_session: BenchSession, benchmark: Any) -> None:
    if bench_session.is_kept(case, contender):
        pytest.skip("measured before")
    try:
        with bench_session.checked(case, contender) as checked:
            benchmark.group = case.group
            benchmark.pedantic(checked.draw, setup=checked.before_round, rounds=checked.rounds, iterations=1)
            benchmark.extra_info.update(checked.facts([] if benchmark.disabled else benchmark.stats.stats.data))
    except Absent as absent:
        bench_session.record(case, contender, absent)
        if absent.failed:
            pytest.fail(f"{absent.status}: {absent.reason}", pytrace=False)
        pytest.skip(f"{absent.status}: {absent.reason}")
