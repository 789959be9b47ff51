"""The weights that a sampler graph reads: the columns of each stage, and the table of a loop whose body is one for all.

An unrolled stage reads the columns that its StepFlags ask for. A loop's body reads the columns of all its stages, so
its table holds neutral values where a stage does not ask for one: zero weights, no clipping, the history kept.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from skipstep.kernels.layout import NUM_COLUMNS, Column, StepFlags
from skipstep.plans.stages import Stages

# A spare column of the step's table, used in sampler graphs alone: 1 where a stage stores its state as the base.
WRITE_BASE: Final = NUM_COLUMNS - 1


def stage_columns(flags: StepFlags) -> tuple[int, ...]:
    """The columns that the step of one stage reads (skipstep.kernels.layout has the equations)."""
    columns: list[int] = [Column.X0_X, Column.X0_OUT, Column.C_X0, Column.C_EPS]
    columns += [Column.RE_X, Column.RE_X0] if flags.rederive_eps else [Column.EPS_X, Column.EPS_OUT]
    for needed, column in (
        (flags.clip, Column.CLIP),
        (flags.add_state, Column.C_X),
        (flags.read_base, Column.C_BASE),
        (flags.read_memory, Column.C_MEMORY),
        (flags.write_memory, Column.M_X),
        (flags.write_memory, Column.M_X0),
        (flags.write_memory, Column.M_EPS),
        (flags.write_memory and flags.read_memory, Column.M_MEMORY),
        (flags.add_noise, Column.SIGMA),
        (flags.learned_variance, Column.LOG_SIGMA),
        (flags.learned_variance, Column.LOG_SIGMA_OUT),
    ):
        if needed:
            columns.append(column)
    return tuple(columns)


def loop_columns(stages: Stages) -> tuple[int, ...]:
    """The columns that a loop's body reads: those of every stage, and the two that keep what a stage does not write."""
    columns = {column for flags in stages.flags for column in stage_columns(flags)}
    if any(flags.write_memory for flags in stages.flags):
        columns.add(Column.M_MEMORY)
    if any(flags.write_base for flags in stages.flags):
        columns.add(WRITE_BASE)
    return tuple(sorted(columns))


def loop_table(stages: Stages) -> NDArray[np.float32]:
    """The table of a loop's body, float32 `[E, 1 or B, NUM_COLUMNS]`."""
    table = np.zeros_like(stages.table)
    table[..., Column.CLIP] = np.inf
    table[..., Column.M_MEMORY] = [[not flags.write_memory] for flags in stages.flags]
    for row, source, flags in zip(table, stages.table, stages.flags, strict=True):
        read = list(stage_columns(flags))
        row[:, read] = source[:, read]
        row[:, WRITE_BASE] = flags.write_base
    return table
