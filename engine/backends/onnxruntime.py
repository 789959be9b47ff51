"""ONNX Runtime on the CPU: sessions, the network's parts that run before a loop, and its step.

What does not depend on the state has left the network's graph (skipstep.export.partition). It is evaluated before the
loop, once per distinct timestep, once per distinct conditioning and once per distinct pair of them, and its values
are step inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from skipstep.backends.denoiser import Enqueue, MakeDenoiser, NetworkSource, RunPart, Target
from skipstep.backends.early import EarlyParts, graph_failed
from skipstep.backends.prefetch import Lazy
from skipstep.backends.processor import Splits, has_vnni, num_threads, processor, thread_limit
from skipstep.calls.conditioning import Conditioning
from skipstep.errors import ExportError, SkipstepError
from skipstep.networks.condition import MAX_ELEMENTS
from skipstep.networks.graphs import PREDICTION, SAMPLE, StepInputs, Values, fill_buffers
from skipstep.networks.large_graph import weights_of
from skipstep.networks.spec import NetworkSpec

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

# Some builds write usage events to the user's cache folder; a library that is embedded in products sends nothing.
onnxruntime.disable_telemetry_events()

LazySession = Lazy[onnxruntime.InferenceSession]
# Of a step graph that may be held twice, for batches that are divided.
_MOST_BYTES_TWICE = 1 << 29


@dataclass(slots=True)
class EarlyGraphs(EarlyParts):
    """A network's parts that run before the loop, serialised, by binding time (skipstep.backends.early)."""

    num_threads: int | None = None
    lora: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    _sessions: dict[str, LazySession] = field(default_factory=dict)

    def tables_at(self, timesteps: NDArray[np.float64]) -> Values:
        if self.lora:  # A swap may have changed what follows from a timestep.
            with self._lock:
                self.tables.clear()
        return EarlyParts.tables_at(self, timesteps)

    def prefetch(self) -> None:
        """Begin to load what every call needs; what follows from timesteps alone is often in tables."""
        for name in self.graphs:
            if name != "plan":
                self._session(name).prefetch()

    def _session(self, name: str) -> LazySession:
        graph = self.graphs[name]
        made = LazySession(lambda: make_session(graph, num_threads=self.num_threads, before_loop=True))
        # Of two threads that come here at once, one's entry stays.
        return self._sessions.setdefault(name, made)

    def _run(self, name: str, given: Mapping[str, NDArray[np.generic]]) -> Values:
        session = self._session(name).get()
        return run_session(session, [each.name for each in session.get_outputs()], {**self.lora, **given})


class Parts:
    """Runs parts of a batch side by side: one on the calling thread, the others on threads of its own.

    A session without threads serves as many as there are cores, and calls that come at once. It is made when it is
    first needed; fewer parts share the `whole` session's threads.
    """

    def __init__(self, splits: Splits, whole: LazySession, make: Callable[[], onnxruntime.InferenceSession]) -> None:
        self.splits, self._whole, self._single = splits, whole, Lazy(make)
        self._pool = Lazy(lambda: _new_pool(splits.num_threads))

    def session(self, parts: int) -> onnxruntime.InferenceSession:
        if self.splits.crowded or 1 < self.splits.num_threads <= parts:
            try:
                return self._single.get()
            except (SkipstepError, OSError) as error:  # Such as a bundle that is not there any more.
                from skipstep.reporting import LOGGER  # It imports logging, which nothing else on the way does.

                LOGGER.warning("batches are not divided: %s", error)
                self.splits.num_threads = 1
        return self._whole.get()

    def run(self, runs: Sequence[Callable[[], object]]) -> None:
        others = [self._pool.get().submit(run) for run in runs[1:]]
        try:
            runs[0]()
        finally:
            failures = [each.exception() for each in others]  # Waits: they read and write the same buffers.
        for failure in failures:
            if failure is not None:
                raise failure


class OnnxRuntimeDenoiser:
    """The step graph at one batch size (skipstep.backends.denoiser.Denoiser).

    The session is one for all sizes. Inputs and outputs are bound once to buffers of this size, which never move, so a
    run copies nothing in or out.
    """

    name = "onnxruntime"

    def __init__(
        self,
        session: LazySession,
        early: EarlyGraphs,
        spec: NetworkSpec,
        *,
        batch_size: int,
        parts: Parts | None = None,
    ) -> None:
        self._session = session.get()
        _check_interface(self._session, spec)
        self._early, self._parts = early, parts
        self.batch_size = batch_size
        self.input = np.zeros((batch_size, *spec.sample_shape), np.float32)
        self.output = np.zeros((batch_size, *spec.output_shape), np.float32)
        names = [each.name for each in self._session.get_inputs()]
        self._lora = {name: early.lora[name] for name in names if name in early.lora}
        self._buffers: Values = {
            each.name: np.zeros((batch_size, *each.shape[1:]), _NUMPY_TYPES[each.type])
            for each in self._session.get_inputs()
            if each.name != SAMPLE and each.name not in early.lora
        }
        self._runs = [self._bound(self._session, slice(batch_size))]

    def _bound(self, session: onnxruntime.InferenceSession, rows: slice) -> Callable[[], None]:
        """A run of these rows of the buffers."""
        binding = session.io_binding()
        ours = {name: array[rows] for name, array in {SAMPLE: self.input, **self._buffers}.items()}
        for name, array in {**ours, **self._lora}.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        output = self.output[rows]
        binding.bind_output(PREDICTION, "cpu", 0, np.float32, output.shape, output.ctypes.data)
        return lambda: session.run_with_iobinding(binding)

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        return self._early.compute(timesteps, conditioning)

    def new_context(self) -> Enqueue:
        return self._enqueue

    def _enqueue(self, values: StepInputs, stage: int) -> None:
        try:
            fill_buffers(self._buffers, values, stage)
            self._run()
        except Exception as error:  # ONNX Runtime's own, and NumPy's for tables of another shape.
            raise graph_failed(error) from error

    def _run(self) -> None:
        if self._parts is not None:
            self._divide(self._parts)
        if self._parts is None or len(self._runs) == 1:
            self._runs[0]()
        else:
            self._parts.run(self._runs)

    def _divide(self, parts: Parts) -> None:
        wanted = parts.splits.parts(self.batch_size)
        session = parts.session(wanted)
        if session is not self._session or len(self._runs) != wanted:
            slices = Splits.slices(self.batch_size, wanted)
            self._session, self._runs = session, [self._bound(session, rows) for rows in slices]


def denoisers(source: NetworkSource, target: Target) -> MakeDenoiser:
    """Denoisers of one step session, for any batch size. Loading it begins at once, in the background."""
    precision = "int8-onnxruntime" if target.precision == "int8" else "float32"
    graph = source.step_graph(precision)
    session = _step_session(graph, target, target.num_threads)
    # The bytes are read before and not in the background, where each read and hash would wait for Python's lock.
    session.prefetch()
    spec, parts = source.spec, None
    if len(graph) <= _MOST_BYTES_TWICE and not weights_of(graph):
        target.splits.num_threads = num_threads(target.num_threads)
        parts = Parts(target.splits, session, lambda: _step_session(source.step_graph(precision), target, 1).get())
    early = EarlyGraphs(source.before_loop(), spec, target.num_threads, target.lora, tables=source.tables)
    if target.keep is not None:
        early.prefetch()
    return lambda batch_size: OnnxRuntimeDenoiser(session, early, spec, batch_size=batch_size, parts=parts)


def _new_pool(threads: int) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # Slow to import.

    return ThreadPoolExecutor(threads, thread_name_prefix="skipstep-part")


def _step_session(graph: bytes, target: Target, num_threads: int | None) -> LazySession:
    """The session of a step graph, or of what the runtime once made of it on a processor like this one.

    What it makes is complete: operators are merged, and laid out for the processor. That is a third of the loading.
    """
    if target.keep is None or weights_of(graph):  # What the runtime makes of so many weights is not kept.
        return LazySession(lambda: make_session(graph, num_threads=num_threads))
    parts = {
        "kind": "onnxruntime.graph",
        "library": onnxruntime.__version__,
        "processor": processor(),
        "graph": hashlib.sha256(graph).digest(),
    }
    slot = target.keep("step graph, optimised by ONNX Runtime", parts)
    kept = slot.get()

    def optimise() -> onnxruntime.InferenceSession:
        import tempfile  # Slow to import, and only needed once.

        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder, "step.onnx")
            session = make_session(graph, num_threads=num_threads, written=written)
            with contextlib.suppress(OSError):
                slot.put(written.read_bytes())
        return session

    def load() -> onnxruntime.InferenceSession:
        if kept is not None:
            with contextlib.suppress(ExportError):  # It is optimised again.
                return make_session(kept, num_threads=num_threads, optimised=True)
        return optimise()

    return LazySession(load)


def _check_interface(session: onnxruntime.InferenceSession, spec: NetworkSpec) -> None:
    """Raise ExportError for a step graph whose inputs or prediction are not those of the network: nothing is drawn."""
    shapes = {SAMPLE: spec.sample_shape, PREDICTION: spec.output_shape}
    found = {each.name: each for each in (*session.get_inputs(), *session.get_outputs())}
    for name, shape in shapes.items():
        each = found.get(name)
        if each is None or each.type != "tensor(float)" or tuple(each.shape[1:]) != shape:
            described = "missing" if each is None else f"{each.type} {each.shape}"
            raise graph_failed(f"its {name!r} is {described}, not float [batch, {', '.join(map(str, shape))}]")
    for each in session.get_inputs():
        fixed = all(isinstance(n, int) and n > 0 for n in each.shape[1:])
        if each.type not in _NUMPY_TYPES or not fixed or math.prod(each.shape[1:]) > MAX_ELEMENTS:
            raise graph_failed(f"its input {each.name!r} is {each.type} {each.shape}")


_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def make_session(
    model: bytes,
    *,
    num_threads: int | None = None,
    before_loop: bool = False,
    as_it_stands: bool = False,
    optimised: bool = False,
    written: Path | None = None,
    prepare: Callable[[onnxruntime.SessionOptions], object] | None = None,
) -> onnxruntime.InferenceSession:
    """A session on the CPU, for any batch size: fixing it makes no graph faster here. Raises ExportError.

    `as_it_stands`: every node is computed; otherwise the runtime takes out what it finds needless, roundings included.
    `written`: it also writes there what it made of the graph; `optimised`: the model is such a one.
    `prepare` sets further options, and names the devices.
    """
    options = onnxruntime.SessionOptions()
    # To find buffers that may be reused takes longer than the rest of loading; what is not needed any more is freed and
    # allocated again all the same, in as much time and memory.
    options.enable_mem_reuse = prepare is not None
    if written is not None:
        options.optimized_model_filepath = str(written)
    if as_it_stands or optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not has_vnni():
        # Such processors add products of 8 bits in 16, and cut off what does not fit; this takes ones of 16 bits.
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = num_threads or thread_limit() or 0
    if before_loop:
        # Threads that go on waiting for more would take the cores from the loop's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"] if prepare is None else None
    give_weights(options, model)
    try:
        if prepare is not None:
            prepare(options)
        # Without a fallback: what was asked for is not quietly run on the CPU.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class but Exception.
        raise ExportError(
            got=f"a graph that ONNX Runtime {onnxruntime.__version__} does not take: {error}",
            expected="a graph with operators that it knows",
            remedy="upgrade onnxruntime, or use backend='torch'",
        ) from error


def give_weights(options: onnxruntime.SessionOptions, graph: bytes) -> None:
    """The weights beside a graph, for the session that is made with the options; the runtime opens no file."""
    weights = weights_of(graph)
    if weights:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)


def part(graph: bytes, target: Target, *, decodes: bool, tiled: bool) -> RunPart:
    """In float32, whatever the target's precision (skipstep.backends.registry.Backend.part)."""
    return partial(run_session, make_session(graph, num_threads=target.num_threads, before_loop=not decodes))


def run_session(
    session: onnxruntime.InferenceSession, outputs: Sequence[str], given: Mapping[str, NDArray[np.generic]]
) -> Values:
    """Outputs by name, from those of the `given` values that the graph reads. Raises ExportError."""
    try:
        results = session.run(outputs, {each.name: given[each.name] for each in session.get_inputs()})
    except Exception as error:  # As above; a KeyError is an input without a value.
        raise graph_failed(error) from error
    return dict(zip(outputs, results, strict=True))
