"""The coefficient table of the step: what the host writes and every implementation of the step reads.

One row per network evaluation (and per sample, if the samples of a batch follow different plans), float32,
`NUM_COLUMNS` wide:

    x0     = X0_X·x + X0_OUT·out            the predicted image
    eps    = EPS_X·x + EPS_OUT·out          the predicted noise
    x0     = clamp(x0, ±CLIP)               if flags.clip
    x0     = clamp(x0, ±bound)/bound        if flags.threshold: dynamic thresholding, one bound per sample
    eps    = RE_X·x + RE_X0·x0              if flags.rederive_eps: the noise that agrees with the clipped image
    next   = C_X0·x0 + C_EPS·eps            all that DDIM needs
           + C_X·x                          if flags.add_state
           + C_BASE·base                    if flags.read_base: the state that the first evaluation of the step read
           + C_MEMORY·memory                if flags.read_memory: the solver's history
           + SIGMA·z                        if flags.add_noise
                                            flags.learned_variance: SIGMA is exp(LOG_SIGMA + LOG_SIGMA_OUT·v), v being
                                            the second half of the network's channels
    memory = M_X·x + M_X0·x0 + M_EPS·eps    if flags.write_memory
           + M_MEMORY·memory                if also flags.read_memory
    base   = x                              if flags.write_base

The prediction type is data: epsilon, v and sample prediction differ only in the first four columns, so no
implementation branches on it. The solver is data in the same way. One history buffer (`memory`) is enough for every
solver here, because a Runge-Kutta or multistep rule needs only a weighted sum of its earlier evaluations, and the sum
is stored instead of its terms. Spare columns are zero. A row is 128 bytes, one cache line.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Final

NUM_COLUMNS: Final = 32


class Column(IntEnum):
    X0_X = 0
    X0_OUT = 1
    EPS_X = 2
    EPS_OUT = 3
    CLIP = 4
    RE_X = 5
    RE_X0 = 6
    C_X0 = 7
    C_EPS = 8
    C_X = 9
    C_BASE = 10
    C_MEMORY = 11
    M_X = 12
    M_X0 = 13
    M_EPS = 14
    M_MEMORY = 15
    SIGMA = 16
    LOG_SIGMA = 17
    LOG_SIGMA_OUT = 18


class Stream(IntEnum):
    """The last word of the Philox counter: independent noise for independent purposes."""

    INITIAL = 0
    STEP = 1
    EDIT = 2


@dataclass(frozen=True, slots=True)
class StepFlags:
    """What one step does beyond DDIM's two terms. These are compile-time constants: an unused one costs nothing.

    The last three do not come from the plan. wide_output: the network has 2C output channels, the second half for a
    learned variance. guided: classifier-free guidance, which doubles the network's batch. rescale: the guided
    prediction is multiplied by a factor per sample.
    """

    clip: bool = False
    threshold: bool = False
    rederive_eps: bool = False
    add_state: bool = False
    read_base: bool = False
    write_base: bool = False
    read_memory: bool = False
    write_memory: bool = False
    add_noise: bool = False
    learned_variance: bool = False
    wide_output: bool = False
    guided: bool = False
    rescale: bool = False

    def union(self, *others: StepFlags) -> StepFlags:
        """The flags that are set in any of these."""
        return StepFlags(*map(any, zip(*map(astuple, (self, *others)), strict=True)))
