"""The captured loop: a plan of any structure as one CUDA graph launch, at every batch size of an engine.

    copy in (seeds, plan, step inputs) -> one graph launch -> copy out

All batch sizes share an execution stream, the memory of activations and a lock: only one graph may be running, and a
small network fills the device no better in pairs. The lock is held while the host enqueues, for some tens of
microseconds, and not while the device works.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from skipstep.loops.call_block import PendingSamples
from skipstep.loops.contract import Array, Lifecycle, LoopReport, Run, replicate
from skipstep.loops.mixed import DeviceMix, step_kinds
from skipstep.loops.programs import DeviceLoopName, Program, Stepwise, compile_program, too_little_memory
from skipstep.loops.structure import Structure
from skipstep.loops.workspace import Workspace
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

# Structures that a loop keeps ready for each network batch size: plans of every length that a product offers.
MAX_PROGRAMS = 64


class CudaLoop:
    """One network on one GPU (skipstep.loops.contract.Loop). Calls from several threads run one after the other.

    `denoisers` by the network's batch size. `wanted` is the form that is requested (skipstep.loops.programs), and
    `required` refuses any other. `batch_sizes` are the numbers of samples for which `prepare` makes programs, with and
    without guidance where the network has it.
    """

    any_batch = False
    splits = None
    placement: str | None = None

    def __init__(
        self,
        denoisers: Mapping[int, DeviceDenoiser],
        network: NetworkSpec,
        device: Device,
        lifecycle: Lifecycle,
        *,
        batch_sizes: Sequence[int],
        wanted: DeviceLoopName = "captured",
        required: bool = False,
    ) -> None:
        self.name: str = wanted
        self.device = str(device.torch_device)
        self.device_name: str | None = device.name
        self._denoisers, self._network, self._device = denoisers, network, device
        self._lifecycle, self._batch_sizes = lifecycle, tuple(batch_sizes)
        self._wanted, self._required = wanted, required
        self._programs: OrderedDict[Structure, tuple[Program, LoopReport]] = OrderedDict()
        # What networks took while they ran, by batch size: to say what would fit where one did not.
        self._peaks: dict[int, int] = {}
        # Launches that were measured to be better than the rule's.
        self._launches: dict[LaunchCase, StepLaunch] = {}
        self._lock = threading.RLock()
        self._held, self._watched = _Held(self._lock, lifecycle, device), _Watched(lifecycle, device)
        # The denoisers' buffers were filled on the calling thread's stream.
        device.stream.follow(device.caller_stream())

    @property
    def reports(self) -> tuple[LoopReport, ...]:
        with self._held:
            return tuple(report for _, report in self._programs.values())

    def prepare(self, stages: Sequence[Stages]) -> None:
        """Make the programs of these plans, so that no call has to. Raises CaptureError and DeviceMemoryError."""
        for each in stages:
            for count, copies in self._cases():
                with self._held:
                    request = _blank_request(count, copies)
                    self._program(Structure.of(self._network, each, request))

    def enqueue(self, stages: Stages, request: SampleRequest, out: Any) -> DevicePending:
        """Enqueue a whole loop, whose first samples go to `out` (float32, NumPy or a tensor)."""
        device = self._device
        with self._held, device.range(f"skipstep {len(stages)}x{request.num_samples}"):
            program = self._program(Structure.of(self._network, stages, request))
            caller = device.caller_stream()
            # Whatever the caller enqueued comes first: what writes x_T, and what still reads `out`.
            device.stream.follow(caller)
            call = program.workspace.fill(stages, request)
            if isinstance(request.x_T, Tensor):
                # From here on the caller may write to it again.
                caller.follow(device.stream)
            samples = program.workspace.draw(program.launch, call, out)
            if isinstance(out, Tensor) and out.device == device.torch_device:
                caller.wait(samples.done)
        return DevicePending(samples, self._watched)

    @contextlib.contextmanager
    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> Iterator[Run]:
        with self._held:
            workspace = self._workspace(Structure.of(self._network, stages, request), keep_x0=keep_x0)
            self._device.stream.follow(self._device.caller_stream())
            try:
                yield DeviceRun(workspace, stages, request)
            finally:
                self._synchronize()

    def mix(self, stages: Sequence[Stages], max_rows: int) -> DeviceMix:
        requests = [_blank_request(1, copies) for copies in ((1, 2) if self._network.can_guide else (1,))]
        kinds = [step_kinds(self._network, each, request) for each in stages for request in requests]
        with self._held:
            made = DeviceMix(
                self._device,
                self._network,
                self._denoisers,
                {size: self._launch(size, 1) for size in self._denoisers},
                held=self._held,
                watched=self._watched,
                records=self._wanted != "stepwise",
                max_rows=max_rows,
                num_stages=max(map(len, stages), default=1),
            )
            made.prepare(list(dict.fromkeys(itertools.chain(*kinds))))
        return made

    def new_samples(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device=self._device.torch_device)

    def caller_order(self) -> Callable[[], None]:
        before = self._device.caller_stream().record()
        return lambda: self._device.stream.wait(before)

    def launch_cases(self) -> list[LaunchCase]:
        return list(dict.fromkeys(self._case(count, copies) for count, copies in self._cases()))

    def use_launches(self, launches: Mapping[LaunchCase, StepLaunch]) -> None:
        self._launches.update(launches)
        self.close()

    def close(self) -> None:
        """Release all programs; later calls make them again."""
        with self._lock:
            self._synchronize()
            self._programs.clear()
            self._device.release_memory()

    def _synchronize(self) -> None:
        """Wait for what was enqueued, before the memory that it uses is released. A lost context has nothing more."""
        with contextlib.suppress(RuntimeError):
            self._device.stream.record().synchronize()

    def _cases(self) -> list[tuple[int, int]]:
        """Numbers of samples and copies of each that calls come with, where there is a denoiser for them."""
        all_copies = (1, 2) if self._network.can_guide else (1,)
        return [(n, copies) for n in self._batch_sizes for copies in all_copies if n * copies in self._denoisers]

    def _case(self, num_samples: int, copies: int) -> LaunchCase:
        dtype = str(self._denoisers[num_samples * copies].input.dtype).removeprefix("torch.")
        return LaunchCase(self._network.num_elements, num_samples, dtype)

    def _launch(self, num_samples: int, copies: int) -> StepLaunch:
        case, device = self._case(num_samples, copies), self._device
        return self._launches.get(case) or choose_launch(
            num_elements=case.num_elements,
            batch_size=case.batch_size,
            num_multiprocessors=device.num_multiprocessors,
            compute_capability=device.compute_capability,
            network_item_size=case.item_size,
        )

    def _workspace(self, structure: Structure, *, keep_x0: bool = False) -> Workspace:
        copies = 2 if structure.guided else 1
        return Workspace(
            self._device,
            self._denoisers[copies * structure.num_samples],
            self._network,
            structure,
            alone=self._denoisers.get(structure.num_samples) if structure.needs_half else None,
            keep_x0=keep_x0,
            launch=self._launch(structure.num_samples, copies),
        )

    def _program(self, structure: Structure) -> Program:
        held = self._programs.get(structure)
        if held is None:
            while len(self._programs) >= MAX_PROGRAMS * len(self._denoisers):
                self._synchronize()
                self._programs.popitem(last=False)
            free = self._device.free_bytes()
            try:
                workspace = self._workspace(structure)
            except torch.OutOfMemoryError as error:
                self._device.release_memory()
                denoiser = self._denoisers[structure.num_samples * (2 if structure.guided else 1)]
                raise too_little_memory(denoiser, structure, free, self._peaks) from error
            held = compile_program(workspace, self._wanted, required=self._required, peaks=self._peaks)
            self._programs[structure] = held
        self._programs.move_to_end(structure)
        return held[0]


def _blank_request(count: int, copies: int) -> SampleRequest:
    guidance = np.ones(count, np.float32) if copies == 2 else None
    return SampleRequest(count, np.zeros(count, np.uint64), None, guidance)


class _Watched:
    """Find out whether an error has broken the device for good. Raises EngineStateError."""

    def __init__(self, lifecycle: Lifecycle, device: Device) -> None:
        self._lifecycle, self._device = lifecycle, device

    def __enter__(self) -> None:
        """Errors are looked at when they leave."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        own = EngineStateError | torch.OutOfMemoryError
        if isinstance(error, RuntimeError) and not isinstance(error, own) and self._device.is_lost():
            self._lifecycle.lose((str(error) or type(error).__name__).splitlines()[0])
            self._lifecycle.check()


class _Held(_Watched):
    """The same, for an engine that may be used, with its lock held. A thread may enter it again."""

    def __init__(self, lock: threading.RLock, lifecycle: Lifecycle, device: Device) -> None:
        super().__init__(lifecycle, device)
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._lifecycle.check()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            super().__exit__(kind, error, traceback)
        finally:
            self._lock.release()


class DevicePending:
    """Samples that are being drawn (skipstep.loops.contract.Pending)."""

    __slots__ = ("_samples", "_watched")

    def __init__(self, samples: PendingSamples, watched: _Watched) -> None:
        self._samples, self._watched = samples, watched

    def wait(self) -> dict[int, int | None]:
        """See Pending.wait. Raises EngineStateError where the CUDA context is lost."""
        with self._watched:
            return self._samples.wait()


class DeviceRun:
    """A call under way for observers: the same launches, one evaluation at a time."""

    def __init__(self, workspace: Workspace, stages: Stages, request: SampleRequest) -> None:
        self._workspace = workspace
        self._steps = Stepwise(workspace)
        call = workspace.fill(stages, request)
        workspace.device.stream.run(lambda: workspace.copy_in(call))
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
