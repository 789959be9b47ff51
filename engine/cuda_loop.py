"""The stepwise loop on a GPU: the same walk as skipstep.loop, with the Triton kernel as the step.

Everything that the loop reads is on the device before it starts, and the host waits once, for the result.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray

from skipstep.backends import Denoiser
from skipstep.kernels.step import ddim_step, initial_noise
from skipstep.loop import AfterStep, network_labels, run_flags, walk
from skipstep.network import NetworkSpec
from skipstep.plan import Plan
from skipstep.request import SampleRequest


class CudaLoop:
    """One network at one batch size on `device`. One call at a time; it runs on the caller's current stream."""

    name = "stepwise"

    def __init__(self, denoiser: Denoiser, network: NetworkSpec, device: torch.device) -> None:
        self.denoiser = denoiser
        self._network = network
        self._device = device
        self._lock = threading.Lock()

    def run(self, plan: Plan, request: SampleRequest, after_step: AfterStep | None) -> NDArray[np.float32]:
        with self._lock, torch.cuda.device(self._device):
            state = torch.empty(request.num_samples, *self._network.sample_shape, device=self._device)
            network_input = self.denoiser.input
            # Triton has no uint64 tensors in common with older torch; the kernel reads the same 64 bits.
            seeds = None if request.seeds is None else torch.from_numpy(request.seeds.view(np.int64)).to(self._device)
            guidance = None if request.guidance is None else torch.from_numpy(request.guidance).to(self._device)
            table = torch.tensor(plan.coefficients[:, None], device=self._device)
            flags = run_flags(plan, request)
            if request.x_T is not None:
                state.copy_(torch.from_numpy(request.x_T))
                network_input.view(-1, *state.shape).copy_(state)
            else:
                assert seeds is not None, "a request has seeds or x_T"
                initial_noise(state=state, network_input=network_input, seeds=seeds)
            self.denoiser.prepare(np.asarray(plan.timesteps, np.int64), network_labels(self._network, request))

            def step(stage: int) -> None:
                ddim_step(
                    state=state,
                    model_output=self.denoiser.output,
                    network_input=network_input,
                    table=table,
                    stage=stage,
                    seeds=seeds,
                    guidance=guidance,
                    flags=flags,
                )

            walk(self.denoiser, step, plan.num_evaluations, after_step)
            return state.cpu().numpy()
