import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tolerances import NORMAL_ABSOLUTE

from skipstep.calls.noise import StageNoise, philox4x32, standard_normal
from skipstep.kernels.layout import Stream


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_random123_known_answers(counter, key, expected):
    """The vectors that the Random123 library publishes for philox4x32-10."""
    words = philox4x32(tuple(np.uint32(word) for word in counter), np.uint64(key[0] | key[1] << 32))
    assert tuple(int(word) for word in words) == expected


def seeds(*values):
    return np.array(values, np.uint64)


def test_normals_are_the_box_muller_of_their_words():
    """Against the definition in float64."""
    seed, n, stage = 2**63 + 11, 403, 5
    normals = standard_normal(seeds(seed), n, stage=stage, stream=Stream.STEP)[0]
    blocks = np.arange(-(-n // 4), dtype=np.uint32)
    words = philox4x32((blocks, np.uint32(0), np.uint32(stage), np.uint32(Stream.STEP)), np.uint64(seed))
    expected = np.empty((len(blocks), 4))
    for pair in (0, 2):
        u = words[pair].astype(np.float64) / 2**32 + 2.0**-33
        angle = 2 * np.pi * words[pair + 1].astype(np.float64) / 2**32
        expected[:, pair] = np.sqrt(-2 * np.log(u)) * np.cos(angle)
        expected[:, pair + 1] = np.sqrt(-2 * np.log(u)) * np.sin(angle)
    np.testing.assert_allclose(normals, expected.reshape(-1)[:n], rtol=0, atol=NORMAL_ABSOLUTE)


def test_a_million_normals_are_normal():
    normals = standard_normal(seeds(1), 1_000_000, stage=0, stream=Stream.INITIAL)[0].astype(np.float64)
    assert stats.kstest(normals, "norm").pvalue > 0.01
    assert abs(normals.mean()) < 4e-3
    assert abs(normals.var() - 1) < 6e-3
    assert abs(stats.kurtosis(normals)) < 0.02
    assert 4.5 < np.abs(normals).max() < 6.8
    for lag in (1, 2, 3, 4):
        assert abs(np.corrcoef(normals[:-lag], normals[lag:])[0, 1]) < 4e-3


def test_seeds_stages_and_streams_are_independent():
    n = 100_000
    draws = [
        standard_normal(seeds(seed), n, stage=stage, stream=stream)[0]
        for seed in (0, 1, 2**32, 2**64 - 1)
        for stage in (0, 1)
        for stream in Stream
    ]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / np.sqrt(n)


@given(
    batch=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5),
    n=st.integers(1, 70),
    stage=st.integers(0, 1000),
)
def test_a_sample_depends_on_its_seed_alone(batch, n, stage):
    together = standard_normal(seeds(*batch), n, stage=stage, stream=Stream.STEP)
    assert together.shape == (len(batch), n)
    assert together.dtype == np.float32
    for row, seed in zip(together, batch, strict=True):
        alone = standard_normal(seeds(seed), n, stage=stage, stream=Stream.STEP)[0]
        np.testing.assert_array_equal(row, alone)


def test_a_shorter_sample_is_the_beginning_of_a_longer_one():
    long = standard_normal(seeds(3), 101, stage=0, stream=Stream.INITIAL)
    for n in (1, 2, 3, 4, 63):
        np.testing.assert_array_equal(standard_normal(seeds(3), n, stage=0, stream=Stream.INITIAL), long[:, :n])


@pytest.mark.parametrize("max_elements", [1, 100, 10_000])
def test_stage_noise_is_that_of_its_stage_however_many_are_drawn_at_once(max_elements):
    noise = StageNoise(seeds(7, 8), 13, 5, max_elements=max_elements)
    for stage in (0, 1, 2, 3, 4, 1):
        expected = standard_normal(seeds(7, 8), 13, stage=stage, stream=Stream.STEP)
        np.testing.assert_array_equal(noise(stage), expected)
