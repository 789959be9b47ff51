"""The host loop: E times the network, then one step in NumPy. It is the CPU's only loop, and every loop's reference.

    x_T ──▶ network ──▶ step ──▶ network ──▶ step ──▶ … ──▶ x_0

The network reads and writes buffers that never move; the step reads the network's output and the float32 state, and
writes the next state and the network's next input. Buffers come from a pool, so calls from several threads run side by
side, each on its own buffers, and share the network's weights.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from skipstep.backends.denoiser import Denoiser, MakeDenoiser
from skipstep.calls.conditioning import call_conditioning
from skipstep.calls.noise import StageNoise, initial_state
from skipstep.calls.request import SampleRequest
from skipstep.errors import InputError
from skipstep.kernels.launch import StepLaunch
from skipstep.kernels.layout import StepFlags
from skipstep.kernels.step_numpy import NumpyStep
from skipstep.loops.contract import Array, LoopReport, Pending, Run, call_flags, replicate, run_observed
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

if TYPE_CHECKING:
    from skipstep.kernels.autotune import LaunchCase

# Sets of buffers that wait for a call, of all batch sizes together; the one that waits longest goes first.
MAX_FREE_BUFFERS = 16


class HostLoop:
    """The stepwise loop in host memory: NumPy does the step, any backend the network, at any batch size."""

    name = "stepwise"
    device = "cpu"
    device_name: str | None = None
    any_batch = True
    reports: tuple[LoopReport, ...] = ()

    def __init__(self, make: MakeDenoiser, network: NetworkSpec, *, ready: Sequence[int] = ()) -> None:
        self._make, self._network = make, network
        self._free: list[Denoiser] = [make(size) for size in ready][-MAX_FREE_BUFFERS:]
        self._lock = threading.Lock()

    def prepare(self, stages: Sequence[Stages]) -> None:
        """Any plan runs as it is."""

    def enqueue(self, stages: Stages, request: SampleRequest, out: Array) -> Pending:
        return run_observed(self, stages, request, out, observer=lambda stage, run: None)

    @contextlib.contextmanager
    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> Iterator[Run]:
        with contextlib.ExitStack() as held:
            denoiser = held.enter_context(self._buffers(request.num_copies * request.num_samples))
            flags = call_flags(self._network, stages, request)
            alone = None
            if request.num_copies > 1 and any(each.doubled for each in flags):
                alone = held.enter_context(self._buffers(request.num_samples))
            yield HostRun(denoiser, alone, self._network, stages, request, flags)

    @contextlib.contextmanager
    def _buffers(self, batch_size: int) -> Iterator[Denoiser]:
        with self._lock:
            # The buffers that were used last are the likeliest to be in the processor's caches.
            denoiser = next((each for each in reversed(self._free) if each.batch_size == batch_size), None)
            if denoiser is not None:
                self._free.remove(denoiser)
        if denoiser is None:
            denoiser = self._make(batch_size)
        try:
            yield denoiser
        finally:
            with self._lock:
                self._free = [*self._free, denoiser][-MAX_FREE_BUFFERS:]

    def new_samples(self, shape: tuple[int, ...]) -> Array:
        return np.empty(shape, np.float32)

    def caller_order(self) -> Callable[[], None]:
        return lambda: None

    def launch_cases(self) -> Iterable[LaunchCase]:
        raise InputError(got="autotune on cpu", expected="an engine on a GPU", remedy="leave it out on the CPU")

    def use_launches(self, launches: Mapping[LaunchCase, StepLaunch]) -> None:
        """There are none on the CPU."""

    def close(self) -> None:
        with self._lock:
            self._free.clear()


class HostRun:
    """A call under way on one set of buffers (skipstep.loops.contract.Run); stages that a guided call makes without
    guidance are evaluated on those of `alone`, for half the batch."""

    def __init__(
        self,
        denoiser: Denoiser,
        alone: Denoiser | None,
        network: NetworkSpec,
        stages: Stages,
        request: SampleRequest,
        flags: tuple[StepFlags, ...],
    ) -> None:
        self._input, self._output, self._alone, self._flags = denoiser.input, denoiser.output, alone, flags
        self._state: Array = initial_state(network, request)
        self._x0 = np.empty_like(self._state)
        self._step = NumpyStep(
            state=self._state,
            model_output=denoiser.output,
            network_input=denoiser.input,
            table=stages.table,
            flags=flags,
            guidance=request.guidance,
            rescale=request.rescale,
            thresholding=stages.thresholding,
            noise=StageNoise(request.seeds, network.num_elements, len(stages))
            if stages.adds_noise and request.seeds is not None
            else None,
            x0=self._x0,
        )
        timesteps = stages.network_timesteps(request.num_copies, request.num_samples)
        self._values: Any = denoiser.compute(timesteps, call_conditioning(network, request))
        self._enqueue = denoiser.new_context()
        if alone is not None:
            once = replace(request, guidance=None, rescale=None, negative_conditions={})
            timesteps = stages.network_timesteps(1, request.num_samples)
            self._values_alone: Any = alone.compute(timesteps, call_conditioning(network, once))
            self._enqueue_alone = alone.new_context()
        replicate(self._state, self._input)

    def advance(self, stage: int) -> None:
        if self._alone is not None and self._flags[stage].doubled:
            self._alone.input[...] = self._state
            self._enqueue_alone(self._values_alone, stage)
            self._output[: len(self._state)] = self._alone.output
        else:
            self._enqueue(self._values, stage)
        self._step(stage)

    def state(self) -> Array:
        return self._state.copy()

    def x0(self) -> Array:
        return self._x0.copy()

    def set_state(self, state: Array) -> None:
        self._state[...] = state
        replicate(self._state, self._input)
