"""The captured loop without torch and Triton: a whole call as one CUDA graph, through the driver alone.

    copy in (seeds, conditions) -> one graph launch: x_T, then network and step of every stage -> copy out

Kernels were compiled ahead of time (skipstep.edge.launcher), networks are TensorRT engines (skipstep.edge.network). All
batch sizes share one stream, and the memory of activations.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from skipstep.calls.destination import copy_samples
from skipstep.calls.request import SampleRequest
from skipstep.cuda.queue import Pinned, Queue
from skipstep.edge.blocks import as_floats
from skipstep.edge.launcher import StepLauncher
from skipstep.edge.network import EdgeNetwork
from skipstep.edge.program import Program
from skipstep.errors import EngineStateError, InputError
from skipstep.kernels.launch import StepLaunch
from skipstep.kernels.step_numpy import NumpyStep
from skipstep.loops.contract import Array, FinishedRun, Lifecycle, LoopReport, Run
from skipstep.loops.structure import Structure
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

if TYPE_CHECKING:
    from skipstep.kernels.autotune import LaunchCase

# Structures that a loop keeps ready.
MAX_PROGRAMS: Final = 64
_WITH_TORCH: Final = "load the bundle with runtime='torch' (pip install 'skipstep[gpu]')"


class EdgeLoop:
    """One network on one GPU (skipstep.loops.contract.Loop). Calls from several threads run one after the other.

    `networks` by the network's batch size. `form`: "captured", or "stepwise" for a launch of every kernel. The loop
    owns the queue and the launcher. `releases` gives back what the networks hold.
    """

    any_batch = False
    splits = None
    placement: str | None = None

    def __init__(
        self,
        networks: Mapping[int, EdgeNetwork],
        spec: NetworkSpec,
        queue: Queue,
        launcher: StepLauncher,
        lifecycle: Lifecycle,
        *,
        batch_sizes: Sequence[int],
        form: str,
        releases: contextlib.ExitStack,
    ) -> None:
        driver = queue.driver
        self.name, self.device = form, f"cuda:{driver.number}"
        self.device_name: str | None = driver.facts().name
        self._networks, self._spec, self._queue, self._launcher = networks, spec, queue, launcher
        self._lifecycle, self._batch_sizes, self._releases = lifecycle, tuple(batch_sizes), releases
        self._programs: OrderedDict[Structure, tuple[Program, LoopReport]] = OrderedDict()
        self._lock = threading.RLock()
        # How many threads wait for results; the results that were not waited for yet.
        self._waiting, self._idle = 0, threading.Condition(self._lock)
        self._pending: weakref.WeakSet[EdgePending] = weakref.WeakSet()
        self._closed = False

    @property
    def reports(self) -> tuple[LoopReport, ...]:
        with self._lock:
            return tuple(report for _, report in self._programs.values())

    def prepare(self, stages: Sequence[Stages]) -> None:
        """Record the programs of these plans. Those that need what is missing here are left to raise when they are
        asked for, unless all do."""
        refused: list[InputError] = []
        for each in stages:
            for count, copies in self._cases():
                guidance = np.ones(count, np.float32) if copies == 2 else None
                request = SampleRequest(count, np.zeros(count, np.uint64), None, guidance)
                with self._held():
                    try:
                        self._program(Structure.of(self._spec, each, request))
                    except InputError as error:
                        refused.append(error)
        if refused and not self._programs:
            raise refused[0]

    def enqueue(self, stages: Stages, request: SampleRequest, out: Any) -> EdgePending:
        with self._held():
            program = self._program(Structure.of(self._spec, stages, request))
            memory = program.fill(stages, request)
            program.launch()
            self._queue.copy_out(memory, program.state, program.call.starts["state"])
            self._queue.record(memory)
            pending = EdgePending(self, program, memory, out)
            self._pending.add(pending)
        return pending

    @contextlib.contextmanager
    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> Iterator[Run]:
        with self._held():
            program = self._program(Structure.of(self._spec, stages, request))
            run = EdgeRun(self._queue, program, self._spec, stages, request, keep_x0=keep_x0)
            try:
                yield run
            finally:
                self._queue.settle()

    def mix(self, stages: Sequence[Stages], max_rows: int) -> NoReturn:
        raise InputError(got="a Batcher", expected="an engine that torch or the CPU runs", remedy=_WITH_TORCH)

    def new_samples(self, shape: tuple[int, ...]) -> NoReturn:
        raise InputError(got="output_type='pt' without torch", expected="'np' or 'pil'", remedy="pass output_type='np'")

    def caller_order(self) -> Callable[[], None]:
        return lambda: None

    def launch_cases(self) -> Iterable[LaunchCase]:
        raise InputError(got="autotune", expected="kernels that Triton compiles here", remedy=_WITH_TORCH)

    def use_launches(self, launches: Mapping[LaunchCase, StepLaunch]) -> None:
        """A launch is fixed in a compiled kernel."""

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._waiting == 0)
            self._queue.settle()
            for pending in self._pending:
                pending.keep()
            for program, _ in self._programs.values():
                program.releases.close()
            self._programs.clear()
            self._releases.close()
            self._queue.releases.close()
            self._launcher.close()

    def results(self, pending: EdgePending) -> Array:
        """Wait until they have arrived; calls of other threads go on being enqueued. The memory is free afterwards."""
        with self._lock:
            if pending.kept is not None:
                return pending.kept
            self._waiting += 1
        try:
            with self._watched():
                self._queue.wait_for(pending.memory)
            pending.keep()
        finally:
            with self._lock:
                self._waiting -= 1
                self._pending.discard(pending)
                self._queue.give_back(pending.memory)
                self._idle.notify_all()
        assert pending.kept is not None, "keep has copied them"
        return pending.kept

    def _cases(self) -> list[tuple[int, int]]:
        all_copies = (1, 2) if self._spec.can_guide else (1,)
        return [(n, copies) for n in self._batch_sizes for copies in all_copies if n * copies in self._networks]

    def _program(self, structure: Structure) -> Program:
        if structure in self._programs:
            self._programs.move_to_end(structure)
            return self._programs[structure][0]
        self._check(structure)
        while len(self._programs) >= MAX_PROGRAMS:
            self._queue.settle()
            self._programs.popitem(last=False)[1][0].releases.close()
        begun = time.perf_counter()
        network = self._networks[structure.num_samples * (2 if structure.guided else 1)]
        program = Program(self._queue, network, self._spec, self._launcher, structure)
        try:
            if self.name == "captured":
                program.record()
        except BaseException:
            self._queue.settle()
            program.releases.close()
            raise
        report = LoopReport(
            self.name,
            len(structure),
            structure.num_samples,
            structure.guided,
            None if program.graph is None else program.graph.num_nodes,
            time.perf_counter() - begun,
            program.num_bytes,
            "stages without guidance evaluate the whole batch" if structure.needs_half else "",
        )
        self._programs[structure] = program, report
        return program

    def _check(self, structure: Structure) -> None:
        """Raise InputError for what no kernel here does."""
        if structure.rows > 1:
            raise InputError(
                got="a plan of its own for each sample on a GPU without torch",
                expected="one for all: the compiled kernels read one table",
                remedy=f"pass one plan for all samples, or {_WITH_TORCH}",
            )
        if missing := self._launcher.missing(structure.flags):
            target = self._launcher.facts[0].target.rstrip("af")
            raise InputError(
                got=f"a plan whose steps need {missing}",
                expected=f"kernels of the bundle: {self._launcher}",
                remedy=f"export the bundle again with this plan and --target {target}, or {_WITH_TORCH}",
            )

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        with self._lock, self._watched():
            self._lifecycle.check()
            yield

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Find out whether an error has broken the device for good. Raises EngineStateError."""
        try:
            yield
        except RuntimeError as error:
            lost = self._queue.driver.lost
            if lost is None or isinstance(error, EngineStateError):
                raise
            self._lifecycle.lose(lost)
            self._lifecycle.check()


@dataclass(eq=False)
class EdgePending:
    """Samples on their way to `out` (skipstep.loops.contract.Pending)."""

    loop: EdgeLoop
    program: Program
    memory: Pinned
    out: Any
    kept: Array | None = None

    def keep(self) -> None:
        """Copy the results, which have arrived, from memory that is about to be used again."""
        self.kept = self.program.call.view(self.memory, "state")[: len(self.out)].copy()

    def wait(self) -> dict[int, int | None]:
        samples = self.loop.results(self)
        copy_samples(samples, self.out)
        return FinishedRun(samples).wait()


class EdgeRun:
    """A call one evaluation at a time (skipstep.loops.contract.Run). The predicted image is computed on the host, from
    the same bits by the same operations."""

    def __init__(
        self,
        queue: Queue,
        program: Program,
        spec: NetworkSpec,
        stages: Stages,
        request: SampleRequest,
        *,
        keep_x0: bool,
    ) -> None:
        self._queue, self._program, self._spec = queue, program, spec
        self._call = stages, request
        self._keep_x0, self._x0 = keep_x0, np.empty(0, np.float32)
        memory = program.fill(stages, request)
        program.begin()
        queue.record(memory)
        queue.give_back(memory)

    def advance(self, stage: int) -> None:
        before = self.state() if self._keep_x0 else None
        self._program.evaluate(stage)
        if before is not None:
            self._x0 = self._predicted(stage, before)
        self._program.step(stage)

    def state(self) -> Array:
        shape = (self._program.structure.num_samples, *self._spec.sample_shape)
        return self._fetched(self._program.state).view(np.float32).reshape(shape)

    def x0(self) -> Array:
        return self._x0

    def set_state(self, state: Array) -> None:
        stages, request = self._call
        memory = self._program.fill(stages, replace(request, x_T=state))
        self._program.begin()
        self._queue.record(memory)
        self._queue.give_back(memory)

    def _predicted(self, stage: int, state: Array) -> Array:
        stages, request = self._call
        flags = self._program.structure.flags[stage]
        # Only what decides the predicted image: not the state that follows from it.
        flags = replace(
            flags,
            **dict.fromkeys(("read_h0", "read_h1", "read_h2", "write_h0", "write_h1", "write_h2"), False),
            add_noise=False,
            learned_variance=False,
        )
        output = as_floats(self._fetched(self._program.output), self._program.dtype)
        output = output.reshape(-1, *self._spec.output_shape)
        if not flags.guided:
            output = output[: len(state)]
        x0 = np.empty_like(state)
        NumpyStep(
            state=state,
            model_output=output,
            network_input=np.empty((flags.input_copies * len(state), *state.shape[1:]), np.float32),
            table=stages.table[stage : stage + 1],
            flags=[flags],
            guidance=request.guidance,
            rescale=request.rescale,
            thresholding=self._program.structure.thresholding,
            x0=x0,
        )(0)
        return x0

    def _fetched(self, buffer: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        memory = self._queue.pinned(buffer.num_bytes)
        self._queue.copy_out(memory, buffer)
        self._queue.record(memory)
        self._queue.wait_for(memory)
        found = memory.bytes.copy()
        self._queue.give_back(memory)
        return found
