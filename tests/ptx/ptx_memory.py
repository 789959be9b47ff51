"""Memory of a launch: every access is within a buffer and aligned, and no two threads disagree about who goes first.

A buffer's address tells which it is, so a pointer that runs out of its buffer meets no other. Threads of a block are
ordered by barriers alone, threads of different blocks by nothing: a location that one thread writes and another reads
or writes in between is a race, whatever the hardware happened to do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHIFT = 40
GRANULE = 2
SHARED = 0
_NOBODY, _SEVERAL = -1, -2


class AccessError(AssertionError):
    """An access that no correct kernel makes."""


class Buffer:
    """Bytes, and for each pair of them who wrote and read it last, and when."""

    def __init__(self, name: str, data: NDArray[np.uint8]) -> None:
        self.name, self.data = name, data
        self.writer, self.reader = (np.full(data.size // GRANULE, _NOBODY, np.int64) for _ in range(2))
        self.written, self.read = (np.zeros(data.size // GRANULE, np.int64) for _ in range(2))


class Memory:
    """Buffers by number; number SHARED holds the shared memory of all blocks, one after the other."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(self, name: str, data: NDArray[np.uint8]) -> int:
        """The address of its first byte. An empty buffer is one that must not be touched."""
        assert data.size % GRANULE == 0
        self.buffers.append(Buffer(name, data))
        return (len(self.buffers) - 1) << SHIFT

    def load(self, address: NDArray[Any], size: int, count: int, threads: NDArray[Any], stamp: NDArray[Any]) -> Any:
        """`count` values of `size` bytes at each address, `[count, lanes]` of unsigned integers."""
        buffer, places = self._places(address, size, count)
        for granule in self._granules(places, size, count):
            other = (buffer.writer[granule] != threads) & (buffer.writer[granule] >= 0)
            self._refuse(buffer, granule, other & _unordered(buffer.written[granule], stamp), "read what another wrote")
            known = (buffer.reader[granule] == threads) | (buffer.reader[granule] == _NOBODY)
            fresh = ~_unordered(buffer.read[granule], stamp)
            buffer.reader[granule] = np.where(known | fresh, threads, _SEVERAL)
            buffer.read[granule] = stamp
        view = buffer.data.view(f"u{size}")
        return np.stack([view[places + k] for k in range(count)])

    def store(self, address: NDArray[Any], size: int, values: Any, threads: NDArray[Any], stamp: NDArray[Any]) -> None:
        buffer, places = self._places(address, size, len(values))
        for granule in self._granules(places, size, len(values)):
            for owner, when in ((buffer.writer, buffer.written), (buffer.reader, buffer.read)):
                other = (owner[granule] != threads) & (owner[granule] != _NOBODY)
                what = "wrote what another read or wrote"
                self._refuse(buffer, granule, other & _unordered(when[granule], stamp), what)
            buffer.writer[granule], buffer.written[granule] = threads, stamp
        view = buffer.data.view(f"u{size}")
        for k, value in enumerate(values):
            view[places + k] = value
            self._refuse(buffer, places, view[places + k] != value, "wrote different values at once")

    def reduce_min(self, address: NDArray[Any], values: NDArray[np.int32]) -> None:
        """Atomic: it needs no order."""
        buffer, places = self._places(address, 4, 1)
        np.minimum.at(buffer.data.view(np.int32), places, values)

    def _places(self, address: NDArray[Any], size: int, count: int) -> tuple[Buffer, NDArray[np.int64]]:
        numbers = address.astype(np.int64) >> SHIFT
        number = int(numbers[0])
        if not 0 <= number < len(self.buffers) or (numbers != number).any():
            raise AccessError(f"addresses in no buffer, or in several: {np.unique(numbers)[:4]}")
        buffer, offset = self.buffers[number], address.astype(np.int64) & ((1 << SHIFT) - 1)
        if (offset % (size * count)).any():
            raise AccessError(f"an access of {size * count} bytes that is not aligned, in {buffer.name}")
        if (offset + size * count > buffer.data.size).any():
            raise AccessError(f"offset {offset.max()} of {buffer.data.size} bytes in {buffer.name}")
        return buffer, offset // size

    @staticmethod
    def _granules(places: NDArray[np.int64], size: int, count: int) -> list[NDArray[np.int64]]:
        each = max(1, size // GRANULE)
        return [places * size // GRANULE + k for k in range(each * count)]

    @staticmethod
    def _refuse(buffer: Buffer, place: NDArray[np.int64], wrong: NDArray[np.bool_], what: str) -> None:
        if wrong.any():
            raise AccessError(f"{what}, without a barrier between: {buffer.name}, at {place[wrong][0]}")


def _unordered(earlier: NDArray[np.int64], now: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Stamps are a block's number and its epoch: of another block, or of the same epoch."""
    return (earlier >> 32 != now >> 32) | (earlier == now)
