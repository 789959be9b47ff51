"""Everything on the device that a loop of one structure works with, and the launches of one evaluation.

    call block   what a call brings and takes away (skipstep.loops.call_block), the state        one copy each a call
    plan block   coefficients, and the network's step inputs of each stage                       one copy, if it changed
    history      the solver's

A graph recorded from these launches reads nothing but this memory, so whatever may change between calls is in it: plan,
seeds, labels, prompts, guidance. Only the structure is fixed in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.backends.denoiser import DeviceDenoiser, Enqueue
from skipstep.calls.conditioning import call_conditioning
from skipstep.calls.request import SampleRequest
from skipstep.cuda.device import Device, Work
from skipstep.kernels.launch import DEFAULT_LAUNCH, StepLaunch
from skipstep.kernels.layout import NUM_COLUMNS
from skipstep.kernels.statistics import sample_statistics
from skipstep.kernels.step import ddim_step, initial_noise
from skipstep.loops.buffers import Field, StagedBlock, is_channels_last, state_zeros, step_input_fields
from skipstep.loops.call_block import CallBlock, HostCall, PendingSamples
from skipstep.loops.structure import Structure
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

# Of values by conditions that a workspace keeps.
_KEPT_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Contexts:
    """How to evaluate the network on the whole batch, and on half of it where a stage is made without guidance."""

    whole: Enqueue
    alone: Enqueue | None


class Workspace:
    """Memory for `structure`, and what is launched on it. All methods want the engine's lock held.

    `alone`: a denoiser of half the batch, for the stages that a guided call makes without guidance. They run the whole
    batch where there is none, or where it reads other step inputs: a module may be another graph at another size. The
    state is in the network's order in memory, so nothing is converted between stages.
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
        last = is_channels_last(denoiser)
        alike = alone is not None and (alone.step_inputs, is_channels_last(alone)) == (denoiser.step_inputs, last)
        self._alone = alone if alike else None
        self._network, self._launch = network, launch
        count, stages = structure.num_samples, len(structure)
        inputs = step_input_fields(denoiser, stages)
        self._shared = [name for name, each in denoiser.step_inputs.items() if not each.per_stage]
        shape = (count, *network.sample_shape)
        shared = {name: each for name, each in inputs.items() if name in self._shared}
        self._call = CallBlock(device, count, network.sample_shape, shared, channels_last=last)
        table = Field((stages, structure.rows, NUM_COLUMNS), torch.float32)
        self._plan = StagedBlock(
            device, {"table": table, **{name: each for name, each in inputs.items() if name not in self._shared}}
        )
        self._table = self._plan.tensors["table"]
        self._step_inputs = {name: {**self._call.tensors, **self._plan.tensors}[name] for name in inputs}
        # The first half of the batch has the condition; the rows of a stage begin where they did.
        self._half_inputs = {
            name: each[:count] if name in self._shared else each[:, :count] for name, each in self._step_inputs.items()
        }
        # What the step inputs follow from: the stages of the plan block, the conditions' bytes; and the values that all
        # stages share. Whether those of a stage follow from the conditions, too, is seen when they are computed.
        self._stages: Stages | None = None
        self._conditions: tuple[tuple[str, bytes], ...] | None = None
        self._values: dict[str, NDArray[Any]] = {}
        # Those values by the conditions that they follow from: labels come again.
        self._known: dict[tuple[tuple[str, bytes], ...], dict[str, NDArray[Any]]] = {}
        self._known_bytes = 0
        self._stages_depend = True
        self.state = self._call.tensors["state"]
        self.x0 = state_zeros(device, shape, channels_last=last) if keep_x0 else None
        # Zeros: what a step reads must be finite, also while graphs are recorded.
        slots = max(flags.num_slots for flags in structure.flags)
        self._history = device.zeros((slots, *shape), torch.float32) if slots else None
        # The zeros are the calling thread's; what is launched here must not come before them.
        device.stream.follow(device.caller_stream())

    @property
    def counter(self) -> Tensor:
        """int32 `[1]` on the device: the stage that comes next, for graphs of one step."""
        return self._call.tensors["counter"]

    def fill(self, stages: Stages, request: SampleRequest) -> HostCall:
        """Write what a call brings to host memory, for `copy_in`. What a plan brings is enqueued, and so is the copy of
        a device x_T, which is read on the engine's stream."""
        conditions = request.condition_bytes()
        same = conditions == self._conditions
        planned = stages is self._stages and (same or not self._stages_depend)
        if planned and not same and conditions in self._known:
            self._values, self._conditions = self._known[conditions], conditions
        elif not planned or not same:
            self._compute(stages, request, planned=planned)
            self._stages, self._conditions = stages, conditions
            self._keep(conditions)
        if isinstance(request.x_T, Tensor):
            x_T = request.x_T
            self.device.stream.run(lambda: self.state.copy_(x_T, non_blocking=True))
        return self._call.take(request, self._values)

    def _compute(self, stages: Stages, request: SampleRequest, *, planned: bool) -> None:
        """The step inputs; those of stages are enqueued unless they are there already (`planned`)."""
        self._stages = None
        timesteps = stages.network_timesteps(request.num_copies, request.num_samples)
        values = self.denoiser.compute(
            timesteps[:1] if planned else timesteps, call_conditioning(self._network, request)
        )
        if not planned:
            self._stages_depend = any(name in values.call for name in self._step_inputs)
            per_stage = [name for name in self._step_inputs if name not in self._shared]
            self._plan.fill({"table": stages.table, **{name: values.expanded(name) for name in per_stage}})
        self._values = {name: values.expanded(name) for name in self._shared}

    def _keep(self, conditions: tuple[tuple[str, bytes], ...]) -> None:
        """The values that were computed, if nothing else has to be computed for these conditions."""
        num_bytes = sum(len(data) for _, data in conditions) + sum(each.nbytes for each in self._values.values())
        if not self._stages_depend and num_bytes <= _KEPT_BYTES:
            if self._known_bytes + num_bytes > _KEPT_BYTES:
                self._known, self._known_bytes = {}, 0
            self._known[conditions] = self._values
            self._known_bytes += num_bytes

    def draw(self, launch: Work, call: HostCall, out: Any) -> PendingSamples:
        """Enqueue a whole loop between its copies. The first samples go to `out`, a NumPy array or a tensor."""
        block, stream = self._call, self.device.stream

        def work() -> None:
            block.copy_in(call)
            launch()
            block.copy_out(call, out)

        stream.run(work)
        call.done = done = stream.record(call.done)
        return PendingSamples(block, call, done, out)

    def copy_in(self, call: HostCall) -> None:
        """Launch the copy of what a call brings."""
        self._call.copy_in(call)

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
        place = stage if counter is None else counter
        if flags.doubled and self._alone is not None and contexts.alone is not None:
            self._alone.input.copy_(self.state)
            contexts.alone(self._half_inputs, place)
            output = self._alone.output
        else:
            contexts.whole(self._step_inputs, place)
            output = self.denoiser.output
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
