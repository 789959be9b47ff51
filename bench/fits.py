"""How cost grows with steps: seconds = a + b·S, fitted by least squares to the medians of each contender.

    a    what a call costs whatever the plan: checks, noise, tables, copies
    b    what a step costs: the network and what stands between two runs of it

A median's noise is proportional to it, so what is squared is the relative error: a call of 100 steps says no more
about `a` than its noise allows. The residual, the root mean square of that, says whether a line is the right shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """Seconds of a call: `fixed` once, `per_step` for each step. `residual`: the relative error, as rms."""

    fixed: float
    per_step: float
    residual: float


def fit_line(points: Sequence[tuple[float, float]]) -> Fit:
    """The line y = fixed + per_step·x, for y > 0. Raises ValueError below two distinct x."""
    distinct = len({x for x, _ in points})
    if distinct < 2:
        raise ValueError(f"{distinct} distinct points for a line")
    x, y = np.array(points, dtype=np.float64).T
    slope, fixed = (float(each) for each in np.polyfit(x, y, 1, w=1 / y))
    return Fit(fixed, slope, float(np.sqrt(np.mean(((fixed + slope * x) / y - 1) ** 2))))
