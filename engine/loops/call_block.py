"""What a call brings to the device and takes from it, in one block: one copy in, one copy out.

    seeds, guidance, rescale   of each sample
    given, counter             where to begin, and which stage comes next
    …                          the network's step inputs that all stages share
    broken                     since which stage a sample is not finite       ┐ copied out
    state                      float32: x_T where the call brings it, x_0     ┘

In host memory it is one pinned buffer for each call under way, kept with its views and its event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.calls.request import SampleRequest
from skipstep.cuda.device import Device, Event
from skipstep.loops.buffers import Block, Field, Staging, write

# No stage has broken a sample.
_SOUND = np.iinfo(np.int32).max


@dataclass(slots=True)
class HostCall:
    """The block of one call in host memory: `views` by field, and the bytes that are copied.

    `state_given`: the state is copied in with the rest. `shared`: the step inputs that were written last. `done`: the
    event after the last call, to be recorded again.
    """

    memory: Tensor
    views: Mapping[str, Any]
    inputs: Tensor
    results: Tensor
    broken: Tensor
    state_given: bool = False
    shared: Mapping[str, NDArray[Any]] | None = None
    done: Event | None = None


class CallBlock(Block):
    """The block of B = `count` samples; `step_inputs` are those that all stages share. `channels_last`: the order of
    the state in memory, on the device and in host memory; calls bring and take samples in any."""

    def __init__(
        self,
        device: Device,
        count: int,
        sample_shape: tuple[int, ...],
        step_inputs: Mapping[str, Field],
        *,
        channels_last: bool = False,
    ) -> None:
        fields = {
            "seeds": Field((count,), torch.int64),
            "guidance": Field((count,), torch.float32),
            "rescale": Field((count,), torch.float32),
            "given": Field((1,), torch.int32),
            "counter": Field((1,), torch.int32),
            **step_inputs,
            "broken": Field((count,), torch.int32),
            "state": Field((count, *sample_shape), torch.float32, channels_last=channels_last),
        }
        super().__init__(device, fields)
        self._here = self._host_call(self.memory, {})
        self._staging = Staging(device, len(self.memory), self._new_host_call)

    def take(self, request: SampleRequest, shared: Mapping[str, NDArray[Any]]) -> HostCall:
        """Host memory with what a request brings, and the step inputs that stages share. A device x_T is not among it,
        but goes to the state on its own."""
        call = self._staging.take()
        views = call.views
        if call.shared is not shared:
            for name, value in shared.items():
                write(views[name], value)
            call.shared = shared
        # torch has no arithmetic on uint64; the kernels read the same 64 bits.
        views["seeds"][...] = 0 if request.seeds is None else request.seeds.view(np.int64)
        if request.guidance is not None:
            views["guidance"][...] = request.guidance
        if request.rescale is not None:
            views["rescale"][...] = request.rescale
        views["broken"][...] = _SOUND
        views["given"][...] = request.x_T is not None
        call.state_given = isinstance(request.x_T, np.ndarray)
        if call.state_given:
            views["state"][...] = request.x_T
        return call

    def give_back(self, call: HostCall) -> None:
        """When its copies are done."""
        self._staging.give_back(call)

    def copy_in(self, call: HostCall) -> None:
        """Launch the one copy of what a call brings."""
        if call.state_given:
            self.memory.copy_(call.memory, non_blocking=True)
        else:
            self._here.inputs.copy_(call.inputs, non_blocking=True)

    def copy_out(self, call: HostCall, out: Any) -> None:
        """Launch the copy of the results; the first samples go to `out` where that is on the device."""
        if self.is_here(out):
            call.broken.copy_(self._here.broken, non_blocking=True)
            out.copy_(self.tensors["state"][: len(out)], non_blocking=True)
        else:
            call.results.copy_(self._here.results, non_blocking=True)

    def is_here(self, out: Any) -> bool:
        return isinstance(out, Tensor) and out.device == self.memory.device

    def _host_call(self, memory: Tensor, views: Mapping[str, Any]) -> HostCall:
        broken, state = self.starts["broken"], self.starts["state"]
        return HostCall(memory, views, memory[:state], memory[broken:], memory[broken:state])

    def _new_host_call(self, memory: Tensor) -> HostCall:
        memory.zero_()
        return self._host_call(memory, self.host_views(memory))


@dataclass(frozen=True, slots=True)
class PendingSamples:
    """Samples on their way to `out`, NumPy or a tensor, through `call` if that is not on the device."""

    block: CallBlock
    call: HostCall
    done: Event
    out: Any

    def wait(self) -> dict[int, int | None]:
        """Return when the samples have arrived: which are not finite, and since which stage. Call it once."""
        self.done.synchronize()
        out, views = self.out, self.call.views
        count = len(out)
        if not self.block.is_here(out):
            samples = views["state"][:count]
            out[...] = samples if isinstance(out, np.ndarray) else torch.from_numpy(samples)
        stages = views["broken"][:count].tolist()
        self.block.give_back(self.call)
        return {sample: stage for sample, stage in enumerate(stages) if stage != _SOUND}
