"""Conditioning: the network's inputs beside the state and the timestep, by diffusers' names.

class_labels            int64   [R]          a class each
encoder_hidden_states   float32 [R, L, D]    a prompt each: L tokens, embedded by a text encoder
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from skipstep.calls.request import SampleRequest
    from skipstep.networks.spec import NetworkSpec

LABELS: Final = "class_labels"
PROMPTS: Final = "encoder_hidden_states"


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


def call_conditioning(network: NetworkSpec, request: SampleRequest) -> Conditioning:
    """The conditioning of the network's batch: the samples', and with guidance as many null labels or negative prompts.

    A prompt that all samples share is one row.
    """
    guided = request.guidance is not None
    labels = request.class_labels
    if labels is not None and guided:
        null = labels if network.null_label is None else np.full_like(labels, network.null_label)
        labels = np.concatenate([labels, null])
    if request.prompts is None:
        return Conditioning.of_labels(labels, request.num_copies * request.num_samples)
    halves = [request.prompts]
    if guided:
        assert request.negative_prompts is not None, "a guided request has them"
        halves.append(request.negative_prompts)
    index = np.concatenate([_rows_of(half, request.num_samples) for half in halves])
    if guided:
        index[request.num_samples :] += len(request.prompts)
    prompts = np.concatenate(halves)
    if labels is None:
        return Conditioning({PROMPTS: prompts}, index)
    kinds = int(labels.max()) + 1
    pairs, position = distinct(index * kinds + labels)
    return Conditioning({PROMPTS: prompts[pairs // kinds], LABELS: pairs % kinds}, position)


def _rows_of(prompts: NDArray[np.float32], num_samples: int) -> NDArray[np.int64]:
    return np.zeros(num_samples, np.int64) if len(prompts) == 1 else np.arange(num_samples)


def distinct(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The distinct `values`, sorted, and the index of each value among them, in the shape of `values`.

    For the few numbers of a plan or a batch. `numpy.unique` does the same, but imports NumPy's masked arrays first:
    a tenth of the time to a bundle's first image.
    """
    found = np.array(sorted(set(values.ravel().tolist())), values.dtype)
    return found, np.searchsorted(found, values)
