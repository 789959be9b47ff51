"""How cost grows with steps: seconds = a + b·S, fitted by least squares to the medians of each contender.

    a    what a call costs whatever the plan: checks, noise, tables, copies
    b    what a step costs: the network and what stands between two runs of it

A median's noise is proportional to it, so what is squared is the relative error: a call of 100 steps says no more
about `a` than its noise allows. The residual, the root mean square of that, says whether a line is the right shape.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(a, b, relative residual) of y = a + b·x, for y > 0. Raises ValueError below two distinct x."""
    distinct = len({x for x, _ in points})
    if distinct < 2:
        raise ValueError(f"{distinct} distinct points for a line")
    weights = [y**-2 for _, y in points]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    covariance = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True))
    variance = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = covariance / variance
    intercept = y_mean - slope * x_mean
    return intercept, slope, statistics.fmean((1.0 - (intercept + slope * x) / y) ** 2 for x, y in points) ** 0.5
