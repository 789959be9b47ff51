"""The loop on a GPU: a call is one copy in, one launch and one copy out, and the host waits for nothing between.

    caller's stream   ──▶ (event) ─────────────────────────────────────────▶ (event) ──▶
    engine's stream        └─▶ copy in ─▶ begin, network, step, network, … ─▶ copy out ─┘

The loops of one engine share a stream and a lock (Lane): their graphs share the memory of activations, so only one may
be running, and a small network fills the device no better in pairs. The lock is held while the host enqueues, for some
tens of microseconds, and not while the device works.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipstep.backends.denoiser import DeviceDenoiser
from skipstep.calls.request import SampleRequest
from skipstep.cuda.device import Device
from skipstep.errors import EngineStateError
from skipstep.kernels.autotune import LaunchCase
from skipstep.kernels.launch import StepLaunch, choose_launch
from skipstep.loops.lifecycle import Lifecycle
from skipstep.loops.programs import CaptureReport, DeviceLoopName, Program, Stepwise, compile_program, too_little_memory
from skipstep.loops.stepwise import Array, Run, replicate
from skipstep.loops.workspace import Drawn, Structure, Workspace
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

# Structures that a loop keeps ready: plans of every length that a product offers, with and without guidance.
MAX_PROGRAMS = 64


class Lane:
    """One device, its stream and the lock of those who enqueue on it; what an engine's loops share."""

    def __init__(self, device: Device, lifecycle: Lifecycle) -> None:
        self.device = device
        self.lifecycle = lifecycle
        # What networks took while they ran, by batch size: to say what would fit where one did not.
        self.peaks: dict[int, int] = {}
        # Launches that were measured to be better than the rule's.
        self.launches: dict[LaunchCase, StepLaunch] = {}
        self.lock = threading.RLock()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock, and find out whether an error has broken the device for good. Raises EngineStateError."""
        with self.lock:
            self.lifecycle.check()
            with self.watched():
                yield

    def come_to_rest(self) -> None:
        """Wait for what was enqueued, before the memory that it uses is given back. A lost context has nothing more."""
        with contextlib.suppress(RuntimeError):
            self.device.stream.record().synchronize()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, EngineStateError | torch.OutOfMemoryError) and self.device.is_lost():
                self.lifecycle.lose((str(error) or type(error).__name__).splitlines()[0])
                self.lifecycle.check()
            raise


class CudaLoop:
    """One network at one batch size. Calls from several threads are safe, and run one after the other.

    `wanted` is the best way that is asked for (skipstep.loops.programs); `required` refuses any other. `copies` are how
    often calls show the network a sample (1, and 2 for guided calls): what `prepare` makes programs for.
    """

    def __init__(
        self,
        denoiser: DeviceDenoiser,
        network: NetworkSpec,
        lane: Lane,
        *,
        wanted: DeviceLoopName = "captured",
        required: bool = False,
        copies: Sequence[int] = (1,),
    ) -> None:
        self.name: str = wanted
        self.denoiser = denoiser
        self._network, self._lane = network, lane
        self._wanted, self._required, self._copies = wanted, required, tuple(copies)
        self._programs: OrderedDict[Structure, tuple[Program, CaptureReport]] = OrderedDict()

    @property
    def reports(self) -> tuple[CaptureReport, ...]:
        with self._lane.held():
            return tuple(report for _, report in self._programs.values())

    def prepare(self, stages: Sequence[Stages]) -> None:
        """Make the programs of these plans, so that no call has to. Raises CaptureError and DeviceMemoryError."""
        for each in stages:
            for copies in self._copies:
                with self._lane.held():
                    self._program(Structure.of(self._network, each, self._blank_request(copies)))

    def enqueue(self, stages: Stages, request: SampleRequest, out: Any) -> Pending:
        """Enqueue a whole loop, whose first samples go to `out` (float32, NumPy or a tensor)."""
        device = self._lane.device
        with self._lane.held(), device.range(f"skipstep {len(stages)}x{request.num_samples}"):
            program = self._program(Structure.of(self._network, stages, request))
            caller = device.caller_stream()
            # Whatever the caller enqueued comes first: what writes x_T, and what still reads `out`.
            device.stream.wait(caller.record())
            program.workspace.fill(stages, request)
            if isinstance(request.x_T, Tensor):
                # From here on the caller may write to it again.
                caller.wait(device.stream.record())
            program.launch()
            drawn = program.workspace.give_back(out)
            if isinstance(out, Tensor) and out.device == device.torch_device:
                caller.wait(drawn.done)
        return Pending(drawn, self._lane)

    @contextlib.contextmanager
    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> Iterator[Run]:
        with self._lane.held():
            workspace = Workspace(
                self._lane.device,
                self.denoiser,
                self._network,
                Structure.of(self._network, stages, request),
                keep_x0=keep_x0,
                launch=self._launch(request.num_samples),
            )
            self._lane.device.stream.wait(self._lane.device.caller_stream().record())
            try:
                yield CudaRun(workspace, stages, request)
            finally:
                self._lane.come_to_rest()

    def launch_cases(self) -> list[LaunchCase]:
        """What the step is launched for, once for each number of samples."""
        return [self._case(self.denoiser.batch_size // copies) for copies in self._copies]

    def forget(self) -> None:
        """Give back all programs; the next calls make them anew."""
        with self._lane.lock:
            self._lane.come_to_rest()
            self._programs.clear()
            self._lane.device.release_memory()

    close = forget

    def _case(self, num_samples: int) -> LaunchCase:
        dtype = str(self.denoiser.input.dtype).removeprefix("torch.")
        return LaunchCase(self._network.num_elements, num_samples, dtype)

    def _launch(self, num_samples: int) -> StepLaunch:
        case, device = self._case(num_samples), self._lane.device
        return self._lane.launches.get(case) or choose_launch(
            num_elements=case.num_elements,
            batch_size=case.batch_size,
            num_multiprocessors=device.num_multiprocessors,
            compute_capability=device.compute_capability,
            network_item_size=case.item_size,
        )

    def _program(self, structure: Structure) -> Program:
        held = self._programs.get(structure)
        if held is None:
            while len(self._programs) >= MAX_PROGRAMS:
                self._lane.come_to_rest()
                self._programs.popitem(last=False)
            device, free = self._lane.device, self._lane.device.free_bytes()
            try:
                launch = self._launch(structure.num_samples)
                workspace = Workspace(device, self.denoiser, self._network, structure, launch=launch)
            except torch.OutOfMemoryError as error:
                device.release_memory()
                raise too_little_memory(self.denoiser, structure, free, self._lane.peaks) from error
            held = compile_program(workspace, self._wanted, required=self._required, peaks=self._lane.peaks)
            self._programs[structure] = held
        self._programs.move_to_end(structure)
        return held[0]

    def _blank_request(self, copies: int) -> SampleRequest:
        count = self.denoiser.batch_size // copies
        guidance = np.ones(count, np.float32) if copies == 2 else None
        return SampleRequest(count, np.zeros(count, np.uint64), None, None, guidance)


class Pending:
    """Samples that are being drawn."""

    def __init__(self, drawn: Drawn, lane: Lane) -> None:
        self._drawn, self._lane = drawn, lane

    def wait(self) -> dict[int, int | None]:
        """Return when they are there: those that are not finite, and since which stage. Raises EngineStateError."""
        with self._lane.watched():
            return self._drawn.wait()


class CudaRun:
    """A loop that somebody looks at: the same launches, one evaluation at a time."""

    def __init__(self, workspace: Workspace, stages: Stages, request: SampleRequest) -> None:
        self._workspace = workspace
        self._steps = Stepwise(workspace)
        workspace.fill(stages, request)
        self._steps.begin()

    def advance(self, stage: int) -> None:
        self._steps.advance(stage)

    def state(self) -> Array:
        return self._read(self._workspace.state)

    def x0(self) -> Array:
        assert self._workspace.x0 is not None, "the run was started with keep_x0"
        return self._read(self._workspace.x0)

    def set_state(self, state: Array) -> None:
        device, workspace = self._workspace.device, self._workspace
        staging = device.staging(state.nbytes).view(torch.float32).view(state.shape)
        staging.copy_(torch.from_numpy(np.ascontiguousarray(state)))

        def write() -> None:
            workspace.state.copy_(staging, non_blocking=True)
            replicate(workspace.state, workspace.denoiser.input)

        device.stream.run(write)

    def _read(self, tensor: Tensor) -> Array:
        device = self._workspace.device
        staging = device.staging(tensor.nbytes).view(torch.float32).view(tensor.shape)
        device.stream.run(lambda: staging.copy_(tensor, non_blocking=True))
        device.stream.record().synchronize()
        copied: Array = staging.numpy().copy()
        return copied
