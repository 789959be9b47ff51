"""Counter-based noise: every normal number is a function of (seed, stream, stage, element), wherever it is computed.

    w0 w1 w2 w3 = Philox4x32-10(counter = (block low, block high, stage, stream), key = seed)
    elements 4·block … 4·block+3 of a sample = Box-Muller(w0, w1), Box-Muller(w2, w3)

Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC'11). A sample's noise therefore does not
depend on its batch, its place in it, or the device; the normals have the same float32 bits as those of the Triton
kernels (skipstep.kernels.normal_constants says how).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.request import SampleRequest
from skipstep.kernels.layout import Stream
from skipstep.kernels.normal_constants import (
    COS_COEFFICIENTS,
    LN2_HIGH,
    LN2_LOW,
    LN_COEFFICIENTS,
    PHILOX_ROUNDS,
    RADIANS_PER_UNIT,
    SIN_COEFFICIENTS,
    SQRT_HALF_BITS,
)
from skipstep.networks.spec import NetworkSpec

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85

Words = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]


def philox4x32(counter: tuple[NDArray[np.uint32], ...], key: NDArray[np.uint64]) -> Words:
    """Four words of Philox4x32-10 for each element of the broadcast of the four counter words and the 64-bit keys."""
    # Words live in uint64 arrays, where a 32 by 32 bit product is one multiplication.
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) for word in counter)
    keys = np.asarray(key, np.uint64)
    k0, k1 = keys & _LOW, keys >> _32
    for r in range(PHILOX_ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        bumped0, bumped1 = (k0 + np.uint64(r * WEYL[0])) & _LOW, (k1 + np.uint64(r * WEYL[1])) & _LOW
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ bumped0, p1 & _LOW, (p0 >> _32) ^ c3 ^ bumped1, p0 & _LOW
    w0, w1, w2, w3 = (word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))
    return w0, w1, w2, w3


def standard_normal(
    seeds: NDArray[np.uint64], num_elements: int, *, stage: int | range, stream: Stream
) -> NDArray[np.float32]:
    """Normals float32 `[B, num_elements]` of one stage, or `[len(stage), B, num_elements]` of several."""
    stages = np.atleast_1d(np.asarray(stage, np.uint32))
    blocks = np.arange(-(-num_elements // 4), dtype=np.uint64)
    words = philox4x32(
        (
            (blocks & _LOW).astype(np.uint32),
            (blocks >> _32).astype(np.uint32),
            stages[:, None, None],
            np.full((1, 1, 1), stream, np.uint32),
        ),
        seeds[None, :, None],
    )
    normals = np.empty((len(stages), len(seeds), len(blocks), 4), np.float32)
    for pair in (0, 2):
        normals[..., pair], normals[..., pair + 1] = _box_muller(words[pair], words[pair + 1])
    flat = normals.reshape(len(stages), len(seeds), -1)[..., :num_elements]
    return np.ascontiguousarray(flat[0] if isinstance(stage, int) else flat)


def sample_noise(network: NetworkSpec, seeds: NDArray[np.uint64], stream: Stream) -> NDArray[np.float32]:
    """Standard normals `[B, *sample_shape]` of the samples' seeds."""
    noise = standard_normal(seeds, network.num_elements, stage=0, stream=stream)
    return noise.reshape(len(seeds), *network.sample_shape)


def initial_state(network: NetworkSpec, request: SampleRequest) -> NDArray[np.float32]:
    """x_T `[B, *sample_shape]`: a copy of the caller's, or noise that depends on each sample's seed alone."""
    if request.x_T is not None:
        given: NDArray[np.float32] = request.x_T.copy()
        return given
    assert request.seeds is not None, "a request has seeds or x_T"
    return sample_noise(network, request.seeds, Stream.INITIAL)


class StageNoise:
    """The step noise `[B, num_elements]` of each stage of a loop, drawn many stages at a time.

    A few large array operations cost a fraction of many small ones; memory stays below `max_elements` numbers, or one
    stage where that is more.
    """

    def __init__(
        self, seeds: NDArray[np.uint64], num_elements: int, num_stages: int, *, max_elements: int = 1 << 17
    ) -> None:
        self._seeds, self._num_elements, self._num_stages = seeds, num_elements, num_stages
        self._stages_at_once = max(1, max_elements // (len(seeds) * num_elements))
        self._drawn = range(0)
        self._normals = np.empty((0, len(seeds), num_elements), np.float32)

    def __call__(self, stage: int) -> NDArray[np.float32]:
        if stage not in self._drawn:
            self._drawn = range(stage, min(stage + self._stages_at_once, self._num_stages))
            self._normals = standard_normal(self._seeds, self._num_elements, stage=self._drawn, stream=Stream.STEP)
        drawn: NDArray[np.float32] = self._normals[stage - self._drawn.start]
        return drawn


def _box_muller(
    radial: NDArray[np.uint32], angular: NDArray[np.uint32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    r = np.sqrt(np.float32(-2.0) * _ln_uniform(radial))
    cos, sin = _cos_sin_turns(angular)
    return r * cos, r * sin


def _ln_uniform(word: NDArray[np.uint32]) -> NDArray[np.float32]:
    """ln(u) for u = word/2^32 + 2^-33 in (0, 1], rounded to float32: never ln(0), tails to 6.7 sigma."""
    u = word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    bits = u.view(np.int32)
    exponent = (bits - np.int32(SQRT_HALF_BITS)) >> np.int32(23)
    f = (bits - (exponent << np.int32(23))).view(np.float32) - np.float32(1.0)
    e = exponent.astype(np.float32)
    ln: NDArray[np.float32] = (f * _horner(LN_COEFFICIENTS, f) + e * np.float32(LN2_LOW)) + e * np.float32(LN2_HIGH)
    return ln


def _cos_sin_turns(word: NDArray[np.uint32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of word/2^32 turns: the nearest quarter turn by integer arithmetic, the rest by polynomials."""
    quarter = (word + np.uint32(1 << 29)) >> np.uint32(30)
    rest = (word - (quarter << np.uint32(30))).view(np.int32).astype(np.float32)
    y = rest * np.float32(RADIANS_PER_UNIT)
    square = y * y
    sin, cos = y * _horner(SIN_COEFFICIENTS, square), _horner(COS_COEFFICIENTS, square)
    odd = (quarter & np.uint32(1)).astype(bool)
    sign = np.uint32(31)
    cos_out = np.where(odd, sin, cos).view(np.uint32) ^ (
        (((quarter + np.uint32(1)) >> np.uint32(1)) & np.uint32(1)) << sign
    )
    sin_out = np.where(odd, cos, sin).view(np.uint32) ^ ((quarter >> np.uint32(1)) << sign)
    return cos_out.view(np.float32), sin_out.view(np.float32)


def _horner(coefficients: tuple[float, ...], x: NDArray[np.float32]) -> NDArray[np.float32]:
    value = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value *= x
        value += np.float32(coefficient)
    return value
