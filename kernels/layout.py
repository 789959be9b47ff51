"""The coefficient table of the step: what the host writes and every implementation of the step reads.

One row per network evaluation (and per sample, where samples follow different plans), float32, `NUM_COLUMNS` wide:

    x0   = X0_X·x + X0_OUT·out            the image that the network's output implies
    eps  = EPS_X·x + EPS_OUT·out          the noise that it implies
    x0   = clamp(x0, ±CLIP)               if flags.clip
    eps  = RE_X·x + RE_X0·x0              if flags.rederive_eps: the noise that the clipped image implies
    next = C_X0·x0 + C_EPS·eps + SIGMA·z

The prediction type is data: epsilon, v and sample prediction differ in the first four columns alone, so no
implementation branches on it. Spare columns are zero and keep a row at 64 bytes, two 32-byte memory sectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

NUM_COLUMNS: Final = 16


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
    SIGMA = 9


class Stream(IntEnum):
    """The last word of the Philox counter: independent noise for independent purposes."""

    INITIAL = 0
    STEP = 1


@dataclass(frozen=True, slots=True)
class StepFlags:
    """What a step does beyond the linear part: compile-time constants of the kernel, so unused ones cost nothing."""

    clip: bool = False
    rederive_eps: bool = False
    add_noise: bool = False
    guided: bool = False
