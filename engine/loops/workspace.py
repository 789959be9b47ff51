"""Everything on the device that a loop of one structure works with, and the launches of one evaluation.

    call block   seeds, guidance, where to begin, which stage comes next, which samples broke    one copy a call
    plan block   coefficients, and the network's step inputs of each stage                       one copy, if it changed
    state …      the float32 state, and the solver's history

A graph recorded from these launches reads nothing but this memory, so whatever may change between calls is in it: plan,
seeds, labels, prompts, guidance. Only the structure is fixed in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipstep.backends.denoiser import DeviceDenoiser, Enqueue
from skipstep.calls.conditioning import call_conditioning
from skipstep.calls.request import SampleRequest
from skipstep.cuda.device import Device, Event
from skipstep.kernels.launch import DEFAULT_LAUNCH, StepLaunch
from skipstep.kernels.layout import NUM_COLUMNS, StepFlags
from skipstep.kernels.statistics import Thresholding, sample_statistics
from skipstep.kernels.step import ddim_step, initial_noise
from skipstep.loops.buffers import Block, Field
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

    @classmethod
    def of(cls, network: NetworkSpec, stages: Stages, request: SampleRequest) -> Structure:
        return cls(
            call_flags(network, stages, request), stages.thresholding, request.num_samples, stages.table.shape[1]
        )

    @property
    def guided(self) -> bool:
        return self.flags[0].guided

    def __len__(self) -> int:
        return len(self.flags)


class Workspace:
    """Memory for `structure`, and what is launched on it. All methods want the engine's lock held."""

    def __init__(
        self,
        device: Device,
        denoiser: DeviceDenoiser,
        network: NetworkSpec,
        structure: Structure,
        *,
        keep_x0: bool = False,
        launch: StepLaunch = DEFAULT_LAUNCH,
    ) -> None:
        self.device, self.denoiser, self.structure = device, denoiser, structure
        self._network, self._launch = network, launch
        count, size, stages = structure.num_samples, denoiser.batch_size, len(structure)
        self._call = Block(
            device,
            {
                "seeds": Field((count,), torch.int64),
                "guidance": Field((count,), torch.float32),
                "rescale": Field((count,), torch.float32),
                "given": Field((1,), torch.int32),
                "counter": Field((1,), torch.int32),
                "broken": Field((count,), torch.int32),
            },
        )
        looked_up = {
            name: Field(
                (*((stages,) if each.per_stage else ()), size, *each.shape), getattr(torch, each.dtype), each.per_stage
            )
            for name, each in denoiser.step_inputs.items()
        }
        table = Field((stages, structure.rows, NUM_COLUMNS), torch.float32)
        self._plan = Block(device, {"table": table, **looked_up})
        self._table = self._plan.tensors["table"]
        self._step_inputs = {name: self._plan.tensors[name] for name in denoiser.step_inputs}
        self._planned: tuple[bytes, ...] = ()

        def image() -> Tensor:
            return torch.zeros(count, *network.sample_shape, device=device.torch_device)

        self.state = image()
        self.x0 = image() if keep_x0 else None
        self._base = image() if any(flags.write_base for flags in structure.flags) else None
        self._memory = image() if any(flags.write_memory for flags in structure.flags) else None

    @property
    def counter(self) -> Tensor:
        """int32 `[1]` on the device: the stage that comes next, for graphs of one step."""
        return self._call.tensors["counter"]

    def fill(self, stages: Stages, request: SampleRequest) -> None:
        """Enqueue the copies that a call brings. A device x_T is read on the engine's stream."""
        timesteps = stages.network_timesteps(request.num_copies, request.num_samples)
        conditioning = call_conditioning(self._network, request)
        planned = (
            stages.table.tobytes(),
            timesteps.tobytes(),
            conditioning.index.tobytes(),
            *(rows.tobytes() for rows in conditioning.rows.values()),
        )
        if planned != self._planned:
            self._planned = ()
            values = self.denoiser.compute(timesteps, conditioning)
            expanded = {name: values.expanded(name) for name in self._step_inputs}
            self._plan.fill({"table": stages.table, **expanded})
            self._planned = planned
        self._call.fill(
            {
                # torch has no arithmetic on uint64; the kernels read the same 64 bits.
                "seeds": None if request.seeds is None else request.seeds.view(np.int64),
                "guidance": request.guidance,
                "rescale": request.rescale,
                "given": np.array([request.x_T is not None], np.int32),
                "broken": np.full(request.num_samples, _SOUND, np.int32),
            }
        )
        if request.x_T is not None:
            self._give_state(request.x_T)

    def _give_state(self, x_T: Any) -> None:
        if isinstance(x_T, Tensor):
            self.device.stream.run(lambda: self.state.copy_(x_T, non_blocking=True))
            return
        staging = self.device.staging(self.state.nbytes)
        staging.view(torch.float32).view(self.state.shape).copy_(torch.from_numpy(np.ascontiguousarray(x_T)))
        self.device.stream.run(
            lambda: self.state.copy_(staging.view(torch.float32).view(self.state.shape), non_blocking=True)
        )

    def begin(self) -> None:
        """Launch what comes before the first evaluation: x_T of the seeds, or the state that was given."""
        initial_noise(
            state=self.state,
            network_input=self.denoiser.input,
            seeds=self._call.tensors["seeds"],
            given=self._call.tensors["given"],
            launch=self._launch,
        )

    def advance(self, evaluate: Enqueue, stage: int, *, counted: bool = False) -> None:
        """Launch one evaluation and its step. `counted`: the stage is read on the device, and counted up; `stage` only
        says which flags."""
        flags = self.structure.flags[stage]
        call, counter = self._call.tensors, self.counter if counted else None
        evaluate(self._step_inputs, stage if counter is None else counter)
        rescale = bound = None
        if flags.rescale or flags.threshold:
            rescale, bound = sample_statistics(
                self.state,
                self.denoiser.output,
                self._table[stage] if counter is None else self._table.index_select(0, counter)[0],
                flags,
                guidance=call["guidance"],
                rescale=call["rescale"],
                thresholding=self.structure.thresholding,
            )
        ddim_step(
            state=self.state,
            model_output=self.denoiser.output,
            network_input=self.denoiser.input,
            table=self._table,
            stage=stage,
            flags=flags,
            seeds=call["seeds"],
            guidance=call["guidance"],
            rescale=rescale,
            bound=bound,
            base=self._base,
            memory=self._memory,
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
        broken = self.device.staging(4 * count).view(torch.int32)
        stream.run(lambda: broken.copy_(self._call.tensors["broken"][:count], non_blocking=True))
        if isinstance(out, Tensor) and out.device == self.state.device:
            stream.run(lambda: out.copy_(self.state[:count], non_blocking=True))
            return PendingSamples(stream.record(), broken)
        staging = self.device.staging(4 * out.size if isinstance(out, np.ndarray) else out.nbytes)
        staged = staging.view(torch.float32).view(tuple(out.shape))
        stream.run(lambda: staged.copy_(self.state[:count], non_blocking=True))
        return PendingSamples(stream.record(), broken, staged, out)


@dataclass(frozen=True, slots=True)
class PendingSamples:
    """Samples on their way to the caller."""

    done: Event
    broken: Tensor
    staged: Tensor | None = None
    out: Any = None

    def wait(self) -> dict[int, int | None]:
        """Return when the samples have arrived: which are not finite, and since which stage."""
        self.done.synchronize()
        if self.staged is not None:
            self.out[...] = self.staged.numpy() if isinstance(self.out, np.ndarray) else self.staged
        stages = self.broken.tolist()
        return {sample: stage for sample, stage in enumerate(stages) if stage != _SOUND}
