"""ONNX Runtime on the CPU: sessions, what a loop's stages look up, and the network one evaluation at a time.

What does not depend on the state has left the network's graph (skipstep.export.partition). It is evaluated before the
loop, once per distinct timestep, once per distinct conditioning and once per distinct pair of them, and the loop looks
it up.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from skipstep.calls.conditioning import Conditioning, distinct
from skipstep.errors import ExportError
from skipstep.networks.spec import NetworkSpec

# Some builds write usage events to the user's cache folder; a library that is embedded in products sends nothing.
onnxruntime.disable_telemetry_events()

Values = dict[str, NDArray[np.generic]]
_MAX_TABLES = 32


@dataclass(frozen=True, slots=True)
class NetworkGraphs:
    """A network by binding time, each part a serialised ONNX model with the symbolic dimension "batch".

    `plan` computes from timesteps, `prompt` from the conditioning, `call` from both, with what `plan` computed; `step`
    predicts from the sample and what the three computed. Values go by name. All but the last are None where nothing is
    known so early.
    """

    plan: bytes | None
    prompt: bytes | None
    call: bytes | None
    step: bytes

    @property
    def before_loop(self) -> dict[str, bytes]:
        """Those parts that there are but for the step."""
        parts = {"plan": self.plan, "prompt": self.prompt, "call": self.call}
        return {name: graph for name, graph in parts.items() if graph is not None}


@dataclass(frozen=True, slots=True)
class StageConstants:
    """What E stages of N samples look up: values `[rows, …]` by name, and which row is whose.

    `plan` and `call` are indexed by stage and sample, int64 `[E, N]`; `prompt` by the sample alone, `[N]`.
    """

    plan: Values
    call: Values
    prompt: Values
    plan_index: NDArray[np.int64]
    call_index: NDArray[np.int64]
    prompt_index: NDArray[np.int64]

    def row(self, name: str, stage: int) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
        """The values of that name, and the rows `[N]` of one stage."""
        if name in self.plan:
            return self.plan[name], self.plan_index[stage]
        if name in self.call:
            return self.call[name], self.call_index[stage]
        return self.prompt[name], self.prompt_index


@dataclass(slots=True)
class LoopConstants:
    """Computes StageConstants; what follows from timesteps alone is kept, and may be given as `tables` beforehand.

    `graphs` are a network's parts before the loop; `tables` maps the bytes of sorted distinct timesteps float64 to
    values, as a bundle holds them.
    """

    graphs: Mapping[str, bytes]
    spec: NetworkSpec
    num_threads: int | None = None
    tables: dict[bytes, Values] = field(default_factory=dict)
    _sessions: dict[str, onnxruntime.InferenceSession] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StageConstants:
        """For `timesteps` `[E, N]` and the conditioning of N samples."""
        each_timestep, index = distinct(timesteps)
        plan = self.tables_at(each_timestep)
        rows = dict(conditioning.rows)
        prompt: Values = {**rows, **self._run("prompt", rows)}
        call: Values = {}
        pair_index = index
        if "call" in self.graphs:
            # Pairs of timestep and conditioning as numbers, so that each is computed once.
            numbers = index * conditioning.num_rows + conditioning.index
            pairs, pair_index = distinct(numbers)
            of_time, of_prompt = np.divmod(pairs, conditioning.num_rows)
            given = {name: values[of_time] for name, values in plan.items()}
            given |= {name: values[of_prompt] for name, values in rows.items()}
            call = self._run("call", given)
        return StageConstants(plan, call, prompt, index, pair_index, conditioning.index)

    def tables_at(self, timesteps: NDArray[np.float64]) -> Values:
        """Values `[len(timesteps), …]` that follow from distinct sorted timesteps, these among them."""
        key = timesteps.tobytes()
        with self._lock:
            if key not in self.tables:
                while len(self.tables) >= _MAX_TABLES:
                    self.tables.pop(next(iter(self.tables)))
                given: Values = {"timestep": timesteps.astype(self.spec.timestep_dtype)}
                self.tables[key] = {**given, **self._run("plan", given)}
            return self.tables[key]

    def _run(self, name: str, given: Mapping[str, NDArray[np.generic]]) -> Values:
        if name not in self.graphs:
            return {}
        if name not in self._sessions:
            self._sessions[name] = make_session(self.graphs[name], num_threads=self.num_threads, before_loop=True)
        session = self._sessions[name]
        return run_session(session, [each.name for each in session.get_outputs()], given)


class OnnxRuntimeDenoiser:
    """The step graph at one batch size. `input`: float32 `[N, C, H, W]`, `output` the same or 2C channels.

    The session is one for all sizes. Inputs and outputs are bound once to buffers of this size, which never move, so a
    run copies nothing in or out.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        constants: LoopConstants,
        spec: NetworkSpec,
        *,
        batch_size: int,
    ) -> None:
        self._session = session
        self._constants = constants
        self.batch_size = batch_size
        self.input = np.zeros((batch_size, *spec.sample_shape), np.float32)
        self.output = np.zeros((batch_size, *spec.output_shape), np.float32)
        self._buffers: Values = {
            each.name: np.zeros((batch_size, *each.shape[1:]), _NUMPY_TYPES[each.type])
            for each in self._session.get_inputs()
            if each.name != "sample"
        }
        self._stages: StageConstants | None = None
        self._binding = self._session.io_binding()
        for name, array in {"sample": self.input, **self._buffers}.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._binding.bind_output("out_sample", "cpu", 0, np.float32, self.output.shape, self.output.ctypes.data)

    def prepare(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> None:
        self._stages = self._constants.compute(timesteps, conditioning)

    def enqueue(self, stage: int) -> None:
        assert self._stages is not None, "prepare comes first"
        for name, buffer in self._buffers.items():
            values, rows = self._stages.row(name, stage)
            # "clip" because "raise" would copy; the indices are our own.
            values.take(rows, axis=0, out=buffer, mode="clip")
        self._session.run_with_iobinding(self._binding)


_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def make_session(
    model: bytes, *, num_threads: int | None = None, before_loop: bool = False
) -> onnxruntime.InferenceSession:
    """A session on the CPU, for any batch size: fixing it makes no graph faster here. Raises ExportError."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    if before_loop:
        # Threads that go on waiting for more would take the cores from the loop's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class but Exception.
        raise ExportError(
            got=f"a graph that ONNX Runtime {onnxruntime.__version__} does not take: {error}",
            expected="a graph with operators that it knows",
            remedy="upgrade onnxruntime, or use backend='torch'",
        ) from error


def run_session(
    session: onnxruntime.InferenceSession, outputs: Sequence[str], given: Mapping[str, NDArray[np.generic]]
) -> Values:
    """Outputs by name, from those of the `given` values that the graph reads. Raises ExportError."""
    try:
        results = session.run(outputs, {each.name: given[each.name] for each in session.get_inputs()})
    except Exception as error:  # As above; a KeyError is an input that nobody gives.
        raise ExportError(
            got=f"a graph that failed: {type(error).__name__}: {error}",
            expected="one that this version of skipstep exported",
            remedy="export the network again; report it if that does not help",
        ) from error
    return dict(zip(outputs, results, strict=True))
