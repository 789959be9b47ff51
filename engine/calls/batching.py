"""Splitting a request over the batch sizes that were compiled.

A run costs about its batch size plus a constant, so the cheapest cover of n samples by sizes b_1 … b_k minimises the
sum of (b + OVERHEAD) over the runs; samples beyond n are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

# The cost of one more run, in samples, as measured on small networks at batch 1.
OVERHEAD = 0.5


def split_batch(num_samples: int, batch_sizes: Sequence[int]) -> list[int]:
    """Return batch sizes, largest first, that cover `num_samples` ≥ 1 at the least cost; the sum may exceed it."""
    if num_samples in batch_sizes:
        return [num_samples]
    sizes = tuple(sorted(set(batch_sizes)))
    largest = sizes[-1]
    # Far from the end the largest size has the least cost per sample; only the tail is worth a search.
    whole = max(0, num_samples // largest - 1)
    return [largest] * whole + sorted(_cheapest_cover(num_samples - whole * largest, sizes), reverse=True)


@lru_cache(maxsize=1024)
def _cheapest_cover(num_samples: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for n in range(1, num_samples + 1):
        best.append(min((best[max(0, n - b)][0] + b + OVERHEAD, (*best[max(0, n - b)][1], b)) for b in sizes))
    return best[num_samples][1]
