"""Drawing a checked request: split over the batch sizes, every part enqueued, one wait at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from skipstep.backends.denoiser import NetworkSource
from skipstep.calls.batching import split_batch
from skipstep.calls.destination import copy_samples
from skipstep.calls.inputs import Inputs
from skipstep.calls.plan_set import PlanSet
from skipstep.calls.request import SampleRequest
from skipstep.calls.trajectory import Progress
from skipstep.errors import NonFiniteError, check_choice
from skipstep.loops.contract import Array, FinishedRun, Lifecycle, Loop, Parts, Pending, run_observed
from skipstep.loops.observers import Observers
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages

OutputType = Literal["np", "pt", "pil", "latent"]


class SampleArguments(Inputs, total=False):
    """The arguments of a call that returns samples alone; see skipstep.Engine.sample."""

    steps: int | None
    plan: Plan | Sequence[Plan] | None
    deadline_ms: float | None
    seeds: int | Sequence[int] | None
    x_T: Any
    output_type: OutputType
    out: Any


class BatchRunner:
    """A loop and the batch sizes that it draws at (skipstep.loops.contract.Runner). Safe to call from several threads.

    With a loop that takes any size, the largest of `batch_sizes` is the most samples that it is given at once.
    `pipeline`: what is around a network of latents, if anything is known of it. `gate`: around what reads the network,
    where it may change between calls.
    """

    def __init__(
        self,
        loop: Loop,
        network: NetworkSpec,
        batch_sizes: Sequence[int],
        lifecycle: Lifecycle,
        pipeline: Parts | None = None,
        gate: AbstractContextManager[None] | None = None,
    ) -> None:
        self.gate = nullcontext() if gate is None else gate
        self.loop, self.network, self.pipeline = loop, network, pipeline
        self.batch_sizes = tuple(sorted(batch_sizes))
        self._lifecycle = lifecycle

    def check(self) -> None:
        self._lifecycle.check()

    def close(self) -> None:
        self._lifecycle.close()

    def split(self, num_samples: int) -> list[int]:
        """The batch sizes of the runs that draw so many samples; the last may draw more than are left."""
        if not self.loop.any_batch:
            return split_batch(num_samples, self.batch_sizes)
        whole, rest = divmod(num_samples, self.batch_sizes[-1])
        return [self.batch_sizes[-1]] * whole + ([rest] if rest else [])

    def parts(self, stages: Stages, request: SampleRequest) -> Iterator[tuple[slice, Stages, SampleRequest]]:
        """Each run's samples, as a slice of the request's, with its stages and its padded request."""
        start = 0
        for size in self.split(request.num_samples):
            stop = min(start + size, request.num_samples)
            yield slice(start, stop), stages.chunk(start, size), request.chunk(start, size)
            start += size

    def run(self, stages: Stages, request: SampleRequest, *, progress: Progress | None = None) -> Array:
        """Walk a request to x_0 `[B, *sample_shape]`. Raises NonFiniteError."""
        result = np.empty((request.num_samples, *self.network.sample_shape), np.float32)
        observers = None if progress is None else Observers(stages, len(self.split(request.num_samples)), progress)
        self.draw(stages, request, result, observers=observers)
        return result

    def draw(self, stages: Stages, request: SampleRequest, samples: Any, *, observers: Observers | None = None) -> None:
        """Walk a request to x_0 in `samples`. Raises NonFiniteError and EngineStateError."""
        self.check()
        with self.gate:
            self._draw(stages, request, samples, observers)

    def _draw(self, stages: Stages, request: SampleRequest, samples: Any, observers: Observers | None) -> None:
        if len(self.split(request.num_samples)) > 1:
            request = request.apart_from(samples)
        pending: list[tuple[int, Pending]] = []
        for part, part_stages, part_request in self.parts(stages, request):
            out = samples[part]
            if observers is None:
                pending.append((part.start, self.loop.enqueue(part_stages, part_request, out)))
                continue
            observer = observers.chunk(part.start, len(out))
            drawn = np.empty((len(out), *self.network.sample_shape), np.float32)
            keep_x0 = observers.needs_x0
            done = run_observed(self.loop, part_stages, part_request, drawn, observer=observer, keep_x0=keep_x0)
            pending.append((part.start, done))
            copy_samples(drawn, out)
        broken: dict[int, int | None] = {}
        for first, each in pending:
            broken |= {first + sample: stage for sample, stage in each.wait().items()}
        _check_finite(broken, request.num_samples, len(stages))

    def as_output(self, samples: Any, output_type: str) -> Any:
        """x_0 `[B, *sample_shape]`, NumPy or a tensor where it is one already, as the caller asked for it; of a
        pipeline its pictures."""
        if self.pipeline is not None and output_type != "latent":
            samples = self.pipeline.decode(samples)
        if output_type == "pil":
            from skipstep.calls.images import to_pil

            return to_pil(samples)
        if output_type == "pt":
            import torch

            return torch.as_tensor(samples, device=self.loop.device)
        return samples


@dataclass(frozen=True, slots=True)
class CompiledNetwork:
    """A network that is ready to be sampled, and what came with it: everything that an engine is made of.

    `calibrations`: the bytes of a bundle's calibration.json. `loras`: skipstep.networks.lora_layers.Loras, if
    they can be swapped.
    """

    source: NetworkSource
    plans: PlanSet
    runner: BatchRunner
    backend: str
    precision: str
    num_threads: int | None
    calibrations: bytes | None = None
    loras: Any = None


def check_output_type(output_type: str) -> None:
    check_choice("output_type", output_type, get_args(OutputType))


def check_finite(result: Array) -> None:
    """Raise NonFiniteError naming the samples of `[B, *sample_shape]` that hold NaN or infinity."""
    _check_finite(FinishedRun(result).wait(), len(result), 0)


def _check_finite(broken: Mapping[int, int | None], num_samples: int, num_stages: int) -> None:
    if not broken:
        return
    first = min((stage for stage in broken.values() if stage is not None), default=None)
    since = "" if first is None else f", since evaluation {first + 1} of {num_stages}"
    raise NonFiniteError(
        got=f"NaN or infinity in samples {sorted(broken)[:8]} of {num_samples}{since}",
        expected="finite predictions from the network",
        remedy="check the weights and the inputs; a network that overflows in half precision needs float32",
    )
