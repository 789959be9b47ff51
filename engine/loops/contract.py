"""The loop contract: what the engine asks of any loop, on any device, and what functions over an engine ask of it.

    x_T ──▶ network ──▶ step ──▶ network ──▶ step ──▶ … ──▶ x_0

A loop is one network on one device, at all the batch sizes that it was made for, ready to run any plan. All loops of
one device draw the same bits. ADD A LOOP FORM: implement `Loop`, and make it in skipstep.loops.choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.request import SampleRequest
from skipstep.calls.trajectory import Progress
from skipstep.errors import EngineStateError
from skipstep.kernels.layout import StepFlags
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages

if TYPE_CHECKING:
    from skipstep.backends.processor import Splits
    from skipstep.kernels.autotune import LaunchCase
    from skipstep.kernels.launch import StepLaunch

Array = NDArray[np.float32]


class Lifecycle:
    """Whether an engine may still be used: not after `close`, in a forked child or with a lost CUDA context.

    A child of fork has the parent's memory but not its threads, and a CUDA context does not survive the fork: ONNX
    Runtime would wait forever, and CUDA would fail later. So everything that serves one engine shares this, and calls
    `check` before every use.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._ended: str | None = None
        self._remedy = ""

    def check(self) -> None:
        """Raise EngineStateError unless the engine may be used here and now."""
        if self._ended is not None:
            raise EngineStateError(got=self._ended, expected="an engine in use", remedy=self._remedy)
        if os.getpid() != self._process:
            raise EngineStateError(
                got=f"an engine of process {self._process} in its forked child {os.getpid()}",
                expected="the process that made it: threads and CUDA contexts do not survive a fork",
                remedy="build or load the engine in the child, or start it with multiprocessing's 'spawn' method",
            )

    def close(self) -> None:
        if self._ended is None:
            self._ended, self._remedy = "an engine that was closed", "build or load another one"

    def lose(self, reason: str) -> None:
        """The CUDA context has failed for good: nothing on this device works any more in this process."""
        self._ended = f"an engine whose CUDA context is lost ({reason})"
        self._remedy = "start a new process; run it with CUDA_LAUNCH_BLOCKING=1 to find the kernel that failed"


class Run(Protocol):
    """A loop under way, one evaluation at a time. Arrays are float32 `[B, *sample_shape]`, copies in host memory."""

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
        """Return when the samples have arrived: those that are not finite, and since which stage if that is known."""
        ...


@dataclass(frozen=True, slots=True)
class LoopReport:
    """How a loop runs one structure of plans, and what making it took.

    `loop` is the form that was chosen, and `reason` why a faster form, or less work a stage, was not possible, empty
    where nothing prevented it. `num_nodes` of the CUDA graph, None where the driver does not say. `seconds` to warm up
    and record; `num_bytes` of device memory beside the network's buffers.
    """

    loop: str
    num_stages: int
    batch_size: int
    guided: bool
    num_nodes: int | None
    seconds: float
    num_bytes: int
    reason: str = ""

    def __str__(self) -> str:
        nodes = "" if self.num_nodes is None else f", {self.num_nodes} nodes"
        size = f"batch {self.batch_size}{', guided' if self.guided else ''}"
        made = f"{self.num_stages} evaluations, {size}: {self.loop}{nodes}, {self.num_bytes / 2**20:.1f} MiB"
        return f"{made}, made in {self.seconds:.2f} s" + (f" ({self.reason})" if self.reason else "")


class MixedSample(Protocol):
    """One sample of a mix. `rows` of the network that each of its stages evaluates: 2 with guidance, else 1."""

    @property
    def rows(self) -> Sequence[int]: ...
    def copy_state(self) -> Array:
        """After the steps taken so far, `[1, *sample_shape]` in host memory."""
        ...

    def copy_x0(self) -> Array:
        """The image predicted at the last step."""
        ...


class Mix(Protocol):
    """How samples at different stages of different plans share the evaluations of a loop. One thread at a time
    advances them.

    `batch_sizes` of the evaluations, ascending: rows that are left over are evaluated for nothing. Empty: any size.
    """

    batch_sizes: tuple[int, ...]

    def sample(self, stages: Stages, request: SampleRequest) -> MixedSample:
        """A request of one sample, made ready; from any thread."""
        ...

    def advance(self, chosen: Sequence[tuple[Any, int]]) -> None:
        """Evaluate the network once for all of these, each at its stage, and take their steps."""
        ...

    def leave(self, sample: Any) -> None:
        """It will not be advanced again."""
        ...


class Loop(Protocol):
    """`name` is the form that was requested, `device` torch's name of the device ("cpu", "cuda:0"), `device_name` the
    GPU's own, None on the CPU. `any_batch`: it takes every batch size. `reports`: how each structure of plans runs.
    `placement`: which of the network's nodes run on the device, for backends that tell, once a call has been made.
    `splits`: how batches are divided over the processor, None on a GPU."""

    name: str
    device: str
    device_name: str | None
    any_batch: bool

    @property
    def splits(self) -> Splits | None: ...
    @property
    def reports(self) -> tuple[LoopReport, ...]: ...
    @property
    def placement(self) -> str | None: ...

    def prepare(self, stages: Sequence[Stages]) -> None:
        """Compile and record what these need, so that no call has to."""
        ...

    def enqueue(self, stages: Stages, request: SampleRequest, out: Any) -> Pending:
        """Walk all stages from x_T, and write the first len(out) samples of x_0 to `out`, float32 `[n, *sample_shape]`.

        On a GPU it returns while the device works; `out` may be a tensor there.
        """
        ...

    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> AbstractContextManager[Run]:
        """The same one evaluation at a time. On a GPU other calls wait until the context ends."""
        ...

    def mix(self, stages: Sequence[Stages], max_rows: int) -> Mix:
        """Evaluations of up to `max_rows` rows that samples share; ready for `stages` where others have to be recorded
        first."""
        ...

    def new_samples(self, shape: tuple[int, ...]) -> Any:
        """Float32 memory for samples on the loop's device: a NumPy array on the CPU, else a tensor."""
        ...

    def caller_order(self) -> Callable[[], None]:
        """Note what the calling thread has enqueued on its own stream. The returned function, called from another
        thread, makes the loop's later work come after it. Nothing on the CPU."""
        ...

    def launch_cases(self) -> Iterable[LaunchCase]:
        """For what the step is launched, once for each number of samples. Raises InputError on the CPU."""
        ...

    def use_launches(self, launches: Mapping[LaunchCase, StepLaunch]) -> None:
        """Launch the step so from now on, instead of by rule; what was recorded is recorded again when needed."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class FinishedRun:
    """Samples that have arrived."""

    def __init__(self, out: Array) -> None:
        self._out = out

    def wait(self) -> dict[int, int | None]:
        # The step keeps NaN, so one look at the end sees every NaN that the network returned on the way.
        broken = np.flatnonzero(~np.isfinite(self._out).all(axis=tuple(range(1, self._out.ndim))))
        return dict.fromkeys(broken.tolist())


def run_observed(
    loop: Loop, stages: Stages, request: SampleRequest, out: Array, *, observer: Observer, keep_x0: bool = False
) -> Pending:
    """`Loop.enqueue` by `Loop.start`: `observer` is called after every evaluation."""
    with loop.start(stages, request, keep_x0=keep_x0) as run:
        for stage in range(len(stages)):
            run.advance(stage)
            observer(stage, run)
        out[...] = run.state()[: len(out)]
    return FinishedRun(out)


def call_flags(network: NetworkSpec, stages: Stages, request: SampleRequest) -> tuple[StepFlags, ...]:
    """The plans' flags, with the network's output and guidance as this call has it."""
    guided, rescale = request.guidance is not None, request.rescale is not None
    if not (guided or rescale or network.learns_variance):
        return stages.flags
    return tuple(_call_flags(flags, guided, rescale, network.learns_variance) for flags in stages.flags)


@lru_cache
def _call_flags(flags: StepFlags, guided: bool, rescale: bool, wide_output: bool) -> StepFlags:
    return flags.in_call(guided=guided, rescale=rescale, wide_output=wide_output)


def replicate(state: Any, network_input: Any) -> None:
    """Fill the network's input with the state, twice where guidance doubles the batch."""
    batch_size = len(state)
    for first in range(0, len(network_input), batch_size):
        network_input[first : first + batch_size] = state


class Parts(Protocol):
    """What is around a network of latents (skipstep.pipelines.pipeline)."""

    def conditions(self, network: NetworkSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`inputs` with embeddings in place of prompts."""
        ...

    def decode(self, latents: Any) -> Array: ...

    def moments(self, pictures: Array) -> tuple[Array, Array]: ...

    def files(self) -> Iterator[tuple[str, bytes]]:
        """What a bundle holds of it; the first describes the others."""
        ...

    def check(self, rounded: float = 0.0) -> None:
        """Raise IntegrityError where its parts give other numbers than on the machine that made them."""
        ...

    @property
    def channels(self) -> int: ...
    @property
    def factor(self) -> int: ...


class Runner(Protocol):
    """What draws checked requests of any size (skipstep.loops.runner)."""

    loop: Loop
    pipeline: Parts | None

    def check(self) -> None:
        """Raise EngineStateError for an engine that was closed, forked, or has lost its CUDA context."""
        ...

    def split(self, num_samples: int) -> list[int]: ...

    def run(self, stages: Stages, request: SampleRequest, *, progress: Progress | None = None) -> Array: ...

    def parts(self, stages: Stages, request: SampleRequest) -> Iterator[tuple[slice, Stages, SampleRequest]]: ...

    def as_output(self, samples: Any, output_type: str) -> Any: ...


class Sampler(Protocol):
    """What functions over an engine ask of it: `skipstep.Engine` is one."""

    @property
    def network(self) -> NetworkSpec: ...
    @property
    def plans(self) -> Mapping[str, Plan]: ...
    @property
    def plan_defaults(self) -> Mapping[str, Any]: ...
    @property
    def batch_sizes(self) -> tuple[int, ...]: ...
    @property
    def runner(self) -> Runner: ...
    def select_plan(self, *, steps: int | None = None, plan: Plan | None = None) -> Plan: ...
    def split(self, num_samples: int) -> list[int]: ...
    # Arguments as for skipstep.Engine.sample.
    @property
    def sample(self) -> Callable[..., Any]: ...
    @property
    def encode(self) -> Callable[..., Any]: ...
