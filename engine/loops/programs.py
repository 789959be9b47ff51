"""Three forms of a loop on a GPU, from the one with the fewest launches from the host to the one with the most.

    captured     one CUDA graph of everything: one launch a call
    step_graph   a graph of one evaluation and its step, launched E times; the stage is counted on the device
    stepwise     every kernel launched by the host

All three launch the same kernels on the same memory, and draw the same bits. The first needs one launch from the host,
but its graph grows with the number of evaluations; the second is bounded, for one short launch a step. So a loop is
captured whole as long as its graph stays within MAX_NODES, and step by step beyond. Where a network cannot be recorded,
or memory does not suffice, the next form is taken, and the report says why.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import torch

from skipstep.backends.denoiser import DeviceDenoiser
from skipstep.cuda.device import Graph, Work
from skipstep.errors import CaptureError, DeviceMemoryError
from skipstep.kernels.layout import StepFlags
from skipstep.loops.contract import LoopReport
from skipstep.loops.structure import Structure
from skipstep.loops.workspace import Contexts, Workspace

DeviceLoopName = Literal["captured", "step_graph", "stepwise"]
LADDER: Final[tuple[DeviceLoopName, ...]] = ("captured", "step_graph", "stepwise")

# A node takes the driver about a kilobyte, on the host and on the device, and a microsecond or more to launch: at this
# many one launch has saved all that it can, and memory is what grows.
MAX_NODES: Final = 1 << 16
# Where the driver does not count them: as many nodes as a large UNet's step has.
_ASSUMED_NODES: Final = 1 << 10


class Program(Protocol):
    """A loop that is ready to be launched, on whatever the workspace was filled with."""

    @property
    def workspace(self) -> Workspace: ...

    def launch(self) -> None:
        """Enqueue all of it on the current stream, which is the engine's."""
        ...


@dataclass(slots=True)
class Stepwise:
    workspace: Workspace
    _contexts: Contexts = field(init=False)

    def __post_init__(self) -> None:
        self._contexts = self.workspace.new_contexts()

    def begin(self) -> None:
        self.workspace.device.stream.run(self.workspace.begin)

    def advance(self, stage: int) -> None:
        self.workspace.device.stream.run(lambda: self.workspace.advance(self._contexts, stage))

    def launch(self) -> None:
        self.workspace.begin()
        for stage in range(len(self.workspace.structure)):
            self.workspace.advance(self._contexts, stage)


@dataclass(frozen=True, slots=True)
class StepGraphs:
    """`begin`, and a graph for each set of flags that a stage may have."""

    workspace: Workspace
    begin: Graph
    steps: dict[StepFlags, Graph]
    # Graphs use it as long as they live.
    contexts: Contexts

    def launch(self) -> None:
        self.begin.replay()
        for flags in self.workspace.structure.flags:
            self.steps[flags].replay()

    @property
    def graphs(self) -> list[Graph]:
        return [self.begin, *self.steps.values()]

    @property
    def num_nodes(self) -> int:
        """As many nodes as the whole loop would have."""
        flags = self.workspace.structure.flags
        return sum(_ASSUMED_NODES if n is None else n for n in (self.steps[each].num_nodes for each in flags))


@dataclass(frozen=True, slots=True)
class WholeGraph:
    workspace: Workspace
    graph: Graph
    contexts: Contexts

    def launch(self) -> None:
        self.graph.replay()


def compile_program(
    workspace: Workspace, wanted: DeviceLoopName, *, required: bool = False, peaks: dict[int, int] | None = None
) -> tuple[Program, LoopReport]:
    """The first program from `wanted` down the ladder that can be made, and its report.

    `peaks` are the bytes that networks took while they ran, by batch size: this one's is added. Raises CaptureError,
    where `required`, for anything less than `wanted`; DeviceMemoryError where memory does not suffice for the
    network itself, or for a capture that is required; and whatever the network raises when it merely runs.
    """
    started = time.perf_counter()
    device, structure, denoiser = workspace.device, workspace.structure, workspace.denoiser
    peaks = {} if peaks is None else peaks
    free = device.free_bytes()

    def report(loop: DeviceLoopName, graphs: Sequence[Graph], reasons: list[str]) -> LoopReport:
        counts = [graph.num_nodes for graph in graphs]
        return LoopReport(
            loop,
            len(structure),
            structure.num_samples,
            structure.guided,
            None if not graphs or None in counts else sum(n or 0 for n in counts),
            time.perf_counter() - started,
            sum(graph.num_bytes for graph in graphs),
            "; ".join([*reasons, *([] if denoiser.fallback is None else [denoiser.fallback])]),
        )

    plain = Stepwise(workspace)

    with device.range(f"skipstep warm up {len(structure)}x{structure.num_samples}"):
        try:
            peaks[denoiser.batch_size] = device.warm_up(_each_step(workspace, plain._contexts, counted=False))
        except torch.OutOfMemoryError as error:
            device.release_memory()
            raise too_little_memory(denoiser, structure, free, peaks) from error
    if wanted == "stepwise":
        return plain, report("stepwise", [], [])
    if denoiser.capture_refusal is not None:
        return _settle(plain, report("stepwise", [], [denoiser.capture_refusal]), wanted, required)

    reasons: list[str] = []
    try:
        with device.range(f"skipstep capture {len(structure)}x{structure.num_samples}"):
            steps = _capture_steps(workspace)
            if wanted == "captured" and steps.num_nodes > MAX_NODES:
                reasons.append(f"the whole would have {steps.num_nodes} nodes, more than {MAX_NODES}")
            elif wanted == "captured":
                try:
                    whole = _capture_whole(workspace)
                except torch.OutOfMemoryError:
                    if required:
                        raise
                    device.release_memory()
                    reasons.append(f"no memory for {steps.num_nodes} nodes")
                else:
                    return whole, report("captured", [whole.graph], [])
    except torch.OutOfMemoryError as error:
        # What was half made is held by the error's frames alone.
        error.__traceback__ = None
        device.release_memory()
        if required:
            raise too_little_memory(denoiser, structure, free, peaks) from error
        return plain, report("stepwise", [], ["no memory to record a step"])
    except RuntimeError as error:
        if device.is_lost():
            raise
        reason = f"{denoiser.name} cannot be recorded: {(str(error) or type(error).__name__).splitlines()[0]}"
        return _settle(plain, report("stepwise", [], [reason]), wanted, required)
    return _settle(steps, report("step_graph", steps.graphs, reasons), wanted, required)


def _settle(program: Program, report: LoopReport, wanted: DeviceLoopName, required: bool) -> tuple[Program, LoopReport]:
    if required and report.loop != wanted:
        raise CaptureError(
            got=f"{report.num_stages} evaluations at batch {report.batch_size} that run {report.loop}: {report.reason}",
            expected=f"loop='{wanted}', as require_captured demands",
            remedy="leave require_captured out to take the next best, or change what stands in the way",
        )
    return program, report


def _capture_steps(workspace: Workspace) -> StepGraphs:
    contexts = workspace.new_contexts()
    workspace.device.warm_up(_each_step(workspace, contexts, counted=True))
    steps = {
        flags: workspace.device.capture(_step(workspace, contexts, stage))
        for flags, stage in _first_of_each(workspace.structure.flags).items()
    }
    return StepGraphs(workspace, workspace.device.capture(workspace.begin), steps, contexts)


def _step(workspace: Workspace, contexts: Contexts, stage: int) -> Work:
    return lambda: workspace.advance(contexts, stage, counted=True)


def _capture_whole(workspace: Workspace) -> WholeGraph:
    contexts = workspace.new_contexts()
    workspace.device.warm_up(_each_step(workspace, contexts, counted=False))

    def everything() -> None:
        workspace.begin()
        for stage in range(len(workspace.structure)):
            workspace.advance(contexts, stage)

    return WholeGraph(workspace, workspace.device.capture(everything), contexts)


def _each_step(workspace: Workspace, contexts: Contexts, *, counted: bool) -> Work:
    """Every kernel that a loop will launch: nothing may be compiled or loaded while it is recorded."""

    def work() -> None:
        workspace.begin()
        for stage in _first_of_each(workspace.structure.flags).values():
            workspace.advance(contexts, stage, counted=counted)
            if counted:
                workspace.counter.zero_()

    return work


def _first_of_each(flags: tuple[StepFlags, ...]) -> dict[StepFlags, int]:
    first: dict[StepFlags, int] = {}
    for stage, each in enumerate(flags):
        first.setdefault(each, stage)
    return first


def too_little_memory(
    denoiser: DeviceDenoiser, structure: Structure, free: int, peaks: Mapping[int, int]
) -> DeviceMemoryError:
    """What was free, what is known of this network's needs, and the batch that would fit."""
    size, copies = denoiser.batch_size, 2 if structure.guided else 1
    per_sample = max((num_bytes / batch for batch, num_bytes in peaks.items()), default=0.0)
    if per_sample:
        fits = int(free / per_sample) // copies
        needs = f"about {per_sample * size / 2**20:.0f} MiB at {per_sample / 2**20:.1f} MiB a sample"
        remedy = f"build with batch sizes up to {fits}" if fits else "free memory on the device, or use half precision"
    else:
        needs, remedy = "more", f"build with a batch size below {structure.num_samples}"
    return DeviceMemoryError(
        got=f"{free / 2**20:.0f} MiB free for {len(structure)} evaluations of a batch of {size}",
        expected=needs,
        remedy=remedy + ", or free what other programs hold",
    )
