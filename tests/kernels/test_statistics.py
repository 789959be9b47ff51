from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from skipstep.kernels.launch import step_constants
from skipstep.kernels.layout import NUM_COLUMNS, StepFlags
from skipstep.kernels.statistics import (
    Thresholding,
    rank,
    rescale_factor,
    rescale_factor_numpy,
    sample_statistics,
    threshold_bound,
    threshold_bound_numpy,
)
from skipstep.kernels.statistics_kernel import sample_statistics_kernel


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


KERNELS = {
    "threshold": (StepFlags(threshold=True), torch.float32),
    "of half": (StepFlags(threshold=True, guided=True, wide_output=True), torch.float16),
    "rescale": (StepFlags(rescale=True, guided=True), torch.float16),
    "both": (StepFlags(threshold=True, rescale=True, guided=True, scale_guidance=True), torch.float32),
}


@pytest.mark.parametrize(("n", "quantile"), [(1, 0.5), (63, 1.0), (300, 0.9)])
@pytest.mark.parametrize("case", KERNELS)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_one_kernel_has_the_bits_of_the_others(case, n, quantile, kernel_device):
    """The samples: random numbers, equal ones, one with NaN, one with an infinity."""
    flags, dtype = KERNELS[case]
    rng, batch = torch.Generator().manual_seed(n), 4
    state = 2 * torch.randn((batch, 1, n), generator=rng)
    shape = (2 if flags.guided else 1) * batch, 2 if flags.wide_output else 1, n
    output = torch.randn(shape, generator=rng).to(dtype)
    state[1], output[1::batch] = 1.25, output[1, 0, 0]
    state[2, 0, n // 2], state[3, 0, n // 2] = math.nan, -math.inf
    table = torch.randn((2, 1, NUM_COLUMNS), generator=rng)
    guidance, strength = 3 * torch.rand((2, batch), generator=rng)
    limits, found = Thresholding(quantile, 1.5), torch.full((2, batch), 7.0, device=kernel_device)
    constants = step_constants(flags, per_sample=False, store_x0=False)
    constants = {name: value for name, value in constants.items() if name in sample_statistics_kernel.arg_names}
    operands = [each.to(kernel_device) for each in (state, output, table, guidance, strength)]
    numbers = *rank(n, quantile), limits.maximum, n, 1
    sample_statistics_kernel[(1, batch)](*operands, *found, *numbers, **constants, BLOCK=256, enable_fp_fusion=False)
    expected = sample_statistics(
        state, output, table[1], flags, guidance=guidance, rescale=strength, thresholding=limits
    )
    for name, ours, theirs in zip(("factor", "bound"), found.cpu(), expected, strict=True):
        if theirs is None:
            assert (ours == 7).all(), name
        else:
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=name)
            assert name == "factor" or theirs[2].isnan()
