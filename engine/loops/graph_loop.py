"""The whole loop as one ONNX graph (skipstep.export.onnx_loop): one `session.run` per batch, whatever the plan.

Somebody who looks on is served by the same session in pieces: the graph runs any part of a plan, so an observed loop is
that graph, one stage at a time. So is a loop whose noise would not fit into memory at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from skipstep.backends.onnxruntime import LoopConstants, Values, run_session
from skipstep.calls.conditioning import call_conditioning
from skipstep.calls.noise import standard_normal
from skipstep.calls.request import SampleRequest
from skipstep.kernels.layout import Stream
from skipstep.loops.loop_sessions import LoopSessions
from skipstep.loops.loop_table import LoopFeatures, loop_table, shared_features
from skipstep.loops.stepwise import Array, Finished, Pending, Run, initial_state
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

# Of noise at once: what fits into the caches is drawn about as fast as what does not, and memory stays bounded.
MAX_NOISE_BYTES = 1 << 26


class GraphLoop:
    """One graph launch per batch of `batch_size` samples. Calls from several threads run side by side."""

    name = "onnx"

    def __init__(self, sessions: LoopSessions, constants: LoopConstants, network: NetworkSpec) -> None:
        self._sessions = sessions
        self._constants = constants
        self._network = network

    def prepare(self, stages: Sequence[Stages]) -> None:
        """One session for all that threshold alike: it covers each at little cost, and holds the weights once."""
        for features in shared_features(self._network, stages):
            self._sessions.get(features)

    @contextlib.contextmanager
    def start(self, stages: Stages, request: SampleRequest, *, keep_x0: bool = False) -> Iterator[Run]:
        yield _GraphRun(self._sessions, self._constants, self._network, stages, request)

    def enqueue(self, stages: Stages, request: SampleRequest, out: Array) -> Pending:
        run = _GraphRun(self._sessions, self._constants, self._network, stages, request)
        run.advance_to_end()
        out[...] = run.state()[: len(out)]
        return Finished(out)

    def close(self) -> None:
        self._sessions.close()


class _GraphRun:
    def __init__(
        self,
        sessions: LoopSessions,
        constants: LoopConstants,
        network: NetworkSpec,
        stages: Stages,
        request: SampleRequest,
    ) -> None:
        needed = LoopFeatures.of(network, stages, rescale=request.rescale is not None)
        self._features, self._session = sessions.get(needed)
        self._table = loop_table(stages, self._features)
        self._num_stages = len(stages)
        self._shape = (request.num_samples, *network.sample_shape)
        self._flat = (request.num_samples, network.num_elements)
        self._seeds = request.seeds if stages.adds_noise else None
        self._constants = constants.compute(
            stages.network_timesteps(request.num_copies, request.num_samples), call_conditioning(network, request)
        )
        x = initial_state(network, request).reshape(self._flat)
        self._carried: dict[str, Array] = {
            name: x if name == "x" else np.zeros(self._flat, np.float32) for name in ("x0", *self._features.carried)
        }
        self._given = self._call_inputs(request)
        self._outputs = [f"{name}_next" for name in self._carried]

    def advance(self, stage: int) -> None:
        self._advance(stage, stage + 1)

    def advance_to_end(self) -> None:
        stages = self._num_stages
        if self._seeds is not None:
            bytes_a_stage = 4 * int(np.prod(self._flat))
            stages = max(1, MAX_NOISE_BYTES // bytes_a_stage)
        for first in range(0, self._num_stages, stages):
            self._advance(first, min(first + stages, self._num_stages))

    def state(self) -> Array:
        return self._carried["x"].reshape(self._shape).copy()

    def x0(self) -> Array:
        return self._carried["x0"].reshape(self._shape).copy()

    def set_state(self, state: Array) -> None:
        self._carried["x"] = np.ascontiguousarray(state, np.float32).reshape(self._flat)

    def _advance(self, first: int, stop: int) -> None:
        part = slice(first, stop)
        given: Values = {**self._given, **self._carried, "table": self._table[part]}
        given["plan_index"], given["call_index"] = self._constants.plan_index[part], self._constants.call_index[part]
        if self._features.noise:
            given["noise"] = self._noise(first, stop)
        results = run_session(self._session, self._outputs, given)
        self._carried = {name: results[f"{name}_next"].astype(np.float32, copy=False) for name in self._carried}

    def _noise(self, first: int, stop: int) -> Array:
        if self._seeds is None:
            return np.zeros((1, *self._flat), np.float32)
        normals = standard_normal(self._seeds, self._flat[-1], stage=range(first, stop), stream=Stream.STEP)
        return normals.reshape(stop - first, *self._flat)

    def _call_inputs(self, request: SampleRequest) -> Values:
        """What is the same at every stage."""
        given: Values = {}
        per_sample = (request.num_samples, 1)
        if self._features.guided:
            given["copies"] = np.array([request.num_copies, 1])
            given["guidance"] = np.ones(per_sample, np.float32)
            if request.guidance is not None:
                given["guidance"] = request.guidance.reshape(per_sample)
        if self._features.rescale:
            given["rescale"] = np.zeros(per_sample, np.float32)
            if request.rescale is not None:
                given["rescale"] = request.rescale.reshape(per_sample)
        constants = self._constants
        for values in (constants.plan, constants.call, constants.prompt):
            given |= {f"{name}/rows": array for name, array in values.items()}
        given["prompt_index"] = constants.prompt_index
        return given
