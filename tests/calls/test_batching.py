import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstep.calls.batching import split_batch


@given(num_samples=st.integers(1, 300), sizes=st.sets(st.integers(1, 64), min_size=1))
def test_covers_the_request_with_compiled_sizes_and_no_idle_run(num_samples, sizes):
    runs = split_batch(num_samples, sorted(sizes))
    assert set(runs) <= sizes
    assert sum(runs) >= num_samples
    assert sum(runs) - runs[-1] < num_samples


@pytest.mark.parametrize(
    ("num_samples", "sizes", "runs"),
    [
        (1, [1, 16], [1]),
        (3, [1, 16], [1, 1, 1]),
        (15, [1, 16], [16]),
        (37, [1, 16], [16, 16, 1, 1, 1, 1, 1]),
        (5, [16], [16]),
        (5, [4, 8], [8]),
        (1000, [8], [8] * 125),
    ],
)
def test_known_splits(num_samples, sizes, runs):
    assert split_batch(num_samples, sizes) == runs
