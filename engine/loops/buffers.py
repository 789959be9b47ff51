"""Named tensors in one piece of device memory, so that whatever a call brings travels in one copy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.backends.denoiser import DeviceDenoiser
from skipstep.cuda.device import Device, Event

# The alignment that TensorRT requires of an address, and more than the widest access of any kernel.
_ALIGNMENT = 256
_MAX_FREE = 4
View = TypeVar("View")


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


@dataclass(frozen=True, slots=True)
class Piece(Generic[View]):
    """Host memory for one copy to or from the device, and how it is read and written."""

    memory: Tensor
    view: View


class Staging(Generic[View]):
    """Pieces of `num_bytes`, kept: to pin memory takes longer than a short loop, and torch's own cache of it is emptied
    by every recording. A piece is taken, used by one copy, and comes back when that copy is done."""

    def __init__(self, device: Device, num_bytes: int, view: Callable[[Tensor], View]) -> None:
        self._device, self._num_bytes, self._view = device, num_bytes, view
        self._free = [self._new()]
        self._copying: deque[tuple[Event, Piece[View]]] = deque()

    def _new(self) -> Piece[View]:
        memory = self._device.staging(self._num_bytes)
        return Piece(memory, self._view(memory))

    def take(self) -> Piece[View]:
        while self._copying and self._copying[0][0].query():
            self.give_back(self._copying.popleft()[1])
        return self._free.pop() if self._free else self._new()

    def give_back(self, piece: Piece[View], *, after: Event | None = None) -> None:
        """`after`: the copy that still uses it."""
        if after is not None:
            self._copying.append((after, piece))
        elif len(self._free) < _MAX_FREE:
            self._free.append(piece)


class Block:
    """`tensors` by name, of the given shapes and dtypes, at addresses that never move; zeros until they are filled."""

    def __init__(self, device: Device, fields: Mapping[str, Field]) -> None:
        self._device = device
        self._fields = fields
        size = sum(_aligned(each.shape[0] * each.pitch) for each in fields.values())
        self._memory = device.zeros((size,), torch.uint8)
        self.tensors = self._views(self._memory)
        self._staging = Staging(
            device, size, lambda memory: {name: _writable(view) for name, view in self._views(memory).items()}
        )

    def fill(self, values: Mapping[str, Any]) -> None:
        """Enqueue a copy of all `values` (NumPy arrays or numbers, by name; what has none is zero) on the engine's
        stream."""
        piece, stream = self._staging.take(), self._device.stream
        for name, view in piece.view.items():
            value = values.get(name)
            if isinstance(view, np.ndarray):
                view[...] = 0 if value is None else value
            elif value is None:
                view.zero_()
            else:
                view.copy_(torch.from_numpy(np.require(value, requirements="W")))
        stream.run(lambda: self._memory.copy_(piece.memory, non_blocking=True))
        self._staging.give_back(piece, after=stream.record())

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        views = {}
        start = 0
        for name, each in self._fields.items():
            rows = memory[start : start + each.shape[0] * each.pitch].view(each.dtype).view(each.shape[0], -1)
            views[name] = rows[:, : math.prod(each.shape[1:])].view(each.shape)
            start += _aligned(each.shape[0] * each.pitch)
        return views


def step_input_fields(denoiser: DeviceDenoiser, num_stages: int) -> dict[str, Field]:
    """The step inputs of so many stages; where every stage has its own, its rows begin at aligned addresses."""
    return {
        name: Field(
            (*((num_stages,) if each.per_stage else ()), denoiser.batch_size, *each.shape),
            getattr(torch, each.dtype),
            each.per_stage,
        )
        for name, each in denoiser.step_inputs.items()
    }


def floats(shape: tuple[int, ...]) -> Callable[[Tensor], NDArray[np.float32]]:
    """Memory as an array float32 of that shape."""
    return lambda memory: memory.view(torch.float32).view(shape).numpy()


def _writable(view: Tensor) -> NDArray[Any] | Tensor:
    """NumPy writes a few numbers in a tenth of the time that torch takes; it has no bfloat16."""
    return view if view.dtype == torch.bfloat16 else view.numpy()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
