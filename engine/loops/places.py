"""The memory of samples that share evaluations on a GPU (skipstep.loops.mixed): a place for each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from skipstep.backends.denoiser import DeviceDenoiser
from skipstep.calls.request import SampleRequest
from skipstep.cuda.device import Device
from skipstep.errors import DeviceMemoryError
from skipstep.kernels.layout import NUM_COLUMNS, NUM_SLOTS
from skipstep.kernels.step import initial_noise
from skipstep.loops.buffers import Field, StagedBlock, is_channels_last, state_zeros
from skipstep.networks.graphs import StepInputs
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

# Rows of the network that a sample has at most: with the condition, and without.
COPIES = 2
# What no request brings.
_OWN = ("x0", "history")


class Places:
    """Memory for `count` samples of up to `num_stages` evaluations. All methods want the engine's lock.

    `tensors` by name, their first dimension is the place; the network's step inputs (`step_input`) are `[count,
    num_stages, COPIES, …]`, or `[count, COPIES, …]` where all stages share them. `free`: the places without a sample.
    `denoiser`: a network that reads them.
    """

    def __init__(
        self, device: Device, network: NetworkSpec, denoiser: DeviceDenoiser, count: int, num_stages: int
    ) -> None:
        self._device, self._network, self._denoiser = device, network, denoiser
        self._step_inputs, last = denoiser.step_inputs, is_channels_last(denoiser)
        self.count, self.num_stages = count, num_stages
        self.free = list(range(count))

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return device.zeros((count, *shape), dtype)

        try:
            self.tensors = {
                "state": state_zeros(device, (count, *network.sample_shape), channels_last=last),
                "x0": state_zeros(device, (count, *network.sample_shape), channels_last=last),
                "history": zeros(NUM_SLOTS, *network.sample_shape),
                "table": zeros(num_stages, NUM_COLUMNS),
                "seeds": zeros(dtype=torch.int64),
                "guidance": zeros(),
                "rescale": zeros(),
            }
            for name, each in self._step_inputs.items():
                stages = (num_stages,) if each.per_stage else ()
                self.tensors[_key(name)] = zeros(*stages, COPIES, *each.shape, dtype=getattr(torch, each.dtype))
            # What one request brings, in one copy to the device, from where its parts go to their place.
            brought = {name: each for name, each in self.tensors.items() if name not in _OWN}
            self._landing = StagedBlock(
                device, {name: Field((1, *each.shape[1:]), each.dtype) for name, each in brought.items()}
            )
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                got=f"{device.free_bytes() / 2**20:.0f} MiB free for {count} samples of {num_stages} evaluations",
                expected="more: each keeps its state and what the network reads at every stage",
                remedy="make the batcher with a smaller max_batch, use plans of fewer steps, or free memory",
            ) from error
        device.stream.follow(device.caller_stream())

    def step_input(self, name: str) -> Tensor:
        return self.tensors[_key(name)]

    def put(self, stages: Stages, request: SampleRequest, values: StepInputs) -> int:
        """Enqueue what a request of one sample brings; its place, which must be there."""
        place = self.free.pop()
        # What lies behind the last stage and the last copy is never read.
        stage = np.minimum(np.arange(self.num_stages), len(stages) - 1)
        copies = np.minimum(np.arange(COPIES), request.num_copies - 1)
        brought = {
            "state": 0.0 if request.x_T is None else request.x_T,
            "table": stages.table[stage][None, :, 0],
            "seeds": 0 if request.seeds is None else request.seeds.view(np.int64),
            "guidance": 1.0 if request.guidance is None else request.guidance,
            "rescale": 0.0 if request.rescale is None else request.rescale,
        }
        for name, each in self._step_inputs.items():
            expanded = values.expanded(name)
            brought[_key(name)] = (expanded[stage][:, copies] if each.per_stage else expanded[copies])[None]
        self._landing.fill(brought)

        def work() -> None:
            here = {name: each[place : place + 1] for name, each in self.tensors.items()}
            for name, landed in self._landing.tensors.items():
                here[name].copy_(landed)
            here["history"].zero_()
            if request.x_T is None:
                # The noise goes to the network's input as well; here to x0, which is not yet there.
                initial_noise(state=here["state"], network_input=here["x0"], seeds=here["seeds"])

        self._device.stream.run(work)
        return place

    def grown(self, num_stages: int) -> Places:
        """With all that is kept here, and twice the room in which it lacked some: places, or stages."""
        count = self.count if self.free else 2 * self.count
        stages = self.num_stages if num_stages <= self.num_stages else max(num_stages, 2 * self.num_stages)
        larger = Places(self._device, self._network, self._denoiser, count, stages)
        larger.free = [*self.free, *range(self.count, count)]

        def work() -> None:
            for name, old in self.tensors.items():
                new = larger.tensors[name][: self.count]
                (new if new.shape == old.shape else new[:, : self.num_stages]).copy_(old)

        self._device.stream.run(work)
        self._device.stream.record().synchronize()  # Before this memory is released.
        return larger


def _key(name: str) -> str:
    """The network names its inputs, and may name one as a field of ours."""
    return f"input {name}"
