"""All memory of a loop of one structure on a GPU without torch, and what is launched on it.

    call block   seeds, guidance, rescaling, whether x_T is given, step inputs that stages share   one copy in a call
                 state                                                                  one copy out
    plan block   coefficients, and the step inputs of each stage                        one copy, if it changed
    history      the solver's

A graph recorded from these launches reads nothing but this memory, so all that may change between calls is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.conditioning import call_conditioning
from skipstep.calls.request import SampleRequest
from skipstep.cuda.driver import DeviceBuffer
from skipstep.cuda.queue import Graph, Pinned, Queue
from skipstep.edge.blocks import Block, Field
from skipstep.edge.launcher import StepLauncher, StepOperands
from skipstep.edge.network import DeviceRows, EdgeNetwork
from skipstep.kernels.layout import NUM_COLUMNS
from skipstep.kernels.statistics import Thresholding, rank
from skipstep.loops.structure import Structure
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages


class Program:
    """Memory for `structure`, and its launches; `graph` is set once it was recorded. The loop's lock must be held."""

    def __init__(
        self, queue: Queue, network: EdgeNetwork, spec: NetworkSpec, launcher: StepLauncher, structure: Structure
    ) -> None:
        self._queue, self._network, self._spec, self._launcher = queue, network, spec, launcher
        self.structure, self.releases = structure, ExitStack()
        self.graph: Graph | None = None
        count, stages = structure.num_samples, len(structure)
        of_stages, shared = {}, {}
        for name, each in network.step_inputs.items():
            if each.per_stage:
                of_stages[name] = Field((stages, network.batch_size, *each.shape), each.dtype, padded=True)
            else:
                shared[name] = Field((network.batch_size, *each.shape), each.dtype)
        fields = {
            "seeds": Field((count,), "uint64"),
            **{name: Field((count,), "float32") for name in ("guidance", "strength", "rescale", "bound")},
            "given": Field((1,), "int32"),
            **shared,
            "state": Field((count, *spec.sample_shape), "float32"),
        }
        table = Field((stages, structure.rows, NUM_COLUMNS), "float32")
        self._shared = tuple(shared)
        with ExitStack() as releases:
            self.call = Block(queue, fields, releases)
            self._plan = Block(queue, {"table": table, **of_stages}, releases)
            slots = max(flags.num_slots for flags in structure.flags)
            image = self.call.part("state").num_bytes
            self._history = queue.zeros(slots * image, releases) if slots else None
            self.num_bytes = self.call.memory.num_bytes + self._plan.memory.num_bytes + slots * image
            self._enqueue = network.new_context()
            self.releases = releases.pop_all()
        parts = {**{name: self.call.part(name) for name in fields}, "table": self._plan.part("table")}
        self._operands = StepOperands(
            state=parts["state"],
            model_output=network.output,
            network_input=network.input,
            table=parts["table"],
            **{name: parts[name] for name in ("seeds", "guidance", "strength", "rescale", "bound")},
            history=self._history,
        )
        self._rows = {name: DeviceRows(self.call.part(name).address) for name in shared} | {
            name: DeviceRows(self._plan.part(name).address, each.pitch) for name, each in of_stages.items()
        }
        limits = structure.thresholding or Thresholding(1.0)
        self._quantile = *rank(spec.num_elements, limits.quantile), limits.maximum
        # What the plan block and the values that stages share follow from.
        self._stages: Stages | None = None
        self._conditions: Any = None
        self._stages_depend = True
        self._values: Mapping[str, NDArray[Any]] = {}

    @property
    def state(self) -> DeviceBuffer:
        return self._operands.state

    @property
    def dtype(self) -> str:
        """The network's."""
        return self._network.dtype

    @property
    def output(self) -> DeviceBuffer:
        return self._network.output

    def record(self) -> None:
        """As one graph of the whole loop. One evaluation runs before, on zeros: a context's first may take memory."""
        self.begin()
        self.evaluate(0)
        self.step(0)
        self._queue.synchronize()
        self.graph = self._queue.capture(self.launch, self.releases)

    def fill(self, stages: Stages, request: SampleRequest) -> Pinned:
        """Write what a call brings, and enqueue its copies. The memory is the call's until its results have arrived."""
        self._fill_plan(stages, request)
        memory, block = self._queue.pinned(self.call.memory.num_bytes), self.call
        block.write(memory, "seeds", 0 if request.seeds is None else request.seeds)
        block.write(memory, "guidance", 1.0 if request.guidance is None else request.guidance)
        block.write(memory, "strength", 0.0 if request.rescale is None else request.rescale)
        block.write(memory, "given", request.x_T is not None)
        for name in self._shared:
            block.write(memory, name, self._values[name])
        end = block.starts["state"]
        if request.x_T is not None:
            # A tensor of the caller's is complete here: torch waits for it.
            given = request.x_T if isinstance(request.x_T, np.ndarray) else request.x_T.cpu().numpy()
            block.write(memory, "state", given)
            end = len(memory.bytes)
        self._queue.copy_in(block.memory.part(0, end), memory)
        return memory

    def launch(self) -> None:
        """Enqueue all of it: the graph, or every launch on its own."""
        if self.graph is not None:
            self._queue.launch(self.graph)
            return
        self.begin()
        for stage in range(len(self.structure)):
            self.evaluate(stage)
            self.step(stage)

    def begin(self) -> None:
        structure, block = self.structure, self.call
        self._launcher.begin(
            state=self.state,
            network_input=self._network.input,
            seeds=block.part("seeds"),
            given=block.part("given"),
            copies=2 if structure.guided else 1,
            batch_size=structure.num_samples,
            stream=self._queue.handle,
        )

    def evaluate(self, stage: int) -> None:
        """The network on the whole batch, also where only the half with the condition is read."""
        self._enqueue(self._rows, stage)

    def step(self, stage: int) -> None:
        """After the statistics that it needs, if any."""
        flags = self.structure.flags[stage]
        for quantile in (None,) if flags.of_statistics is None else (self._quantile, None):
            self._launcher.launch(
                flags,
                self._operands,
                batch_size=self.structure.num_samples,
                stage=stage,
                stream=self._queue.handle,
                quantile=quantile,
            )

    def _fill_plan(self, stages: Stages, request: SampleRequest) -> None:
        conditions = request.condition_bytes()
        same = conditions == self._conditions
        planned = stages is self._stages and (same or not self._stages_depend)
        if planned and same:
            return
        self._stages = None
        timesteps = stages.network_timesteps(request.num_copies, request.num_samples)
        values = self._network.compute(timesteps[:1] if planned else timesteps, call_conditioning(self._spec, request))
        self._values = {name: values.expanded(name) for name in self._shared}
        if not planned:
            block = self._plan
            per_stage = [name for name in block.fields if name != "table"]
            self._stages_depend = any(name in values.call for name in per_stage)
            memory = self._queue.pinned(block.memory.num_bytes)
            block.write(memory, "table", stages.table)
            for name in per_stage:
                block.write(memory, name, values.expanded(name))
            self._queue.copy_in(block.memory, memory)
            self._queue.record(memory)
            self._queue.give_back(memory)
        self._stages, self._conditions = stages, conditions
