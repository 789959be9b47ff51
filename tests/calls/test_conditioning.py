from __future__ import annotations

import numpy as np
import pytest

from skipstep.calls.conditioning import distinct


@pytest.mark.parametrize(
    "values",
    [
        np.array([[3.5, 0.0], [999.0, 3.5]]),
        np.array([2, 0, 2, 1]),
        np.array([7]),
        np.array([2**40, 5, 2**40]),
    ],
)
def test_is_numpys_unique(values):
    expected, index = np.unique(values, return_inverse=True)
    found, places = distinct(values)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(places, index.reshape(values.shape))
