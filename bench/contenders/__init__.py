"""Contenders of the CPU and the GPU: the textbook loop, what people run today, and skipstep. Names do not change."""

from __future__ import annotations

from collections.abc import Sequence

from skipstep.bench.contenders.ahead_of_time import AHEAD_OF_TIME
from skipstep.bench.contenders.engines import ENGINES
from skipstep.bench.contenders.pipeline import PIPELINES
from skipstep.bench.contenders.runtimes import RUNTIMES
from skipstep.bench.contenders.textbook import TEXTBOOK
from skipstep.bench.contenders.workload import Contender
from skipstep.errors import InputError

# The contender that all ratios refer to.
REFERENCE = TEXTBOOK.name
CONTENDERS: dict[str, Contender] = {
    each.name: each for each in (TEXTBOOK, *ENGINES, *PIPELINES, *AHEAD_OF_TIME, *RUNTIMES)
}


def contenders_named(names: Sequence[str]) -> tuple[Contender, ...]:
    """Those contenders, or all, each once. Raises InputError, which lists them all."""
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise InputError(
            got=f"contenders {', '.join(unknown)}",
            expected=f"names among {', '.join(CONTENDERS)}",
            remedy="correct them, or leave them out to run all",
        )
    return tuple(CONTENDERS[name] for name in dict.fromkeys(names or CONTENDERS))
