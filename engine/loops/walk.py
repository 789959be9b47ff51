"""A call on its way through the host loop, beside the network that evaluates it: its state, its step, its step inputs.

    x_T ──▶ input ─ network ─▶ output ──▶ step ──▶ input ─ network ─▶ …

Whoever has a network puts `input` through it with the step inputs of `values`, writes `output`, and calls `step`: a
loop on buffers of its own (skipstep.loops.stepwise), or a batch of several walks, each at its own stage
(skipstep.serving).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.conditioning import Conditioning, call_conditioning
from skipstep.calls.noise import StageNoise, initial_state
from skipstep.calls.request import SampleRequest
from skipstep.kernels.step_numpy import NumpyStep
from skipstep.loops.contract import Array, call_flags, replicate
from skipstep.networks.graphs import StepInputs
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

Compute = Callable[[NDArray[np.float64], Conditioning], StepInputs]


class Walk:
    """n samples: `input` and `output` hold n rows, or 2n with guidance; `state` and `x0` are `[n, *sample_shape]`.

    `compute` is a denoiser's; `network_input` and `output` are its buffers, or left out for new memory.
    """

    def __init__(
        self,
        compute: Compute,
        network: NetworkSpec,
        stages: Stages,
        request: SampleRequest,
        *,
        network_input: Any = None,
        output: Any = None,
    ) -> None:
        flags = call_flags(network, stages, request)
        rows = request.num_copies * request.num_samples
        self.input = np.empty((rows, *network.sample_shape), np.float32) if network_input is None else network_input
        self.output = np.empty((rows, *network.output_shape), np.float32) if output is None else output
        self.state: Array = initial_state(network, request)
        self.x0 = np.empty_like(self.state)
        self.step = NumpyStep(
            state=self.state,
            model_output=self.output,
            network_input=self.input,
            table=stages.table,
            flags=flags,
            guidance=request.guidance,
            rescale=request.rescale,
            thresholding=stages.thresholding,
            noise=StageNoise(request.seeds, network.num_elements, len(stages))
            if stages.adds_noise and request.seeds is not None
            else None,
            x0=self.x0,
        )
        # How many rows of `input` each stage evaluates: half of them where a guided call has no guidance.
        self.rows = tuple(request.num_samples if each.doubled else rows for each in flags)
        self._values = compute(
            stages.network_timesteps(request.num_copies, request.num_samples), call_conditioning(network, request)
        )
        self._values_once = self._values
        if min(self.rows) < rows:
            once = replace(request, guidance=None, rescale=None, negative_conditions={})
            timesteps = stages.network_timesteps(1, request.num_samples)
            self._values_once = compute(timesteps, call_conditioning(network, once))
        replicate(self.state, self.input)

    def values(self, stage: int) -> StepInputs:
        """The step inputs of the rows that this stage evaluates."""
        return self._values if self.rows[stage] == len(self.input) else self._values_once

    def copy_state(self) -> Array:
        return self.state.copy()

    def copy_x0(self) -> Array:
        return self.x0.copy()

    def set_state(self, state: Array) -> None:
        self.state[...] = state
        replicate(self.state, self.input)
