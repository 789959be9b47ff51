"""The weights that a sampler graph reads: the columns of each stage, and the table of a loop whose body is one for all.

An unrolled stage reads the columns that its StepFlags ask for. A loop's body reads the columns of all its stages, so
its table holds neutral values where a stage does not ask for one: zero weights, no clipping, no slot written.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from skipstep.kernels.layout import NUM_COLUMNS, SLOT_COLUMNS, Column, StepFlags
from skipstep.plans.stages import Stages

# A spare column of the step's table, used in loops alone: which slot of the history a stage writes, -1 for none.
WRITTEN_SLOT: Final = NUM_COLUMNS - 1


def stage_columns(flags: StepFlags) -> tuple[int, ...]:
    """The columns that the step of one stage reads (skipstep.kernels.layout has the equations)."""
    columns: list[int] = [Column.X0_X, Column.X0_OUT, Column.C_X0, Column.C_EPS]
    columns += [Column.RE_X, Column.RE_X0] if flags.rederive_eps else [Column.EPS_X, Column.EPS_OUT]
    for needed, column in (
        (flags.clip, Column.CLIP),
        (flags.add_state, Column.C_X),
        *((slot in flags.read_slots, column) for slot, column in enumerate(SLOT_COLUMNS)),
        *((bool(flags.written_slots), column) for column in (Column.M_X, Column.M_X0, Column.M_EPS)),
        (not set(flags.written_slots).isdisjoint(flags.read_slots), Column.M_H),
        (flags.add_noise, Column.SIGMA),
        (flags.learned_variance, Column.LOG_SIGMA),
        (flags.learned_variance, Column.LOG_SIGMA_OUT),
    ):
        if needed:
            columns.append(column)
    return tuple(columns)


def loop_columns(stages: Stages) -> tuple[int, ...]:
    """The columns that a loop's body reads: those of every stage, and which slot of the history a stage writes."""
    columns = {column for flags in stages.flags for column in stage_columns(flags)}
    if any(flags.written_slots for flags in stages.flags):
        columns.add(WRITTEN_SLOT)
    return tuple(sorted(columns))


def loop_table(stages: Stages) -> NDArray[np.float32]:
    """The table of a loop's body, float32 `[E, 1 or B, NUM_COLUMNS]`."""
    table = np.zeros_like(stages.table)
    table[..., Column.CLIP] = np.inf
    for row, source, flags in zip(table, stages.table, stages.flags, strict=True):
        read = list(stage_columns(flags))
        row[:, read] = source[:, read]
        row[:, WRITTEN_SLOT] = next(iter(flags.written_slots), -1)
    return table
