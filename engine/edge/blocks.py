"""Named arrays in one piece of device memory, written on the host and copied as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.cuda.driver import DeviceBuffer
from skipstep.cuda.queue import Pinned, Queue

# What TensorRT asks of an address, and more than any kernel does.
_ALIGNMENT: Final = 256
# NumPy has no bfloat16: its bits stand in 16 bits.
_STORED: Final[Mapping[str, str]] = {"bfloat16": "uint16"}


@dataclass(frozen=True, slots=True)
class Field:
    """An array of a block, `dtype` by name. `padded`: each of its rows begins at an aligned address."""

    shape: tuple[int, ...]
    dtype: str
    padded: bool = False

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype(_STORED.get(self.dtype, self.dtype))

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.stored.itemsize

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next."""
        return _aligned(self.row_bytes) if self.padded else self.row_bytes


class Block:
    """`fields` in their order in `memory`, each from its `starts` on, zeros at first."""

    def __init__(self, queue: Queue, fields: Mapping[str, Field], releases: ExitStack) -> None:
        self.fields = fields
        sizes = [_aligned(each.shape[0] * each.pitch) for each in fields.values()]
        self.starts = dict(zip(fields, accumulate(sizes, initial=0), strict=False))
        self.memory = queue.zeros(sum(sizes), releases)

    def part(self, name: str) -> DeviceBuffer:
        each = self.fields[name]
        return self.memory.part(self.starts[name], each.shape[0] * each.pitch)

    def view(self, memory: Pinned, name: str) -> NDArray[Any]:
        """A field in host memory of the block's size."""
        each = self.fields[name]
        item = each.stored.itemsize
        inner = [item * math.prod(each.shape[axis + 1 :]) for axis in range(1, len(each.shape))]
        strides = (each.pitch, *inner)
        return np.ndarray(each.shape, each.stored, memory.bytes.data, self.starts[name], strides)

    def write(self, memory: Pinned, name: str, value: Any) -> None:
        """A NumPy array or a number, rounded to the field's dtype."""
        if self.fields[name].dtype == "bfloat16":
            value = bfloat16_bits(value)
        self.view(memory, name)[...] = value


def bfloat16_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Rounded to the nearest, ties to even, as devices do; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(bits.view(np.float32)), quiet, rounded).astype(np.uint16)


def as_floats(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """What the bits of a network's output mean."""
    if dtype != "bfloat16":
        return values.view(dtype)
    return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
