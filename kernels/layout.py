"""The coefficient table of the step: what the host writes and every implementation of the step reads.

One row per network evaluation (and per sample, if the samples of a batch follow different plans), float32,
`NUM_COLUMNS` wide:

    out    = u + g·(c - u)                  if flags.guided: g is the call's guidance scale of the sample,
                                            or 1 + GUIDANCE·(scale - 1) if flags.scale_guidance
    x0     = X0_X·x + X0_OUT·out            the predicted image
    eps    = EPS_X·x + EPS_OUT·out          the predicted noise
    x0     = clamp(x0, ±CLIP)               if flags.clip
    x0     = clamp(x0, ±bound)/bound        if flags.threshold: dynamic thresholding, one bound per sample
    eps    = RE_X·x + RE_X0·x0              if flags.rederive_eps: the noise that agrees with the clipped image
    next   = C_X0·x0 + C_EPS·eps            all that DDIM needs
           + C_X·x                          if flags.add_state
           + C_H0·h_0, + C_H1·h_1, + C_H2·h_2   if flags.read_h0, read_h1, read_h2: the solver's history
           + SIGMA·z                        if flags.add_noise
                                            flags.learned_variance: SIGMA is exp(LOG_SIGMA + LOG_SIGMA_OUT·v), v being
                                            the second half of the network's channels
    h_w    = M_X·x + M_X0·x0 + M_EPS·eps    if flags.write_h0, write_h1 or write_h2: one of them at most, w
           + M_H·h_w                        if the same slot is read; h_w is what it held before

The prediction type is data: epsilon, v and sample prediction differ only in the first four columns, so no
implementation branches on it. The solver is data in the same way. Its history is NUM_SLOTS vectors, and each evaluation
writes one of them at most. A Runge-Kutta rule keeps weighted sums of its evaluations there; a multistep rule of k
earlier evaluations uses k slots as a ring: evaluation i writes slot i mod k. Spare columns are zero. A row is 128
bytes, one cache line.
"""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass, replace
from enum import IntEnum
from typing import Final

from skipstep.errors import InputError

NUM_COLUMNS: Final = 32
NUM_SLOTS: Final = 3


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
    C_H1 = 10
    C_H0 = 11
    M_X = 12
    M_X0 = 13
    M_EPS = 14
    M_H = 15
    SIGMA = 16
    LOG_SIGMA = 17
    LOG_SIGMA_OUT = 18
    C_H2 = 19
    GUIDANCE = 20


# The weight of each history slot.
SLOT_COLUMNS: Final = (Column.C_H0, Column.C_H1, Column.C_H2)


class Stream(IntEnum):
    """The last word of the Philox counter: independent noise for independent purposes."""

    INITIAL = 0
    STEP = 1
    EDIT = 2


@dataclass(frozen=True, slots=True)
class StepFlags:
    """What one step does beyond DDIM's two terms. These are compile-time constants: an unused one costs nothing.

    unguided: the network is evaluated without guidance, also in a guided call; the step itself does not read it. The
    following do not come from the plan. wide_output: the network has 2C output channels, the second half for a learned
    variance. guided: classifier-free guidance, which doubles the network's batch. rescale: the guided prediction is
    multiplied by a factor per sample. doubled: an evaluation without guidance in a guided call, which leaves the next
    input for a doubled batch.
    """

    clip: bool = False
    threshold: bool = False
    rederive_eps: bool = False
    add_state: bool = False
    read_h0: bool = False
    read_h1: bool = False
    read_h2: bool = False
    write_h0: bool = False
    write_h1: bool = False
    write_h2: bool = False
    add_noise: bool = False
    learned_variance: bool = False
    wide_output: bool = False
    guided: bool = False
    rescale: bool = False
    doubled: bool = False
    unguided: bool = False
    scale_guidance: bool = False

    @property
    def read_slots(self) -> tuple[int, ...]:
        """The history slots that are read."""
        return tuple(itertools.compress(range(NUM_SLOTS), (self.read_h0, self.read_h1, self.read_h2)))

    @property
    def written_slots(self) -> tuple[int, ...]:
        """The history slots that are written; one evaluation writes one at most, a union of several may have more."""
        return tuple(itertools.compress(range(NUM_SLOTS), (self.write_h0, self.write_h1, self.write_h2)))

    @property
    def num_slots(self) -> int:
        """How many history slots there must be: those up to the last that is read or written."""
        return 1 + max((*self.read_slots, *self.written_slots), default=-1)

    @property
    def input_copies(self) -> int:
        """How often the next state is written into the network's input."""
        return 2 if self.guided or self.doubled else 1

    @property
    def of_statistics(self) -> StepFlags | None:
        """What matters to the statistics that the step needs before it; None where it needs none."""
        if not (self.threshold or self.rescale):
            return None
        names = "threshold", "wide_output", "guided", "rescale", "scale_guidance"
        return StepFlags(**{name: getattr(self, name) for name in names})

    def in_call(self, *, guided: bool, rescale: bool, wide_output: bool) -> StepFlags:
        """What the step of a plan does in a call, guided or not, with guidance rescale or not."""
        if not guided:
            return replace(self, wide_output=wide_output, unguided=False, scale_guidance=False)
        if self.unguided:
            return replace(self, wide_output=wide_output, unguided=False, scale_guidance=False, doubled=True)
        return replace(self, wide_output=wide_output, guided=True, rescale=rescale)

    def union(self, *others: StepFlags) -> StepFlags:
        """The flags that are set in any of these."""
        return StepFlags(*map(any, zip(*map(astuple, (self, *others)), strict=True)))


def check_slots(flags: StepFlags) -> None:
    """Raise InputError for flags of one evaluation that write more than one history slot."""
    if len(flags.written_slots) > 1:
        raise InputError(
            got="flags that write the history slots " + ", ".join(f"h{slot}" for slot in flags.written_slots),
            expected="one of them: an evaluation has the weights of one",
            remedy="write the others in other evaluations, as the solvers do",
        )
