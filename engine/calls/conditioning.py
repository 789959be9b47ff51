"""Conditioning: the rows of a network's conditions for the whole batch, what samples share once.

The conditions are the network's inputs beside state and timestep, by the names of its arguments
(skipstep.networks.spec.NetworkSpec.all_conditions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstep.networks.condition import null_row
from skipstep.networks.spec import LABELS, PROMPTS

if TYPE_CHECKING:
    from skipstep.calls.request import SampleRequest
    from skipstep.networks.condition import Condition
    from skipstep.networks.spec import NetworkSpec

__all__ = ["LABELS", "PROMPTS", "Conditioning", "call_conditioning", "distinct"]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Distinct `rows` by input name, `[R, …]` each, and `index` int64 `[N]`: which row each sample of the batch has.

    What samples share is computed once, on the rows. A network without conditioning has no rows, and an index of zeros.
    """

    rows: Mapping[str, NDArray[Any]]
    index: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return max((len(array) for array in self.rows.values()), default=1)

    def per_sample(self, name: str) -> NDArray[Any]:
        """`[N, …]`, a row for each sample."""
        array: NDArray[Any] = self.rows[name][self.index]
        return array

    @classmethod
    def of_labels(cls, labels: NDArray[np.int64] | None, num_samples: int) -> Conditioning:
        """Conditioning on labels `[N]`, or on nothing."""
        if labels is None:
            return cls({}, np.zeros(num_samples, np.int64))
        rows, index = distinct(labels)
        return cls({LABELS: rows}, index)

    def joined(self, name: str, values: NDArray[Any], index: NDArray[np.int64]) -> Conditioning:
        """With one more condition, `values` `[K, …]` of which sample n has row index[n]: rows are distinct pairs."""
        if not self.rows:
            return Conditioning({name: values}, index)
        pairs, position = distinct(self.index * len(values) + index)
        mine, others = np.divmod(pairs, len(values))
        return Conditioning({**{each: rows[mine] for each, rows in self.rows.items()}, name: values[others]}, position)


def call_conditioning(network: NetworkSpec, request: SampleRequest) -> Conditioning:
    """The conditioning of the network's batch: the samples', and with guidance as many of what stands for none.

    What all samples share is one row.
    """
    conditioning = Conditioning({}, np.zeros(request.num_copies * request.num_samples, np.int64))
    for name, condition in network.all_conditions.items():
        conditioning = conditioning.joined(name, *_rows_of(name, condition, request))
    return conditioning


def _rows_of(name: str, condition: Condition, request: SampleRequest) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The distinct rows of one condition, and which of them each sample of the batch has."""
    count, values = request.num_samples, request.conditions[name]
    halves = [values]
    if request.guidance is not None:
        null = request.negative_conditions.get(name)
        if null is None:
            null = null_row(condition) if condition.fills else values
        halves.append(null)
    if not condition.shape:
        return distinct(np.concatenate([half if len(half) == count else half.repeat(count) for half in halves]))
    places = [np.zeros(count, np.int64) if len(half) == 1 else np.arange(count) for half in halves]
    if halves[-1] is values:  # Both halves share it.
        return values, np.concatenate(places)
    places[1] += len(values)
    return np.concatenate(halves), np.concatenate(places)


def distinct(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The distinct `values`, sorted, and the index of each value among them, in the shape of `values`.

    For the few numbers of a plan or a batch. `numpy.unique` does the same, but imports NumPy's masked arrays first:
    a tenth of the time to a bundle's first image.
    """
    found = np.array(sorted(set(values.ravel().tolist())), values.dtype)
    return found, np.searchsorted(found, values)
