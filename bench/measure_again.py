"""A second opinion on one case: the run's own options, another process, more turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from skipstep.bench.measure import Bench, Options
from skipstep.bench.results import Case, Run
from skipstep.errors import InputError

# Three times the turns bring the noise of a median down by √3.
MORE_TURNS = 3


def measuring_again(result: Run, *, progress: Callable[[str], None] | None = None) -> Callable[[Case], Case]:
    """What measures a case of `result` as it was measured, with all contenders that took turns then, but with
    MORE_TURNS times as many turns and as much time. Raises InputError where the run does not say how it was measured.
    """
    known = {field.name for field in fields(Options)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in result.options.items()
    }
    if not {"models", "contenders"} <= given.keys():
        raise InputError(
            got="a result without the options that it was measured with",
            expected="one that skipstep bench --out wrote",
            remedy="leave out --measure-again, or measure the result again",
        )
    options = Options(**{name: value for name, value in given.items() if name in known})

    def measure(case: Case) -> Case:
        turns = max((len(each.seconds) for each in case.contenders), default=0)
        narrowed = replace(
            options,
            steps=(case.steps,),
            batch_sizes=(case.batch_size,),
            budget_seconds=MORE_TURNS * options.budget_seconds,
            max_rounds=MORE_TURNS * (turns or options.max_rounds),
        )
        with Bench(narrowed, progress=progress) as bench:
            if case.model not in bench.subjects:
                raise InputError(
                    got=f"a result of the model {case.model!r}, and here {', '.join(bench.subjects)}",
                    expected="the same models at the same paths",
                    remedy="compare where skipstep bench ran",
                )
            return bench.case(case.model, case.steps, case.batch_size)

    return measure
