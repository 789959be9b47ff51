"""The stepwise loop: S times the network, then one step. It runs on every backend, and every other loop must equal it.

    x_T ──▶ network ──▶ step ──▶ network ──▶ step ──▶ … ──▶ x_0

The network reads and writes buffers that never move; the step reads the network's output and the float32 state, and
writes the next state and the network's next input. Nothing else happens between two network evaluations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skipstep.backends import Denoiser
from skipstep.kernels.layout import StepFlags, Stream
from skipstep.kernels.step_numpy import NumpyStep
from skipstep.network import NetworkSpec
from skipstep.noise import StageNoise, standard_normal
from skipstep.plan import Plan
from skipstep.request import SampleRequest

AfterStep = Callable[[], None]


class Loop(Protocol):
    """One network at one batch size, ready to run any plan."""

    name: str
    denoiser: Denoiser

    def run(self, plan: Plan, request: SampleRequest, after_step: AfterStep | None) -> NDArray[np.float32]:
        """Return x_0, float32 `[B, C, H, W]`, in memory that nothing else writes to."""
        ...


def walk(denoiser: Denoiser, step: Callable[[int], None], num_stages: int, after_step: AfterStep | None) -> None:
    for stage in range(num_stages):
        denoiser.enqueue(stage)
        step(stage)
        if after_step is not None:
            after_step()


class HostLoop:
    """The stepwise loop in host memory: NumPy does the step, any backend the network. One call at a time."""

    name = "stepwise"

    def __init__(self, denoiser: Denoiser, network: NetworkSpec) -> None:
        self.denoiser = denoiser
        self._network = network
        self._lock = threading.Lock()

    def run(self, plan: Plan, request: SampleRequest, after_step: AfterStep | None) -> NDArray[np.float32]:
        with self._lock:
            state = initial_state(self._network, request)
            replicate(state, self.denoiser.input)
            flags = run_flags(plan, request)
            step = NumpyStep(
                state=state,
                model_output=self.denoiser.output,
                network_input=self.denoiser.input,
                table=plan.coefficients[:, None],
                flags=flags,
                guidance=request.guidance,
                noise=StageNoise(request.seeds, self._network.num_elements, plan.num_evaluations)
                if flags.add_noise and request.seeds is not None
                else None,
            )
            self.denoiser.prepare(np.asarray(plan.timesteps, np.int64), network_labels(self._network, request))
            walk(self.denoiser, step, plan.num_evaluations, after_step)
            return state


def run_flags(plan: Plan, request: SampleRequest) -> StepFlags:
    """The plan's flags, with guidance as this call has it."""
    flags = plan.flags
    return StepFlags(flags.clip, flags.rederive_eps, flags.add_noise, guided=request.guidance is not None)


def initial_state(network: NetworkSpec, request: SampleRequest) -> NDArray[np.float32]:
    """x_T `[B, C, H, W]`: a copy of the caller's, or noise that depends on each sample's seed alone."""
    if request.x_T is not None:
        return request.x_T.copy()
    assert request.seeds is not None, "a request has seeds or x_T"
    noise = standard_normal(request.seeds, network.num_elements, stage=0, stream=Stream.INITIAL)
    return noise.reshape(request.num_samples, *network.sample_shape)


def replicate(state: NDArray[np.float32], network_input: Any) -> None:
    """Fill the network's input with the state, twice where guidance doubles the batch."""
    for half in np.split(network_input, len(network_input) // len(state)):
        half[...] = state


def network_labels(network: NetworkSpec, request: SampleRequest) -> NDArray[np.int64] | None:
    """Labels `[N]` of the network's batch: with guidance, the samples' labels and then as many null labels."""
    if request.class_labels is None or request.guidance is None:
        return request.class_labels
    return np.concatenate([request.class_labels, np.full_like(request.class_labels, network.null_label)])
