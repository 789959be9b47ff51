"""A step network in less than float32, driven through the sampler's own loop: to judge it, and to calibrate another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.onnxruntime import EarlyGraphs, Values, make_session
from skipstep.bench.contenders.workload import Samples, Workload
from skipstep.calls.conditioning import Conditioning
from skipstep.calls.request import resolve_request
from skipstep.loops.stepwise import HostLoop
from skipstep.networks.graphs import Partition
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages


class CastingDenoiser:
    """A step network of another dtype behind float32 buffers. What each evaluation is given goes into `seen`."""

    def __init__(
        self, step: bytes, constants: EarlyGraphs, spec: NetworkSpec, *, batch_size: int, threads: int
    ) -> None:
        self.seen: list[Values] = []
        self._session = make_session(step, num_threads=threads)
        self._constants = constants
        self.batch_size = batch_size
        self.input = np.zeros((batch_size, *spec.sample_shape), np.float32)
        self.output = np.zeros((batch_size, *spec.output_shape), np.float32)

    def prepare(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> None:
        self._stages = self._constants.compute(timesteps, conditioning)

    def enqueue(self, stage: int) -> None:
        given: Values = {}
        for each in self._session.get_inputs():
            if each.name == "sample":
                value: NDArray[Any] = self.input
            else:
                values, rows = self._stages.row(each.name, stage)
                value = values[rows]
            given[each.name] = value.astype(np.float16) if each.type == "tensor(float16)" else value
        self.output[...] = self._session.run(None, given)[0]
        self.seen.append({name: value.copy() for name, value in given.items()})


def draw_lowered(step: bytes, parts: Partition, workload: Workload, *, threads: int) -> tuple[Samples, list[Values]]:
    """Samples of the stepwise loop with `step` in the place of the network's own step graph, and what each evaluation
    was given, by the graph's input names."""
    _, spec = workload.subject.prepared
    constants = EarlyGraphs(parts.graphs.before_loop, spec, threads)
    denoiser = CastingDenoiser(step, constants, spec, batch_size=workload.batch_size, threads=threads)
    labels = None if workload.labels is None else workload.labels.tolist()
    request = resolve_request(spec, seeds=None, x_T=workload.x_T, class_labels=labels, prompt_embeds=workload.prompts)
    stages = Stages.of([workload.plan])
    with HostLoop(denoiser, spec).start(stages, request) as run:
        for stage in range(len(stages)):
            run.advance(stage)
        drawn: Samples = run.state()
    return drawn, denoiser.seen
