"""The normal numbers of a seeded torch.Generator on the CPU, without torch: the noise of diffusers' pipelines.

A Mersenne Twister (Matsumoto and Nishimura 1998) seeded by its low 32 bits; 24 bits of each word are a uniform number,
and in each block of 16 those of the first half are the radii and those of the second the angles of eight Box-Muller
pairs. torch's vectorised logarithm and cosine differ from NumPy's in the last bits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError

_BLOCK = 16


class TorchNoise:
    """One generator for each seed, uint64 `[B]`. Each call of `normals` continues where the last one ended."""

    def __init__(self, seeds: NDArray[np.uint64]) -> None:
        # RandomState and not default_rng: its seeding of a single number is the Twister's own.
        self._generators = [np.random.RandomState(int(seed) & 0xFFFFFFFF) for seed in seeds]

    def normals(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Float32 `[B, *shape]`, row by row torch.randn(1, *shape, generator=…). Raises InputError below 16 numbers,
        which torch draws in another way."""
        count = math.prod(shape)
        if count < _BLOCK:
            raise InputError(
                got=f"noise='torch' for {count} numbers a sample",
                expected=f"at least {_BLOCK}",
                remedy="leave noise out, or pass x_T",
            )
        return np.stack([_normals(each, count) for each in self._generators]).reshape(-1, *shape)


def _normals(generator: np.random.RandomState, count: int) -> NDArray[np.float32]:
    uniform = _uniform(generator, count)
    whole = count // _BLOCK * _BLOCK
    uniform[:whole] = _box_muller(uniform[:whole])
    if whole < count:  # The last block overlaps the one before, with numbers of its own.
        uniform[-_BLOCK:] = _box_muller(_uniform(generator, _BLOCK))
    return uniform


def _uniform(generator: np.random.RandomState, count: int) -> NDArray[np.float32]:
    words = generator.randint(0, 1 << 32, count, dtype=np.uint32)
    return (words & np.uint32((1 << 24) - 1)).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    halves = uniform.reshape(-1, 2, _BLOCK // 2)
    radii = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - halves[:, 0]))
    angles = np.float32(2.0 * math.pi) * halves[:, 1]
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1).reshape(-1)
