"""A TensorRT engine in the memory of torch's device (skipstep.backends.tensorrt_engine)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skipstep.backends.denoiser import Keep, Library
from skipstep.backends.tensorrt_engine import ALIGNMENT, TensorRtEngine
from skipstep.backends.tensorrt_library import load_library
from skipstep.cuda.probe import cuda_device

if TYPE_CHECKING:
    import tensorrt_rtx as trt


class LoadedEngine(TensorRtEngine):
    """Raises MissingDependencyError, DeviceUnavailableError, and RefusedEngineError for an engine that the library
    does not take."""

    def __init__(
        self,
        data: bytes,
        *,
        library: Library,
        device: torch.device,
        keep: Keep | None = None,
        graph: Callable[[], bytes] | None = None,
    ) -> None:
        number = device.index or 0
        super().__init__(
            data,
            library=library,
            module=load_library(library, number),
            device=device,
            facts=lambda: cuda_device(number),
            current=lambda: torch.cuda.device(device),
            keep=keep,
            graph=graph,
        )
        self.device = device
        self.activations = aligned_zeros((self.activation_bytes,), torch.uint8, device)
        # Apart from the default stream, which cannot be recorded.
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def new_context(self, batch_size: int) -> trt.IExecutionContext:
        """A context at this batch size, on the memory of all: what it still has to do is enqueued on `stream`."""
        return self.context(batch_size, self.activations.data_ptr(), self.stream.cuda_stream)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


def aligned_zeros(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros at an address that the libraries accept, whatever the allocator's own alignment is."""
    shape = tuple(shape)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = torch.zeros(num_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).view(shape)
