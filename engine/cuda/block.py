"""Named tensors in one piece of device memory, so that whatever a call brings travels in one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipstep.cuda.device import Device

# What the widest access of any kernel may assume of an address.
_ALIGNMENT = 256


class Block:
    """`tensors` by name, of the given shapes and dtypes, at addresses that never move; zeros until they are filled."""

    def __init__(self, device: Device, fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._device = device
        self._places: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, (shape, dtype) in fields.items():
            num_bytes = math.prod(shape) * dtype.itemsize
            self._places[name] = (end, num_bytes, shape, dtype)
            end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = torch.zeros(end, dtype=torch.uint8, device=device.torch_device)
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
        return {
            name: memory[start : start + num_bytes].view(dtype).view(shape)
            for name, (start, num_bytes, shape, dtype) in self._places.items()
        }
