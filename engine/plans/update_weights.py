"""What a solver gives a plan: the weights of every network evaluation, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.float64]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
VARIANCES: tuple[str, ...] = get_args(Variance)

# In `UpdateWeights.grid`: an evaluation at a level between those of the plan.
BETWEEN: Final = -1


@dataclass(frozen=True, slots=True)
class SolverOptions:
    """The options of a plan for its solver. A plan refuses options that its solver does not support.

    `timesteps` float64 `[S]` are those of the steps' starts, for a solver whose weights depend on them.
    """

    eta: float = 0.0
    variance: Variance = "fixed_small"
    weights: NDArray[np.float32] | None = None
    timesteps: Levels = field(default_factory=lambda: np.zeros(0))


@dataclass(slots=True)
class UpdateWeights:
    """One row per network evaluation, E of them; each array is float64 `[E]`, zero where a solver does not set it.

    level       alpha_bar of the state that the network reads.
    grid        int `[E]`: which of the plan's levels that is, or BETWEEN.
    c_*, m_*    weights of the next state and of the history (skipstep.kernels.layout).
    sigma       of the fresh noise; exp(log_sigma + log_sigma_out·v) times it where the variance is learned.
    slot        int `[E]`: which slot of the history an evaluation writes, if one of its m_* is not zero.
    ends_step   bool `[E]`: this evaluation is the last of its step.
    """

    level: Levels
    grid: NDArray[np.int64]
    ends_step: NDArray[np.bool_]
    c_x: Levels = field(init=False)
    c_x0: Levels = field(init=False)
    c_eps: Levels = field(init=False)
    c_h0: Levels = field(init=False)
    c_h1: Levels = field(init=False)
    c_h2: Levels = field(init=False)
    m_x: Levels = field(init=False)
    m_x0: Levels = field(init=False)
    m_eps: Levels = field(init=False)
    m_h: Levels = field(init=False)
    sigma: Levels = field(init=False)
    log_sigma: Levels = field(init=False)
    log_sigma_out: Levels = field(init=False)
    slot: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            if not each.init:
                setattr(self, each.name, np.zeros(len(self.level), np.int64 if each.name == "slot" else np.float64))


# The arrays of `UpdateWeights` that are columns of the step's table, by the same names in lower case.
UPDATE_COLUMNS = tuple(each.name for each in fields(UpdateWeights) if not each.init and each.name != "slot")


def one_row_per_step(alpha_bars: Levels) -> UpdateWeights:
    """The weights of a solver of one evaluation a step, still without any; `alpha_bars` are float64 `[S+1]`."""
    num_steps = len(alpha_bars) - 1
    return UpdateWeights(alpha_bars[:-1].copy(), np.arange(num_steps), np.ones(num_steps, bool))
