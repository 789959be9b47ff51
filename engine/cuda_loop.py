"""The stepwise loop on a GPU: the same walk as skipstep.loop, with the Triton kernel as the step.

Everything that the loop reads is on the device before it starts, and the host waits once, for the result.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.backends import Denoiser
from skipstep.conditioning import call_conditioning
from skipstep.kernels.statistics import sample_statistics
from skipstep.kernels.step import ddim_step, initial_noise
from skipstep.loop import Array, Run, call_flags, replicate, run_stepwise
from skipstep.network import NetworkSpec
from skipstep.request import SampleRequest
from skipstep.stages import Stages


class CudaLoop:
    """One network at one batch size on `device`. One call at a time; it runs on the caller's current stream."""

    name = "stepwise"
    can_observe = True

    def __init__(self, denoiser: Denoiser, network: NetworkSpec, device: torch.device) -> None:
        self.denoiser = denoiser
        self._network = network
        self._device = device
        self._lock = threading.Lock()

    def prepare(self, stages: Sequence[Stages]) -> None:
        """The kernels are compiled when they are first launched."""

    def run(self, stages: Stages, request: SampleRequest) -> Array:
        return run_stepwise(self, stages, request)

    @contextlib.contextmanager
    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> Iterator[Run]:
        with self._lock, torch.cuda.device(self._device):
            yield CudaRun(self.denoiser, self._network, self._device, stages, request, keep_x0=keep_x0)


class CudaRun:
    def __init__(
        self,
        denoiser: Denoiser,
        network: NetworkSpec,
        device: torch.device,
        stages: Stages,
        request: SampleRequest,
        *,
        keep_x0: bool,
    ) -> None:
        def upload(array: NDArray[np.float32] | None) -> Tensor | None:
            return None if array is None else torch.tensor(array, device=device)

        self._denoiser = denoiser
        self._flags = call_flags(network, stages, request)
        self._thresholding = stages.thresholding
        self._table = torch.tensor(stages.table, device=device)
        # torch has no arithmetic on uint64; the kernel reads the same 64 bits.
        self._seeds = None if request.seeds is None else torch.tensor(request.seeds.view(np.int64), device=device)
        self._guidance, self._rescale = upload(request.guidance), upload(request.rescale)
        self._state = torch.empty(request.num_samples, *network.sample_shape, device=device)
        self._x0 = torch.empty_like(self._state) if keep_x0 else None
        self._base = torch.empty_like(self._state) if any(f.write_base for f in self._flags) else None
        self._memory = torch.empty_like(self._state) if any(f.write_memory for f in self._flags) else None
        denoiser.prepare(
            stages.network_timesteps(request.num_copies, request.num_samples), call_conditioning(network, request)
        )
        if request.x_T is not None:
            self.set_state(request.x_T)
        else:
            assert self._seeds is not None, "a request has seeds or x_T"
            initial_noise(state=self._state, network_input=denoiser.input, seeds=self._seeds)

    def advance(self, stage: int) -> None:
        self._denoiser.enqueue(stage)
        flags = self._flags[stage]
        rescale, bound = sample_statistics(
            self._state,
            self._denoiser.output,
            self._table[stage],
            flags,
            guidance=self._guidance,
            rescale=self._rescale,
            thresholding=self._thresholding,
        )
        ddim_step(
            state=self._state,
            model_output=self._denoiser.output,
            network_input=self._denoiser.input,
            table=self._table,
            stage=stage,
            flags=flags,
            seeds=self._seeds,
            guidance=self._guidance,
            rescale=rescale,
            bound=bound,
            base=self._base,
            memory=self._memory,
            x0=self._x0,
        )

    def state(self) -> Array:
        return self._state.cpu().numpy()

    def x0(self) -> Array:
        assert self._x0 is not None, "the run was started with keep_x0"
        return self._x0.cpu().numpy()

    def set_state(self, state: Array) -> None:
        self._state.copy_(torch.from_numpy(np.ascontiguousarray(state)))
        replicate(self._state, self._denoiser.input)
