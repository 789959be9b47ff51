"""Named tensors in one piece of device memory, so that whatever a call brings travels in one copy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
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
Piece = TypeVar("Piece")


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor of a block. `padded`: each of its rows begins at an aligned address. `channels_last`: of images."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    padded: bool = False
    channels_last: bool = False

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return _aligned(row) if self.padded else row


class Staging(Generic[Piece]):
    """What is made of `num_bytes` of host memory, kept: to pin memory takes longer than a short loop, and torch's own
    cache of it is emptied by every recording. A piece is taken, used by copies, and comes back when those are done."""

    def __init__(self, device: Device, num_bytes: int, make: Callable[[Tensor], Piece]) -> None:
        self._device, self._num_bytes, self._make = device, num_bytes, make
        self._free = [self._new()]
        self._copying: deque[tuple[Event, Piece]] = deque()

    def _new(self) -> Piece:
        return self._make(self._device.staging(self._num_bytes))

    def take(self) -> Piece:
        while self._copying and self._copying[0][0].query():
            self.give_back(self._copying.popleft()[1])
        return self._free.pop() if self._free else self._new()

    def give_back(self, piece: Piece, *, after: Event | None = None) -> None:
        """`after`: the copy that still uses it."""
        if after is not None:
            self._copying.append((after, piece))
        elif len(self._free) < _MAX_FREE:
            self._free.append(piece)


class Block:
    """`tensors` by name, of the given shapes and dtypes, at addresses that never move; zeros until they are filled.

    They lie in `memory` in their order, each from its `starts` on.
    """

    def __init__(self, device: Device, fields: Mapping[str, Field]) -> None:
        self._fields = fields
        sizes = [_aligned(each.shape[0] * each.pitch) for each in fields.values()]
        self.starts = dict(zip(fields, accumulate(sizes, initial=0), strict=False))
        self.memory = device.zeros((sum(sizes),), torch.uint8)
        self.tensors = self._views(self.memory)

    def host_views(self, memory: Tensor) -> dict[str, NDArray[Any] | Tensor]:
        """The same fields in host memory of the same size."""
        return {name: _writable(view) for name, view in self._views(memory).items()}

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        views = {}
        for name, each in self._fields.items():
            start = self.starts[name]
            rows = memory[start : start + each.shape[0] * each.pitch].view(each.dtype).view(each.shape[0], -1)
            values, (count, *shape) = rows[:, : math.prod(each.shape[1:])], each.shape
            if each.channels_last:
                views[name] = values.view(count, *shape[1:], shape[0]).movedim(-1, 1)
            else:
                views[name] = values.view(each.shape)
        return views


class StagedBlock(Block):
    """A block that is filled as a whole."""

    def __init__(self, device: Device, fields: Mapping[str, Field]) -> None:
        super().__init__(device, fields)
        self._stream = device.stream
        self._staging = Staging(device, len(self.memory), lambda memory: (memory, self.host_views(memory)))

    def fill(self, values: Mapping[str, Any]) -> None:
        """Enqueue a copy of `values` (NumPy arrays or numbers) of all fields on the engine's stream."""
        piece = memory, views = self._staging.take()
        for name, view in views.items():
            write(view, values[name])
        self._stream.run(lambda: self.memory.copy_(memory, non_blocking=True))
        self._staging.give_back(piece, after=self._stream.record())


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


def is_channels_last(denoiser: DeviceDenoiser) -> bool:
    """Whether it reads and writes images in channels-last order; the state is then kept in that order."""
    return not (denoiser.input.is_contiguous() and denoiser.output.is_contiguous())


def state_zeros(device: Device, shape: tuple[int, ...], *, channels_last: bool) -> Tensor:
    zeros = device.zeros(shape, torch.float32)
    return zeros.to(memory_format=torch.channels_last) if channels_last else zeros


def write(view: NDArray[Any] | Tensor, value: Any) -> None:
    """Write a NumPy array or a number to host memory."""
    if isinstance(view, np.ndarray):
        view[...] = value
    else:
        view.copy_(torch.from_numpy(np.require(value, requirements="W")))


def _writable(view: Tensor) -> NDArray[Any] | Tensor:
    """NumPy writes a few numbers in a tenth of the time that torch takes; it has no bfloat16."""
    return view if view.dtype == torch.bfloat16 else view.numpy()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
