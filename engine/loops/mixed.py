"""Samples at different stages of different plans, in the evaluations of one network on a GPU (contract.Mix).

    places   what a sample keeps on the device from its first evaluation to its last: state, x0 and history; and what
             its request brought, once: coefficients and step inputs of every stage, seed, guidance
    a turn   rows of the batch ──▶ gather ──▶ network ──▶ the step, once for each kind of step that occurs

Which places take part, and each one's stage, are a few numbers that a turn copies in. Nothing else changes between
turns, so gather and network are one graph for each batch size, and the step is one for each kind: equal flags and
thresholding. Rows of another kind are left out of its launch. A sample's step has the bits that it has in a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.backends.denoiser import DeviceDenoiser, Enqueue
from skipstep.calls.conditioning import call_conditioning
from skipstep.calls.request import SampleRequest
from skipstep.cuda.device import Device, Event, Work
from skipstep.kernels.launch import StepLaunch
from skipstep.kernels.layout import StepFlags
from skipstep.kernels.statistics import Thresholding, sample_statistics
from skipstep.kernels.step import ddim_step
from skipstep.loops.buffers import Field, StagedBlock, Staging, is_channels_last
from skipstep.loops.contract import Array, call_flags
from skipstep.loops.places import COPIES, Places
from skipstep.networks.graphs import StepInputs
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

Kind = tuple[StepFlags, Thresholding | None]


def step_kinds(network: NetworkSpec, stages: Stages, request: SampleRequest) -> tuple[Kind, ...]:
    """Of every stage. The next input is gathered for the next turn, so how often it is needed makes no difference."""
    flags = call_flags(network, stages, request)
    return tuple((replace(each, doubled=False, unguided=False), stages.thresholding) for each in flags)


@dataclass(slots=True, eq=False)
class PlacedSample:
    """One sample: `values` until it has a `place`, which is from its first evaluation on."""

    mix: DeviceMix
    stages: Stages
    request: SampleRequest
    kinds: tuple[Kind, ...]
    values: StepInputs | None
    place: int | None = None
    rows: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = tuple(2 if flags.guided else 1 for flags, _ in self.kinds)

    def copy_state(self) -> Array:
        return self.mix.read("state", self)

    def copy_x0(self) -> Array:
        return self.mix.read("x0", self)


class DeviceMix:
    """See skipstep.loops.contract.Mix. `held` and `watched` are the loop's; `records`: graphs are wanted. Memory for
    twice as many samples as the largest batch has rows, and for plans of `num_stages`; it doubles when needed."""

    def __init__(
        self,
        device: Device,
        network: NetworkSpec,
        denoisers: Mapping[int, DeviceDenoiser],
        launches: Mapping[int, StepLaunch],
        *,
        held: AbstractContextManager[None],
        watched: AbstractContextManager[None],
        records: bool,
        max_rows: int,
        num_stages: int,
    ) -> None:
        # A module may be another graph at another size: those that read what the largest does.
        largest = denoisers[max(denoisers)]
        alike = largest.step_inputs, is_channels_last(largest)
        self._denoisers = {
            n: each for n, each in denoisers.items() if (each.step_inputs, is_channels_last(each)) == alike
        }
        sizes = sorted(self._denoisers)
        self.batch_sizes = tuple(sizes[: 1 + sum(size < max_rows for size in sizes)])
        self._device, self._network, self._launches = device, network, launches
        self._held, self._watched, self._records = held, watched, records
        self._compute = largest.compute
        self._places = Places(device, network, largest, 2 * self.batch_sizes[-1], num_stages)
        self._turns: dict[int, _Turn] = {}
        self._last: Event | None = None
        shape = (1, *network.sample_shape)
        self._staging = Staging(device, 4 * network.num_elements, lambda memory: memory.view(torch.float32).view(shape))

    def prepare(self, kinds: Sequence[Kind]) -> None:
        """Record the evaluations of every size, and these steps."""
        for size, kind in itertools.product(self.batch_sizes, kinds):
            if size > 1 or not kind[0].guided:
                self._turn(size).step(kind)

    def sample(self, stages: Stages, request: SampleRequest) -> PlacedSample:
        timesteps = stages.network_timesteps(request.num_copies, 1)
        values = self._compute(timesteps, call_conditioning(self._network, request))
        if (x_T := request.x_T) is not None:
            # The caller may write to it as soon as the request was taken.
            request = replace(request, x_T=np.array(x_T.cpu() if isinstance(x_T, Tensor) else x_T))
        return PlacedSample(self, stages, request, step_kinds(self._network, stages, request), values)

    def advance(self, chosen: Sequence[tuple[PlacedSample, int]]) -> None:
        """Returns while the device works, as soon as it has done the turn before: so it is never idle for want of a
        turn, and a new sample waits for one that is under way and one that is enqueued."""
        with self._held, self._device.range(f"skipstep mix of {len(chosen)}"):
            for sample, _ in chosen:
                self._join(sample)
            size = self._size(sum(sample.rows[stage] for sample, stage in chosen))
            self._turn(size).launch(chosen)
            before, self._last = self._last, self._device.stream.record()
        if before is not None:
            with self._watched:
                before.synchronize()

    def leave(self, sample: PlacedSample) -> None:
        if sample.place is not None:
            self._places.free.append(sample.place)
            sample.place = None

    def read(self, name: str, sample: PlacedSample) -> Array:
        """A copy of what a sample keeps, after all that was enqueued."""
        assert sample.place is not None, "it was advanced"
        kept = self._places.tensors[name][sample.place]
        with self._held:
            staging = self._staging.take()
            self._device.stream.run(lambda: staging.copy_(kept, non_blocking=True))
            copied = self._device.stream.record()
        with self._watched:
            copied.synchronize()
        array: Array = staging.numpy().copy()
        self._staging.give_back(staging)
        return array

    def _join(self, sample: PlacedSample) -> None:
        if sample.place is not None:
            return
        places, length = self._places, len(sample.kinds)
        if not places.free or length > places.num_stages:
            # Graphs read the old memory, and so does what is enqueued.
            self._device.stream.record().synchronize()
            self._turns.clear()
            self._places = places = places.grown(length)
        assert sample.values is not None, "it had no place before"
        sample.place = places.put(sample.stages, sample.request, sample.values)
        sample.values = None

    def _size(self, rows: int) -> int:
        return next(size for size in self.batch_sizes if size >= rows)

    def _turn(self, size: int) -> _Turn:
        if size not in self._turns:
            denoiser = self._denoisers[size]
            self._turns[size] = _Turn(self._device, denoiser, self._places, self._launches[size], self._records)
        return self._turns[size]


class _Turn:
    """Evaluations of one batch size, and the steps after them. All methods want the lock."""

    def __init__(
        self, device: Device, denoiser: DeviceDenoiser, places: Places, launch: StepLaunch, records: bool
    ) -> None:
        self._device, self._denoiser, self._places, self._launch = device, denoiser, places, launch
        self._records = records
        rows = Field((denoiser.batch_size,), torch.int32)
        self._rows = StagedBlock(device, {"place": rows, "copy": rows, "stage": rows})
        self._inputs = {
            name: device.zeros(
                (*((1,) if each.per_stage else ()), denoiser.batch_size, *each.shape), getattr(torch, each.dtype)
            )
            for name, each in denoiser.step_inputs.items()
        }
        device.stream.follow(device.caller_stream())
        # A graph uses it as long as it lives.
        self._context: Enqueue = denoiser.new_context()
        self._output = denoiser.output
        self._evaluate = self._recorded(self._launch_evaluation, denoiser.capture_refusal is None)
        self._steps: dict[Kind, tuple[StagedBlock, Work]] = {}

    def step(self, kind: Kind) -> tuple[StagedBlock, Work]:
        """The samples that take this step, and its launch."""
        if kind not in self._steps:
            count = self._denoiser.batch_size // (2 if kind[0].guided else 1)
            samples = StagedBlock(self._device, {"samples": Field((count, 3), torch.int32)})
            self._device.stream.follow(self._device.caller_stream())  # It was filled with zeros there.
            samples.fill({"samples": _left_out(count)})
            chosen = samples.tensors["samples"]
            # A graph reads memory that stays where it is, so the evaluation must be one, too.
            recordable = self._evaluate != self._launch_evaluation
            self._steps[kind] = samples, self._recorded(lambda: self._launch_step(kind, chosen), recordable)
        return self._steps[kind]

    def launch(self, chosen: Sequence[tuple[PlacedSample, int]]) -> None:
        """A guided sample has two rows, half the batch apart, as the step wants them; the others have what is left."""
        size, num_stages = self._denoiser.batch_size, self._places.num_stages
        place, copy, stage = (np.zeros(size, np.int32) for _ in range(3))
        samples: dict[Kind, NDArray[np.int32]] = {}
        free = list(range(size))
        for sample, own in sorted(chosen, key=lambda each: -each[0].rows[each[1]]):
            kind, width, row = sample.kinds[own], sample.rows[own], free[0]
            assert sample.place is not None, "it has joined"
            in_table = sample.place * num_stages + own
            for half in range(width):
                each = row + half * (size // 2)
                free.remove(each)
                place[each], copy[each], stage[each] = (
                    sample.place,
                    COPIES * sample.place + half,
                    COPIES * in_table + half,
                )
            samples.setdefault(kind, _left_out(size // width))[row] = sample.place, in_table, own
        steps = {kind: self.step(kind) for kind in samples}
        self._rows.fill({"place": place, "copy": copy, "stage": stage})
        self._device.stream.run(self._evaluate)
        for kind, (block, work) in steps.items():
            block.fill({"samples": samples[kind]})
            self._device.stream.run(work)

    def _launch_evaluation(self) -> None:
        rows, kept = self._rows.tensors, self._places.tensors
        self._denoiser.input.copy_(kept["state"].index_select(0, rows["place"]))
        for name, each in self._denoiser.step_inputs.items():
            values, out = self._places.step_input(name), self._inputs[name]
            if each.per_stage:
                torch.index_select(values.flatten(0, 2), 0, rows["stage"], out=out[0])
            else:
                torch.index_select(values.flatten(0, 1), 0, rows["copy"], out=out)
        self._context(self._inputs, 0)
        self._output = self._denoiser.output

    def _launch_step(self, kind: Kind, samples: Tensor) -> None:
        (flags, thresholding), kept = kind, self._places.tensors
        table = kept["table"].flatten(0, 1)
        output = self._output[: len(samples) * (2 if flags.guided else 1)]
        rescale = bound = None
        if flags.rescale or flags.threshold:
            place = samples[:, 0].clamp(min=0)
            rescale, bound = sample_statistics(
                kept["state"].index_select(0, place),
                output,
                table.index_select(0, samples[:, 1]),
                flags,
                guidance=kept["guidance"].index_select(0, place),
                rescale=kept["rescale"].index_select(0, place),
                thresholding=thresholding,
            )
        ddim_step(
            state=kept["state"],
            model_output=output,
            network_input=None,
            table=table[:, None],
            stage=0,
            flags=flags,
            seeds=kept["seeds"],
            guidance=kept["guidance"],
            rescale=rescale,
            bound=bound,
            history=kept["history"],
            x0=kept["x0"],
            places=samples,
            launch=self._launch,
        )

    def _recorded(self, work: Work, recordable: bool) -> Work:
        """A graph of it where that can be, else the same launches one by one."""
        device = self._device
        device.warm_up(work)
        if not (self._records and recordable):
            return work
        try:
            return device.capture(work).replay
        except RuntimeError:
            if device.is_lost():
                raise
            return work


def _left_out(count: int) -> NDArray[np.int32]:
    return np.tile(np.array([-1, 0, 0], np.int32), (count, 1))
