"""Numbers with intervals: distances between sets of features, and how far they would vary with other noises.

The distances are torchmetrics'. An interval holds the middle 95 % of what resampled sets of noises give. Resampling
repeats samples, which raises a Fréchet distance as fewer samples would; so the interval is moved to the measured value,
and says how far that varies, not how far it is biased. Only distances of equally many samples are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from skipstep.fitting.judge import Floats

RESAMPLED = 200
# Kernel distances are of blocks: each block of samples with its own block of reference images.
BLOCK = 250

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, and the bounds of its interval."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Estimate) -> bool:
        return self.low <= other.high and other.low <= self.high


def estimate(statistic: Callable[[Places], float], num: int, *, resampled: int = RESAMPLED) -> Estimate:
    """`statistic` of the samples at given places, of `num`: of all, with the interval of resampled sets."""
    rng = np.random.default_rng(0)
    value = statistic(np.arange(num))
    others = [statistic(rng.integers(0, num, num)) for _ in range(resampled)]
    low, high = np.quantile(others, [0.025, 0.975]) - np.mean(others)
    return Estimate(value, value + float(low), value + float(high))


def root_mean(squares: Floats) -> Estimate:
    """The root of the mean of `squares` `[N]`, one mean square a sample."""
    return estimate(lambda at: float(np.sqrt(squares[at].mean(dtype=np.float64))), len(squares))


def share(right: NDArray[np.bool_] | Floats) -> Estimate:
    found = estimate(lambda at: float(right[at].mean()), len(right))
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high))


class _Features(nn.Module):
    """Features are what it is given: torchmetrics calls an extractor on images, and ours ran before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """The distance of Gaussians fitted to features `[N, F]` and to those of the reference (Heusel et al. 2017, arXiv
    1706.08500)."""

    def __init__(self, reference: Floats) -> None:
        self._metric = FrechetInceptionDistance(feature=_Features(reference.shape[1]), reset_real_features=False)
        self._metric.update(torch.from_numpy(reference).double(), real=True)

    def of(self, features: Floats) -> float:
        self._metric.reset()
        self._metric.update(torch.from_numpy(features).double(), real=False)
        return float(self._metric.compute())

    def estimate(self, features: Floats) -> Estimate:
        return estimate(lambda at: self.of(features[at]), len(features))


def kernel_distance(features: Floats, reference: Floats, *, block: int = BLOCK) -> Estimate | None:
    """The unbiased squared maximum mean discrepancy with the cubic kernel (Binkowski et al. 2018, arXiv 1801.01401),
    a mean over blocks; None where there are fewer than two."""
    count = min(len(features), len(reference)) // block
    if count < 2:
        return None
    distances = []
    for first in range(0, count * block, block):
        with warnings.catch_warnings():  # It warns that it keeps the features, which is what we want.
            warnings.simplefilter("ignore", UserWarning)
            metric = KernelInceptionDistance(feature=_Features(features.shape[1]), subsets=1, subset_size=block)
        metric.update(torch.from_numpy(reference[first : first + block]), real=True)
        metric.update(torch.from_numpy(features[first : first + block]), real=False)
        distances.append(float(metric.compute()[0]))
    # Student's interval for few blocks, his quantile to the first term in 1/(count - 1).
    value, quantile = float(np.mean(distances)), 1.96 * (1 + (1.96**2 + 1) / (4 * (count - 1)))
    half = quantile * float(np.std(distances, ddof=1)) / count**0.5
    return Estimate(value, value - half, value + half)
