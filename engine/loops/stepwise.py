"""The stepwise loop: E times the network, then one step. It runs on every backend, and every other loop must equal it.

    x_T ──▶ network ──▶ step ──▶ network ──▶ step ──▶ … ──▶ x_0

The network reads and writes buffers that never move; the step reads the network's output and the float32 state, and
writes the next state and the network's next input. Nothing else happens between two network evaluations, unless
somebody watches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skipstep.backends import Denoiser
from skipstep.calls.conditioning import call_conditioning
from skipstep.calls.noise import StageNoise, standard_normal
from skipstep.calls.request import SampleRequest
from skipstep.kernels.layout import StepFlags, Stream
from skipstep.kernels.step_numpy import NumpyStep
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

Array = NDArray[np.float32]


class Run(Protocol):
    """A loop under way, one evaluation at a time. Arrays are float32 `[B, C, H, W]`, copies in host memory."""

    def advance(self, stage: int) -> None:
        """Evaluate the network on the state, and take the step that follows."""
        ...

    def state(self) -> Array: ...

    def x0(self) -> Array:
        """The image predicted at the last step; only where the run was started with keep_x0."""
        ...

    def set_state(self, state: Array) -> None: ...


Observer = Callable[[int, Run], None]


class Pending(Protocol):
    """Samples that are being drawn, or have been."""

    def wait(self) -> dict[int, int | None]:
        """Return when they are where they were wanted: those that are not finite, and since which stage if known."""
        ...


class Loop(Protocol):
    """One network at one batch size, ready to run any plan."""

    name: str

    def prepare(self, stages: Sequence[Stages]) -> None:
        """Compile what these need, so that no call has to."""
        ...

    def enqueue(self, stages: Stages, request: SampleRequest, out: Any) -> Pending:
        """Walk all stages from x_T, and write the first len(out) samples of x_0 to `out`, float32 `[n, C, H, W]`.

        On a GPU it returns while the device works; `out` may be a tensor there.
        """
        ...

    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> AbstractContextManager[Run]:
        """The same one evaluation at a time. It may hold the loop's buffers until the context ends: others wait."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class Finished:
    """Samples that are there."""

    def __init__(self, out: Array) -> None:
        self._out = out

    def wait(self) -> dict[int, int | None]:
        # The step keeps NaN, so one look at the end sees every NaN that the network returned on the way.
        broken = np.flatnonzero(~np.isfinite(self._out).all(axis=(1, 2, 3)))
        return dict.fromkeys(broken.tolist())


def run_observed(
    loop: Loop, stages: Stages, request: SampleRequest, out: Array, *, observer: Observer, keep_x0: bool = False
) -> Pending:
    """`Loop.enqueue` by `Loop.start`, for somebody who looks on after every evaluation."""
    with loop.start(stages, request, keep_x0=keep_x0) as run:
        for stage in range(len(stages)):
            run.advance(stage)
            observer(stage, run)
        out[...] = run.state()[: len(out)]
    return Finished(out)


class HostLoop:
    """The stepwise loop in host memory: NumPy does the step, any backend the network."""

    name = "stepwise"

    def __init__(self, denoiser: Denoiser, network: NetworkSpec) -> None:
        self.denoiser = denoiser
        self._network = network
        self._lock = threading.Lock()

    def prepare(self, stages: Sequence[Stages]) -> None:
        """Any plan runs as it is."""

    def enqueue(self, stages: Stages, request: SampleRequest, out: Array) -> Pending:
        return run_observed(self, stages, request, out, observer=lambda stage, run: None)

    def close(self) -> None:
        """Its memory goes with it."""

    @contextlib.contextmanager
    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> Iterator[Run]:
        with self._lock:
            yield _HostRun(self.denoiser, self._network, stages, request)


class _HostRun:
    def __init__(self, denoiser: Denoiser, network: NetworkSpec, stages: Stages, request: SampleRequest) -> None:
        self._denoiser = denoiser
        self._state = initial_state(network, request)
        self._x0 = np.empty_like(self._state)
        self._step = NumpyStep(
            state=self._state,
            model_output=denoiser.output,
            network_input=denoiser.input,
            table=stages.table,
            flags=call_flags(network, stages, request),
            guidance=request.guidance,
            rescale=request.rescale,
            thresholding=stages.thresholding,
            noise=StageNoise(request.seeds, network.num_elements, len(stages))
            if stages.adds_noise and request.seeds is not None
            else None,
            x0=self._x0,
        )
        denoiser.prepare(
            stages.network_timesteps(request.num_copies, request.num_samples), call_conditioning(network, request)
        )
        replicate(self._state, denoiser.input)

    def advance(self, stage: int) -> None:
        self._denoiser.enqueue(stage)
        self._step(stage)

    def state(self) -> Array:
        return self._state.copy()

    def x0(self) -> Array:
        return self._x0.copy()

    def set_state(self, state: Array) -> None:
        self._state[...] = state
        replicate(self._state, self._denoiser.input)


def call_flags(network: NetworkSpec, stages: Stages, request: SampleRequest) -> tuple[StepFlags, ...]:
    """The plans' flags, with the network's output and guidance as this call has it."""
    guided, rescale = request.guidance is not None, request.rescale is not None
    if not (guided or rescale or network.learns_variance):
        return stages.flags
    return tuple(_call_flags(flags, guided, rescale, network.learns_variance) for flags in stages.flags)


@lru_cache
def _call_flags(flags: StepFlags, guided: bool, rescale: bool, wide_output: bool) -> StepFlags:
    return replace(flags, guided=guided, rescale=rescale, wide_output=wide_output)


def initial_state(network: NetworkSpec, request: SampleRequest) -> Array:
    """x_T `[B, C, H, W]`: a copy of the caller's, or noise that depends on each sample's seed alone."""
    if request.x_T is not None:
        given: Array = request.x_T.copy()
        return given
    assert request.seeds is not None, "a request has seeds or x_T"
    return seeded_noise(network, request.seeds, Stream.INITIAL)


def seeded_noise(network: NetworkSpec, seeds: NDArray[np.uint64], stream: Stream) -> Array:
    """Standard normals `[B, C, H, W]` of the samples' seeds."""
    noise = standard_normal(seeds, network.num_elements, stage=0, stream=stream)
    return noise.reshape(len(seeds), *network.sample_shape)


def replicate(state: Any, network_input: Any) -> None:
    """Fill the network's input with the state, twice where guidance doubles the batch."""
    batch_size = len(state)
    for first in range(0, len(network_input), batch_size):
        network_input[first : first + batch_size] = state
