from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstep.editing.interpolation import slerp, slerp_grid
from skipstep.errors import InputError

RNG = np.random.default_rng(0)
A, B, C, D = RNG.standard_normal((4, 1, 6, 5)).astype(np.float32)


@given(seed=st.integers(0, 10**6), weight=st.floats(0.0, 1.0), scale=st.floats(0.5, 2.0))
def test_length_and_angle_go_evenly(seed, weight, scale):
    a, b = np.random.default_rng(seed).standard_normal((2, 3, 4, 4))
    b *= scale * np.linalg.norm(a) / np.linalg.norm(b) / scale
    between = slerp(a.astype(np.float32), b.astype(np.float32), [weight])[0].astype(np.float64)
    lengths = [np.linalg.norm(v) for v in (a, b, between)]
    assert lengths[2] == pytest.approx(lengths[0], rel=1e-5)

    def angle(u, v):
        return np.arccos(np.clip(np.vdot(u, v) / np.linalg.norm(u) / np.linalg.norm(v), -1, 1))

    assert angle(a, between) == pytest.approx(weight * angle(a, b), abs=1e-3)


def test_ends_are_the_ends():
    ends = slerp(A, B, [0.0, 1.0])
    np.testing.assert_allclose(ends, [A, B], atol=1e-6)
    assert ends.dtype == np.float32


def test_near_parallel_latents_are_interpolated_linearly_and_equal_ones_stay():
    np.testing.assert_array_equal(slerp(A, A, [0.0, 0.3, 1.0]), [A, A, A])
    nearly = A * np.float32(1 + 1e-3)
    np.testing.assert_allclose(slerp(A, nearly, [0.5])[0], A * 1.0005, rtol=1e-6)
    assert np.all(np.isfinite(slerp(A, A + np.float32(1e-7), [0.5])))


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        (A, -A, "opposite"),
        (A, -2 * A, "opposite"),
        (A, 0 * A, "lengths"),
        (0 * A, B, "lengths"),
        (A, B * np.nan, "lengths"),
        (A, B[:, :3], "shapes"),
    ],
)
def test_refuses_where_there_is_no_one_way(a, b, names):
    with pytest.raises(InputError, match=names):
        slerp(a, b, [0.5])


def test_a_grid_has_its_corners_and_even_sides():
    grid = slerp_grid([A, B, C, D], rows=3, columns=4).reshape(3, 4, *A.shape)
    for (row, column), corner in {(0, 0): A, (0, 3): B, (2, 0): C, (2, 3): D}.items():
        np.testing.assert_allclose(grid[row, column], corner, atol=1e-5)
    np.testing.assert_allclose(grid[0], slerp(A, B, np.linspace(0, 1, 4)), atol=1e-5)
    np.testing.assert_allclose(grid[:, 0], slerp(A, C, np.linspace(0, 1, 3)), atol=1e-5)


@pytest.mark.parametrize("options", [{"rows": 1, "columns": 3}, {"rows": 3, "columns": 1}])
def test_a_grid_needs_two_of_each(options):
    with pytest.raises(InputError, match="an integer from 2"):
        slerp_grid([A, B, C, D], **options)
    with pytest.raises(InputError, match="3 corners"):
        slerp_grid([A, B, C], rows=2, columns=2)
