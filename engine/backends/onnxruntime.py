"""The ONNX Runtime backend: the network as one optimised graph per batch size, on the CPU.

What does not depend on the state has left that graph (skipstep.export.partition): it is evaluated before the loop, once
per distinct timestep and once per distinct pair of timestep and label, and the loop looks it up. Inputs and outputs are
bound once to buffers that live as long as the session, so a run copies nothing in or out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from skipstep.errors import ExportError
from skipstep.network import NetworkSpec

# Some builds write usage events to the user's cache folder; a library that is embedded in products sends nothing.
onnxruntime.disable_telemetry_events()

Values = dict[str, NDArray[np.generic]]
_MAX_TABLES = 32


@dataclass(frozen=True, slots=True)
class NetworkGraphs:
    """A network by binding time, each part a serialised ONNX model with the symbolic dimension "batch".

    `plan` computes from timesteps, `call` from labels and what `plan` computed, `step` predicts from the sample and
    what the two computed; values go by name. The first two are None where nothing is known so early.
    """

    plan: bytes | None
    call: bytes | None
    step: bytes


class LoopConstants:
    """What a loop's stages look up: values by name, and for each stage and sample which row of them is its own."""

    def __init__(self, graphs: NetworkGraphs, spec: NetworkSpec, *, num_threads: int | None = None) -> None:
        self._spec = spec
        self._plan = None if graphs.plan is None else _session(graphs.plan, num_threads=num_threads)
        self._call = None if graphs.call is None else _session(graphs.call, num_threads=num_threads)
        self._tables: dict[bytes, Values] = {}

    def compute(
        self, timesteps: NDArray[np.float64], labels: NDArray[np.int64] | None
    ) -> tuple[Values, dict[str, NDArray[np.intp]]]:
        """Values `[rows, …]` and row indices `[E, N]`, by name, for `timesteps` `[E, N]` and `labels` `[N]`."""
        distinct, index = np.unique(timesteps, return_inverse=True)
        index = index.reshape(timesteps.shape)
        values = dict(self._tables_at(distinct))
        indices = dict.fromkeys(values, index)
        if labels is not None:
            # Rows of (timestep, label) pairs as numbers, so that each pair is computed once.
            kinds = int(labels.max()) + 1
            pairs, pair_index = np.unique(index * kinds + labels, return_inverse=True)
            pair_index = pair_index.reshape(timesteps.shape)
            given: Values = {name: table[pairs // kinds] for name, table in values.items()}
            given["class_labels"] = pairs % kinds
            conditions = given if self._call is None else {**_run(self._call, given), "class_labels": pairs % kinds}
            for name in conditions.keys() - values.keys():
                values[name], indices[name] = conditions[name], pair_index
        return values, indices

    def _tables_at(self, timesteps: NDArray[np.float64]) -> Values:
        key = timesteps.tobytes()
        if key not in self._tables:
            while len(self._tables) >= _MAX_TABLES:
                self._tables.pop(next(iter(self._tables)))
            given: Values = {"timestep": timesteps.astype(self._spec.timestep_dtype)}
            self._tables[key] = given if self._plan is None else {**given, **_run(self._plan, given)}
        return self._tables[key]


class OnnxRuntimeDenoiser:
    """A session of the step graph at one batch size, which shares `constants` with those of other sizes.

    `input`: float32 `[N, C, H, W]`, `output` the same or with 2C channels. The graph's symbolic batch dimension is
    fixed when the session is made: the optimiser then sees static shapes, and one export serves every batch size.
    """

    def __init__(
        self,
        graphs: NetworkGraphs,
        constants: LoopConstants,
        spec: NetworkSpec,
        *,
        batch_size: int,
        num_threads: int | None = None,
    ) -> None:
        self._session = _session(graphs.step, batch_size=batch_size, num_threads=num_threads)
        self._constants = constants
        self.batch_size = batch_size
        self.input = np.zeros((batch_size, *spec.sample_shape), np.float32)
        self.output = np.zeros((batch_size, *spec.output_shape), np.float32)
        self._buffers: Values = {
            each.name: np.zeros(each.shape, _NUMPY_TYPES[each.type])
            for each in self._session.get_inputs()
            if each.name != "sample"
        }
        self._values: Values = {}
        self._indices: dict[str, NDArray[np.intp]] = {}
        self._binding = self._session.io_binding()
        for name, array in {"sample": self.input, **self._buffers}.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._binding.bind_output("out_sample", "cpu", 0, np.float32, self.output.shape, self.output.ctypes.data)

    def prepare(self, timesteps: NDArray[np.float64], class_labels: NDArray[np.int64] | None) -> None:
        self._values, self._indices = self._constants.compute(timesteps, class_labels)

    def enqueue(self, stage: int) -> None:
        for name, buffer in self._buffers.items():
            # "clip" because "raise" would copy; the indices are our own.
            self._values[name].take(self._indices[name][stage], axis=0, out=buffer, mode="clip")
        self._session.run_with_iobinding(self._binding)


_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def _session(
    model: bytes, *, batch_size: int | None = None, num_threads: int | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if batch_size is not None:
        options.add_free_dimension_override_by_name("batch", batch_size)
    options.intra_op_num_threads = num_threads or 0
    if batch_size is None:
        # It runs once before a loop. Threads that go on waiting for more would take the cores from the loop's.
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


def _run(session: onnxruntime.InferenceSession, values: Values) -> Values:
    outputs = [each.name for each in session.get_outputs()]
    feeds = {each.name: values[each.name] for each in session.get_inputs()}
    return dict(zip(outputs, session.run(outputs, feeds), strict=True))
