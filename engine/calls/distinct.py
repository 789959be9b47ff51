"""Distinct values and where they stand, for the few numbers of a plan or a batch.

`numpy.unique` does the same, but loads NumPy's masked arrays first: a tenth of the time to a bundle's first image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def distinct(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The distinct `values`, sorted, and for each value which of them it is, in the shape of `values`."""
    found = np.array(sorted(set(values.ravel().tolist())), values.dtype)
    return found, np.searchsorted(found, values)
