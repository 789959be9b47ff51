"""Named tensors in one piece of device memory, so that whatever a call brings travels in one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipstep.cuda.device import Device

# The alignment that TensorRT requires of an address, and more than the widest access of any kernel.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor of a block. `padded`: each of its rows begins at an aligned address."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    padded: bool = False

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return _aligned(row) if self.padded else row


class Block:
    """`tensors` by name, of the given shapes and dtypes, at addresses that never move; zeros until they are filled."""

    def __init__(self, device: Device, fields: Mapping[str, Field]) -> None:
        self._device = device
        self._fields = fields
        size = sum(_aligned(each.shape[0] * each.pitch) for each in fields.values())
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device.torch_device)
        self.tensors = self._views(self._memory)

    def fill(self, values: Mapping[str, Any]) -> None:
        """Enqueue a copy of all `values` (NumPy arrays, by name; what has none is zero) on the engine's stream."""
        staging = self._device.staging(len(self._memory))
        for name, view in self._views(staging).items():
            value = values.get(name)
            if value is None:
                view.zero_()
            else:
                view.copy_(torch.from_numpy(np.require(value, requirements="W")))
        self._device.stream.run(lambda: self._memory.copy_(staging, non_blocking=True))

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        views = {}
        start = 0
        for name, each in self._fields.items():
            rows = memory[start : start + each.shape[0] * each.pitch].view(each.dtype).view(each.shape[0], -1)
            views[name] = rows[:, : math.prod(each.shape[1:])].view(each.shape)
            start += _aligned(each.shape[0] * each.pitch)
        return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
