from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstep.bench.fits import fit_line


@given(
    fixed=st.floats(1e-4, 1.0),
    per_step=st.floats(1e-4, 1.0),
    steps=st.lists(st.integers(1, 200), min_size=2, max_size=6, unique=True),
)
def test_a_line_is_found_again(fixed, per_step, steps):
    found = fit_line([(s, fixed + per_step * s) for s in steps])
    assert found[0] == pytest.approx(fixed, rel=1e-4, abs=1e-6)
    assert found[1] == pytest.approx(per_step, rel=1e-4)
    assert found[2] < 1e-6


def test_a_slow_large_call_does_not_move_the_fixed_cost():
    """A call of 100 steps that is 10 % off says nothing about what 1 and 2 steps show to be fixed."""
    points = [(1, 0.11), (2, 0.12), (5, 0.15), (100, 1.1 * 1.1)]
    fixed, _, residual = fit_line(points)
    assert fixed == pytest.approx(0.1, rel=0.1)
    assert 0.01 < residual < 0.1


def test_one_step_count_makes_no_line():
    with pytest.raises(ValueError, match="1 distinct"):
        fit_line([(10, 1.0), (10, 1.1)])
