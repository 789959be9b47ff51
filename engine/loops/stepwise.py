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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.denoiser import Denoiser, MakeDenoiser
from skipstep.backends.processor import Splits
from skipstep.calls.conditioning import Conditioning, call_conditioning
from skipstep.calls.noise import StageNoise, initial_state
from skipstep.calls.request import SampleRequest
from skipstep.errors import InputError
from skipstep.kernels.step_numpy import NumpyStep
from skipstep.loops.contract import Array, LoopReport, Pending, Run, call_flags, replicate, run_observed
from skipstep.networks.graphs import StepInputs
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

if TYPE_CHECKING:
    from skipstep.kernels.autotune import LaunchCase
    from skipstep.kernels.launch import StepLaunch

# Sets of buffers that wait for a call, of all batch sizes together; the one that waits longest goes first.
MAX_FREE_BUFFERS = 16

Compute = Callable[[NDArray[np.float64], Conditioning], StepInputs]


class HostLoop:
    """The stepwise loop in host memory: NumPy does the step, any backend the network, at any batch size."""

    name = "stepwise"
    device = "cpu"
    device_name: str | None = None
    any_batch = True
    reports: tuple[LoopReport, ...] = ()

    def __init__(
        self, make: MakeDenoiser, network: NetworkSpec, *, ready: Sequence[int] = (), splits: Splits | None = None
    ) -> None:
        self._make, self._network, self.splits = make, network, splits or Splits()
        self._free: list[Denoiser] = [make(size) for size in ready][-MAX_FREE_BUFFERS:]
        self._lock = threading.Lock()

    @property
    def placement(self) -> str | None:
        with self._lock:
            said = [getattr(each, "placement", None) for each in reversed(self._free)]
        return next((each for each in said if each), None)

    def prepare(self, stages: Sequence[Stages]) -> None:
        """Any plan runs as it is."""

    def enqueue(self, stages: Stages, request: SampleRequest, out: Array) -> Pending:
        return run_observed(self, stages, request, out, observer=lambda stage, run: None)

    @contextlib.contextmanager
    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> Iterator[Run]:
        with contextlib.ExitStack() as held:
            held.enter_context(self.splits.call())
            denoiser = held.enter_context(self.buffers(request.num_copies * request.num_samples))
            walk = Walk(
                denoiser.compute,
                self._network,
                stages,
                request,
                network_input=denoiser.input,
                output=denoiser.output,
            )
            halves = min(walk.rows) < len(walk.input)
            yield HostRun(walk, denoiser, held.enter_context(self.buffers(min(walk.rows))) if halves else None)

    @contextlib.contextmanager
    def buffers(self, batch_size: int) -> Iterator[Denoiser]:
        """The network at a batch size, for one user at a time."""
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

    def mix(self, stages: Sequence[Stages], max_rows: int) -> HostMix:
        return HostMix(self, self._network)

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


class Walk:
    """A call on its way: its state, its step and its step inputs, beside the network that evaluates it.

    n samples: `input` and `output` hold n rows, or 2n with guidance; `state` and `x0` are `[n, *sample_shape]`.

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


class HostRun:
    """A call under way on one set of buffers (skipstep.loops.contract.Run); stages that a guided call makes without
    guidance are evaluated on those of `alone`, for half the batch."""

    def __init__(self, walk: Walk, denoiser: Denoiser, alone: Denoiser | None) -> None:
        self._walk, self._alone = walk, alone
        self._enqueue = denoiser.new_context()
        self._enqueue_alone = None if alone is None else alone.new_context()

    def advance(self, stage: int) -> None:
        walk, rows = self._walk, self._walk.rows[stage]
        if self._alone is not None and self._enqueue_alone is not None and rows < len(walk.input):
            self._alone.input[...] = walk.state
            self._enqueue_alone(walk.values(stage), stage)
            walk.output[:rows] = self._alone.output
        else:
            self._enqueue(walk.values(stage), stage)
        walk.step(stage)

    def state(self) -> Array:
        return self._walk.copy_state()

    def x0(self) -> Array:
        return self._walk.copy_x0()

    def set_state(self, state: Array) -> None:
        self._walk.set_state(state)


@dataclass(frozen=True, slots=True)
class _MixedInputs:
    """The step inputs of several samples, each at its own stage, as a denoiser reads them: one stage of all rows."""

    chosen: Sequence[tuple[Walk, int]]

    def row(self, name: str, stage: int) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
        found = [walk.values(own).row(name, own) for walk, own in self.chosen]
        values = np.concatenate([table[rows] for table, rows in found])
        return values, np.arange(len(values))


class HostMix:
    """Walks of one sample each (skipstep.loops.contract.Mix): the numbers that one reads and writes are those of a call
    of one sample, and only the network's batch is shared.

        inputs side by side ──▶ network ──▶ each sample's own step
    """

    batch_sizes: tuple[int, ...] = ()

    def __init__(self, loop: HostLoop, network: NetworkSpec) -> None:
        self._loop, self._network = loop, network
        with loop.buffers(1) as denoiser:  # What runs before the loop is the same at every batch size.
            self._compute = denoiser.compute

    def sample(self, stages: Stages, request: SampleRequest) -> Walk:
        return Walk(self._compute, self._network, stages, request)

    def advance(self, chosen: Sequence[tuple[Walk, int]]) -> None:
        widths = [walk.rows[stage] for walk, stage in chosen]
        parts = [slice(end - width, end) for end, width in zip(np.cumsum(widths), widths, strict=True)]
        with self._loop.splits.call(), self._loop.buffers(sum(widths)) as denoiser:
            for part, width, (walk, _) in zip(parts, widths, chosen, strict=True):
                denoiser.input[part] = walk.input[:width]
            denoiser.new_context()(_MixedInputs(chosen), 0)
            for part, width, (walk, _) in zip(parts, widths, chosen, strict=True):
                walk.output[:width] = denoiser.output[part]
        for walk, stage in chosen:
            walk.step(stage)

    def leave(self, sample: Walk) -> None:
        """It holds nothing beside its own memory."""
