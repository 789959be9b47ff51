"""A step network as a TensorRT engine, on memory of the driver's (skipstep.backends.denoiser.Denoiser).

As skipstep.backends.tensorrt does it with torch: fixed buffers, the rows of a stage read where they stand, one context
for each recorded graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.denoiser import Enqueue, StepInput
from skipstep.backends.device_step import HostInputs, check_step_tensors
from skipstep.backends.early import EarlyParts
from skipstep.backends.tensorrt_engine import TensorRtEngine
from skipstep.calls.conditioning import Conditioning
from skipstep.cuda.driver import DeviceBuffer
from skipstep.cuda.queue import Queue
from skipstep.edge.step_binary import ITEM_SIZES
from skipstep.errors import ExportError
from skipstep.networks.graphs import PREDICTION, SAMPLE, StepInputs
from skipstep.networks.spec import NetworkSpec


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """A step input on the device: where stage 0 has it, and how many bytes on the next stage; 0 where all share it."""

    address: int
    pitch: int = 0


class EdgeNetwork:
    """An engine at one of its batch sizes; `activations` are of its `activation_bytes`, shared by all sizes.

    Raises ExportError for an engine that is not this network's, or does not run.
    """

    def __init__(
        self,
        engine: TensorRtEngine,
        activations: DeviceBuffer,
        early: EarlyParts,
        spec: NetworkSpec,
        queue: Queue,
        *,
        batch_size: int,
        releases: ExitStack,
    ) -> None:
        self.name: str = engine.library
        self.batch_size = batch_size
        self._engine, self._queue, self._activations = engine, queue, activations
        inputs, outputs = engine.tensors(batch_size)
        check_step_tensors(inputs, outputs, spec, batch_size=batch_size, of=f"an engine of {engine.library}")
        self.dtype = inputs[SAMPLE].dtype
        item = ITEM_SIZES[self.dtype]
        self.input, self.output = (
            queue.zeros(item * math.prod(each.shape), releases) for each in (inputs.pop(SAMPLE), outputs[PREDICTION])
        )
        self._inputs = HostInputs(early, spec, inputs, batch_size=batch_size)
        self.step_inputs: Mapping[str, StepInput] = self._inputs.step_inputs

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        return self._inputs.compute(timesteps, conditioning)

    def new_context(self) -> Enqueue:
        """`enqueue(rows by name, stage)`. A first run may take memory: let it run once before it is recorded. Raises
        ExportError where the library makes no context, or none that can be recorded."""
        # The library uses the thread's current device.
        current = self._queue.driver.current
        with current():
            context = self._engine.context(self.batch_size, self._activations.address, self._queue.handle)
            # Full TensorRT has no such question, and records whatever does not choose shapes while it runs.
            kernels = self._engine.kernels
            capturable = kernels is None or context.is_stream_capturable(self._queue.handle)
            if kernels is not None:
                kernels.save()
        if not capturable:
            raise ExportError(
                got="an engine of TensorRT-RTX that takes memory while it runs",
                expected="one that can be recorded",
                remedy="build it again with skipstep build, or skipstep export",
            )
        point = _pointer(self._engine, context.set_tensor_address)
        point(SAMPLE, self.input.address)
        point(PREDICTION, self.output.address)

        def enqueue(values: Mapping[str, DeviceRows], stage: int) -> None:
            for name in self.step_inputs:
                rows = values[name]
                point(name, rows.address + stage * rows.pitch)
            # What it runs beside this stream it forks off and joins by events, which a recording follows.
            with current():
                launched = context.execute_async_v3(self._queue.handle)
            if not launched:
                raise self._engine.failed("that does not launch")

        return enqueue


def _pointer(engine: TensorRtEngine, set_address: Callable[[str, int], bool]) -> Callable[[str, int], None]:
    """Sets an address of a tensor where it is another than before."""
    addresses: dict[str, int] = {}

    def point(name: str, address: int) -> None:
        if addresses.get(name) != address:
            if not set_address(name, address):
                raise engine.failed(f"that has no place for {name}")
            addresses[name] = address

    return point
