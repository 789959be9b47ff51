from __future__ import annotations

import numpy as np
import pytest
import torch

from skipstep.kernels.statistics import (
    Thresholding,
    rescale_factor,
    rescale_factor_numpy,
    threshold_bound,
    threshold_bound_numpy,
)


def images(n: int, *, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(n).standard_normal((3, 1, n, 1)) * scale).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 63, 1000])
@pytest.mark.parametrize("quantile", [0.001, 0.5, 0.9, 0.995, 1.0])
def test_bounds_are_quantiles_of_absolute_values(n, quantile):
    x0, parameters = images(n), Thresholding(quantile, 3.0)
    expected = np.quantile(np.abs(x0).reshape(3, -1).astype(np.float64), quantile, axis=1).clip(1.0, 3.0)
    kept = x0.copy()
    ours = threshold_bound_numpy(x0, parameters)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_array_equal(x0, kept)
    np.testing.assert_array_equal(threshold_bound(torch.from_numpy(x0), parameters).numpy(), ours)


def test_small_images_are_left_alone():
    assert threshold_bound_numpy(images(100, scale=0.1), Thresholding(0.995)).tolist() == [1.0] * 3


def test_a_broken_prediction_has_no_bound():
    x0 = images(100)
    x0[1, 0, 5] = np.nan
    for bound in (
        threshold_bound_numpy(x0, Thresholding(0.5)),
        threshold_bound(torch.from_numpy(x0), Thresholding(0.5)).numpy(),
    ):
        assert np.isnan(bound).tolist() == [False, True, False]


def test_rescaling_takes_back_the_spread():
    conditional, guided = images(500, scale=1.0), images(501, scale=4.0)[:, :, :500]
    strength = np.array([0.0, 0.5, 1.0], np.float32)
    factor = rescale_factor_numpy(guided, conditional, strength)
    ratio = conditional.std(axis=(1, 2, 3)) / guided.std(axis=(1, 2, 3))
    np.testing.assert_allclose(factor, [1.0, 0.5 * ratio[1] + 0.5, ratio[2]], rtol=1e-5)
    theirs = rescale_factor(*(torch.from_numpy(array) for array in (guided, conditional, strength)))
    np.testing.assert_allclose(theirs.numpy(), factor, rtol=1e-6)


def test_a_constant_prediction_has_no_spread_to_take_back():
    flat = np.ones((2, 1, 4, 4), np.float32)
    assert rescale_factor_numpy(flat, flat, np.ones(2, np.float32)).tolist() == [1.0, 1.0]
    tensors = torch.from_numpy(flat), torch.from_numpy(flat), torch.ones(2)
    assert rescale_factor(*tensors).tolist() == [1.0, 1.0]
