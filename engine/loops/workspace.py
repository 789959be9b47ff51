"""Everything on the device that a loop of one structure works with, and the launches of one evaluation.

    call block   seeds, guidance, where to begin, which stage comes next, which samples broke,   one copy a call
                 and the network's step inputs that all stages share
    plan block   coefficients, and the network's step inputs of each stage                       one copy, if it changed
    state …      the float32 state, and the solver's history

A graph recorded from these launches reads nothing but this memory, so whatever may change between calls is in it: plan,
seeds, labels, prompts, guidance. Only the structure is fixed in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.backends.denoiser import DeviceDenoiser, Enqueue
from skipstep.calls.conditioning import call_conditioning
from skipstep.calls.request import SampleRequest
from skipstep.cuda.device import Device, Event
from skipstep.kernels.launch import DEFAULT_LAUNCH, StepLaunch
from skipstep.kernels.layout import NUM_COLUMNS, StepFlags
from skipstep.kernels.statistics import Thresholding, sample_statistics
from skipstep.kernels.step import ddim_step, initial_noise
from skipstep.loops.buffers import Block, Field, Piece, Staging, floats, step_input_fields
from skipstep.loops.contract import call_flags
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

# No stage has broken a sample.
_SOUND = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Structure:
    """What a graph is made for: the flags of every stage, how it thresholds, B samples, and rows of a stage's table
    (1, or B where samples follow plans of their own). All else is data."""

    flags: tuple[StepFlags, ...]
    thresholding: Thresholding | None
    num_samples: int
    rows: int
    # Of the fields above; a thousand stages take longer to hash than a call takes otherwise.
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.flags, self.thresholding, self.num_samples, self.rows)))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, network: NetworkSpec, stages: Stages, request: SampleRequest) -> Structure:
        kind = request.num_samples, request.guidance is not None, request.rescale is not None, network.learns_variance
        held = stages.structures.get(kind)
        if held is None:
            flags = call_flags(network, stages, request)
            held = cls(flags, stages.thresholding, request.num_samples, stages.table.shape[1])
            stages.structures[kind] = held
        return held

    @property
    def guided(self) -> bool:
        """Whether the call is: single stages may be made without guidance."""
        return self.flags[0].guided or self.flags[0].doubled

    @property
    def needs_half(self) -> bool:
        """Whether some stage of a guided call is made without guidance."""
        return any(flags.doubled for flags in self.flags)

    def __len__(self) -> int:
        return len(self.flags)


@dataclass(frozen=True, slots=True)
class Contexts:
    """How to evaluate the network on the whole batch, and on half of it where a stage is made without guidance."""

    whole: Enqueue
    alone: Enqueue | None


class Workspace:
    """Memory for `structure`, and what is launched on it. All methods want the engine's lock held.

    `alone`: a denoiser of half the batch, for the stages that a guided call makes without guidance. They run the whole
    batch where there is none, or where it reads other step inputs: a module may be another graph at another size.
    """

    def __init__(
        self,
        device: Device,
        denoiser: DeviceDenoiser,
        network: NetworkSpec,
        structure: Structure,
        *,
        alone: DeviceDenoiser | None = None,
        keep_x0: bool = False,
        launch: StepLaunch = DEFAULT_LAUNCH,
    ) -> None:
        self.device, self.denoiser, self.structure = device, denoiser, structure
        self._alone = None if alone is None or alone.step_inputs != denoiser.step_inputs else alone
        self._network, self._launch = network, launch
        count, stages = structure.num_samples, len(structure)
        inputs = step_input_fields(denoiser, stages)
        self._shared = [name for name, each in denoiser.step_inputs.items() if not each.per_stage]
        self._call = Block(
            device,
            {
                "seeds": Field((count,), torch.int64),
                "guidance": Field((count,), torch.float32),
                "rescale": Field((count,), torch.float32),
                "given": Field((1,), torch.int32),
                "counter": Field((1,), torch.int32),
                "broken": Field((count,), torch.int32),
                **{name: each for name, each in inputs.items() if name in self._shared},
            },
        )
        table = Field((stages, structure.rows, NUM_COLUMNS), torch.float32)
        self._plan = Block(
            device, {"table": table, **{name: each for name, each in inputs.items() if name not in self._shared}}
        )
        self._table = self._plan.tensors["table"]
        self._step_inputs = {name: {**self._call.tensors, **self._plan.tensors}[name] for name in inputs}
        # The first half of the batch has the condition; the rows of a stage begin where they did.
        self._half_inputs = {
            name: each[:count] if name in self._shared else each[:, :count] for name, each in self._step_inputs.items()
        }
        # What the step inputs follow from: the stages of the plan block, the conditioning's bytes; and the values that
        # all stages share. Whether those of a stage follow from the conditioning, too, is seen when they are computed.
        self._stages: Stages | None = None
        self._conditioned: tuple[bytes, ...] = ()
        self._values: dict[str, NDArray[Any]] = {}
        self._stages_depend = True
        shape = (count, *network.sample_shape)
        num_bytes = 4 * count * network.num_elements
        self._given = Staging(device, num_bytes, floats(shape))
        self._drawn = Staging(device, num_bytes, floats(shape))
        self._broken = Staging(device, 4 * count, lambda memory: memory.view(torch.int32))

        def image() -> Tensor:
            return device.zeros(shape, torch.float32)

        self.state = image()
        self.x0 = image() if keep_x0 else None
        # Zeros: what a step reads must be finite, also while graphs are recorded.
        slots = max(flags.num_slots for flags in structure.flags)
        self._history = device.zeros((slots, *shape), torch.float32) if slots else None
        # The zeros are the calling thread's; what is launched here must not come before them.
        device.stream.wait(device.caller_stream().record())

    @property
    def counter(self) -> Tensor:
        """int32 `[1]` on the device: the stage that comes next, for graphs of one step."""
        return self._call.tensors["counter"]

    def fill(self, stages: Stages, request: SampleRequest) -> None:
        """Enqueue the copies that a call brings. A device x_T is read on the engine's stream."""
        conditioning = call_conditioning(self._network, request)
        conditioned = tuple(array.tobytes() for array in (conditioning.index, *conditioning.rows.values()))
        planned = stages is self._stages and (conditioned == self._conditioned or not self._stages_depend)
        if not planned or conditioned != self._conditioned:
            self._stages = None
            timesteps = stages.network_timesteps(request.num_copies, request.num_samples)
            values = self.denoiser.compute(timesteps[:1] if planned else timesteps, conditioning)
            if not planned:
                self._stages_depend = any(name in values.call for name in self._step_inputs)
                per_stage = [name for name in self._step_inputs if name not in self._shared]
                self._plan.fill({"table": stages.table, **{name: values.expanded(name) for name in per_stage}})
            self._values = {name: values.expanded(name) for name in self._shared}
            self._stages, self._conditioned = stages, conditioned
        self._call.fill(
            {
                **self._values,
                # torch has no arithmetic on uint64; the kernels read the same 64 bits.
                "seeds": None if request.seeds is None else request.seeds.view(np.int64),
                "guidance": request.guidance,
                "rescale": request.rescale,
                "given": request.x_T is not None,
                "broken": _SOUND,
            }
        )
        if request.x_T is not None:
            self._give_state(request.x_T)

    def _give_state(self, x_T: Any) -> None:
        if isinstance(x_T, Tensor):
            self.device.stream.run(lambda: self.state.copy_(x_T, non_blocking=True))
            return
        piece, stream = self._given.take(), self.device.stream
        piece.view[...] = x_T
        stream.run(lambda: self.state.view(-1).view(torch.uint8).copy_(piece.memory, non_blocking=True))
        self._given.give_back(piece, after=stream.record())

    def begin(self) -> None:
        """Launch what comes before the first evaluation: x_T of the seeds, or the state that was given."""
        initial_noise(
            state=self.state,
            network_input=self.denoiser.input,
            seeds=self._call.tensors["seeds"],
            given=self._call.tensors["given"],
            launch=self._launch,
        )

    def new_contexts(self) -> Contexts:
        """What a program evaluates the network with; it keeps them as long as its graphs live."""
        return Contexts(self.denoiser.new_context(), None if self._alone is None else self._alone.new_context())

    def advance(self, contexts: Contexts, stage: int, *, counted: bool = False) -> None:
        """Launch one evaluation and its step. `counted`: the stage is read on the device, and counted up; `stage` only
        says which flags."""
        flags = self.structure.flags[stage]
        call, counter = self._call.tensors, self.counter if counted else None
        place, output = stage if counter is None else counter, self.denoiser.output
        if flags.doubled and self._alone is not None and contexts.alone is not None:
            self._alone.input.copy_(self.state)
            contexts.alone(self._half_inputs, place)
            output = self._alone.output
        else:
            contexts.whole(self._step_inputs, place)
            if flags.doubled:  # Of the predictions with the condition, which come first.
                output = output[: self.structure.num_samples]
        rescale = bound = None
        if flags.rescale or flags.threshold:
            rescale, bound = sample_statistics(
                self.state,
                output,
                self._table[stage] if counter is None else self._table.index_select(0, counter)[0],
                flags,
                guidance=call["guidance"],
                rescale=call["rescale"],
                thresholding=self.structure.thresholding,
            )
        ddim_step(
            state=self.state,
            model_output=output,
            network_input=self.denoiser.input,
            table=self._table,
            stage=stage,
            flags=flags,
            seeds=call["seeds"],
            guidance=call["guidance"],
            rescale=rescale,
            bound=bound,
            history=self._history,
            x0=self.x0,
            counter=counter,
            broken=call["broken"],
            launch=self._launch,
        )
        if counter is not None:
            counter.add_(1)

    def copy_out(self, out: Any) -> PendingSamples:
        """Enqueue the copy of the first samples to `out`, a NumPy array or a tensor, and of what broke."""
        count, stream = len(out), self.device.stream
        broken = self._broken.take()
        drawn = None if isinstance(out, Tensor) and out.device == self.state.device else self._drawn.take()

        def copy() -> None:
            broken.view.copy_(self._call.tensors["broken"], non_blocking=True)
            if drawn is None:
                out.copy_(self.state[:count], non_blocking=True)
            else:
                drawn.memory.copy_(self.state.view(-1).view(torch.uint8), non_blocking=True)

        stream.run(copy)
        return PendingSamples(self, stream.record(), count, broken, drawn, out)

    def give_back(self, samples: PendingSamples) -> None:
        self._broken.give_back(samples.broken)
        if samples.drawn is not None:
            self._drawn.give_back(samples.drawn)


@dataclass(frozen=True, slots=True)
class PendingSamples:
    """Samples on their way to the caller: `count` of them, through `drawn` if `out` is not on the device."""

    workspace: Workspace
    done: Event
    count: int
    broken: Piece[Tensor]
    drawn: Piece[NDArray[np.float32]] | None
    out: Any

    def wait(self) -> dict[int, int | None]:
        """Return when the samples have arrived: which are not finite, and since which stage. Call it once."""
        self.done.synchronize()
        if self.drawn is not None:
            samples = self.drawn.view[: self.count]
            self.out[...] = samples if isinstance(self.out, np.ndarray) else torch.from_numpy(samples)
        stages = self.broken.view[: self.count].tolist()
        self.workspace.give_back(self)
        return {sample: stage for sample, stage in enumerate(stages) if stage != _SOUND}
