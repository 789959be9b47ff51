"""TensorRT and TensorRT-RTX: one step network as an engine, made to be recorded into graphs of its caller's.

    input, output    fixed addresses, which the step kernel writes and reads
    tables           a stage's rows are read where they stand, by address; where that is not aligned, from a copy
    activations      one piece of memory, which all contexts of an engine share: only one runs at a time
    context          one per recorded graph, and run once before anything is recorded: a first run may take memory

The two libraries have the same Python interface, so this is written once; what TensorRT-RTX alone has is looked up
alone. An engine is native code: deserialising one that was not verified would run whatever is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.backends.denoiser import Enqueue, Keep, Library, MakeDenoiser, NetworkSource, StepInput, Target
from skipstep.backends.device_step import HostInputs, StepTensor, check_step_tensors, copy_row
from skipstep.backends.onnxruntime import EarlyGraphs
from skipstep.backends.tensorrt_library import RuntimeCache, choose_library, error_log, load_library
from skipstep.calls.conditioning import Conditioning
from skipstep.cuda.device import CAPTURE_LOCK
from skipstep.errors import CaptureError, ExportError, InputError
from skipstep.networks.graphs import PREDICTION, SAMPLE, StepInputs
from skipstep.networks.spec import NetworkSpec

if TYPE_CHECKING:
    # The full library has no stubs either; what the type checker reads of this one stands for both.
    import tensorrt_rtx as trt

# What the libraries ask of the address of an activation, an input or an output.
_ALIGNMENT = 256
_DTYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


class TensorRtDenoiser:
    """An engine of a step network at one batch size (skipstep.backends.denoiser.DeviceDenoiser).

    `engine` must be bytes that were verified: from skipstep.bundles.bundle.read_engine, or from the cache through
    skipstep.export.engines.build_engine_cached. Run it on a stream that is not the default one, on which TensorRT waits
    for the device.

    Raises MissingDependencyError, DeviceUnavailableError, and ExportError for an engine that the library does not take
    or that is not this network's.
    """

    fallback: str | None = None

    def __init__(
        self,
        engine: bytes,
        early: EarlyGraphs,
        spec: NetworkSpec,
        *,
        library: Library,
        batch_size: int,
        device: torch.device,
        keep: Keep | None = None,
    ) -> None:
        self.name: str = library
        self.batch_size = batch_size
        self.device = device
        self._trt = load_library(library, device.index or 0)
        self.log = error_log(self._trt)
        with torch.cuda.device(device):
            # The engine needs its runtime as long as it lives.
            self._runtime = self._trt.Runtime(self.log)
            self.engine: trt.ICudaEngine = self._runtime.deserialize_cuda_engine(engine)
        if self.engine is None:
            raise RefusedEngineError(
                got=f"an engine that {library} {self._trt.__version__} does not take: {self.log.summary()}",
                expected="one that this version built for this GPU",
                remedy="build it on this machine: skipstep build",
            )
        inputs, outputs = self._tensors()
        check_step_tensors(inputs, outputs, spec, batch_size=batch_size, of=f"an engine of {library}")
        looked_up = {name: each for name, each in inputs.items() if name != SAMPLE}
        self._inputs = HostInputs(early, spec, looked_up, batch_size=batch_size)
        self.step_inputs: Mapping[str, StepInput] = self._inputs.step_inputs

        def buffer(each: StepTensor) -> Tensor:
            return aligned_zeros(each.shape, each.dtype, device)

        self.input, self.output = buffer(inputs[SAMPLE]), buffer(outputs[PREDICTION])
        self.activations = aligned_zeros((max(1, self.engine.device_memory_size_v2),), torch.uint8, device)
        self.rows = {name: buffer(looked_up[name]) for name, each in self.step_inputs.items() if each.per_stage}
        self._kernels = RuntimeCache.of(device, self._trt, keep) if library == "tensorrt_rtx" else None
        self._create_context = self._context_maker()
        # Apart from the default stream, which cannot be recorded.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        first = self._settled_context()
        self._spare: _Context | None = first
        if self._kernels is not None:
            self._kernels.save()
        self.capture_refusal: str | None = None
        # Full TensorRT has no such question, and records whatever does not choose shapes while it runs.
        if library == "tensorrt_rtx" and not first.context.is_stream_capturable(self._stream.cuda_stream):
            self.capture_refusal = "TensorRT-RTX says that this engine takes memory while it runs: build it for capture"

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        return self._inputs.compute(timesteps, conditioning)

    def new_context(self) -> Enqueue:
        """See DeviceDenoiser.new_context. It runs the network once and waits for the device, so call it where a plan is
        prepared, and not while anything is recorded. Raises ExportError where the library makes or runs none."""
        context, self._spare = self._spare, None
        return context or self._settled_context()

    def _settled_context(self) -> _Context:
        """A context that has run once, on zeros: it has allocated and compiled everything it needs."""
        # No thread of this process may be capturing while this waits.
        with CAPTURE_LOCK, torch.cuda.device(self.device):
            # A graph that still runs uses the same memory.
            torch.cuda.synchronize(self.device)
            context = _Context(self, self._create_context())
            zeros = {
                name: aligned_zeros(
                    (*((1,) if each.per_stage else ()), self.batch_size, *each.shape),
                    getattr(torch, each.dtype),
                    self.device,
                )
                for name, each in self.step_inputs.items()
            }
            # These zeros and all buffers were filled there.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                context(zeros, 0)
            torch.cuda.synchronize(self.device)
            context.forget()
        return context

    def _context_maker(self) -> Callable[[], trt.IExecutionContext]:
        """How to make contexts whose memory is the caller's."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is None:
            return lambda: self.engine.create_execution_context(strategy)
        # TensorRT-RTX compiles its kernels on the device, when it makes a context: once for all of them.
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        with torch.cuda.device(self.device):
            config.set_runtime_cache(self._kernels.made_by(config))
        return lambda: self.engine.create_execution_context(config)

    def _tensors(self) -> tuple[dict[str, StepTensor], dict[str, StepTensor]]:
        """Inputs and outputs by name. Raises ExportError for what cannot be bound to a plain tensor of known shape."""
        inputs: dict[str, StepTensor] = {}
        outputs: dict[str, StepTensor] = {}
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            dtype, shape = self.engine.get_tensor_dtype(name).name, self.engine.get_tensor_shape(name)[:]
            place, layout = self.engine.get_tensor_location(name), self.engine.get_tensor_format(name)
            if (
                dtype not in _DTYPES
                or min(shape, default=0) < 0
                or place != self._trt.TensorLocation.DEVICE
                or layout != self._trt.TensorFormat.LINEAR
            ):
                described = f"{dtype} {list(shape)}, {layout.name} on {place.name}"
                raise ExportError(
                    got=f"an engine of {self.name} whose {name} is {described}",
                    # With open shapes TensorRT-RTX goes on compiling better kernels behind the caller's back.
                    expected="plain tensors of fixed shape on the device",
                    remedy="build it from the step network with a single batch size",
                )
            is_input = self.engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            (inputs if is_input else outputs)[name] = StepTensor(shape, _DTYPES[dtype])
        return inputs, outputs


@dataclass(slots=True)
class _Rows:
    """A table of every stage: where stage 0's rows are, how far the next stage's, and whether all may be read there."""

    table: Tensor
    address: int
    pitch: int
    in_place: bool


class _Context:
    """What one recorded graph, or one loop that is not recorded, evaluates the engine with."""

    def __init__(self, owner: TensorRtDenoiser, context: trt.IExecutionContext) -> None:
        self._owner = owner
        self.context = context
        if context is None:
            raise self._failed("that makes no execution context")
        self._addresses: dict[str, int] = {}
        self._bound: Mapping[str, Tensor] | None = None
        self._rows: dict[str, _Rows] = {}
        context.set_device_memory(owner.activations.data_ptr(), owner.activations.nbytes)
        self._point(SAMPLE, owner.input.data_ptr())
        self._point(PREDICTION, owner.output.data_ptr())

    def __call__(self, values: Mapping[str, Tensor], stage: int | Tensor) -> None:
        if values is not self._bound:
            self._bind(values)
        for name, rows in self._rows.items():
            if rows.in_place and isinstance(stage, int):
                self._point(name, rows.address + stage * rows.pitch)
            else:
                buffer = self._owner.rows[name]
                copy_row(rows.table, stage, buffer)
                self._point(name, buffer.data_ptr())
        # What it runs beside this stream it forks off and joins by events, which a recording follows.
        if not self.context.execute_async_v3(torch.cuda.current_stream(self._owner.device).cuda_stream):
            raise self._failed("that does not launch")

    def forget(self) -> None:
        """Hold on to no table."""
        self._bound, self._rows = None, {}

    def _bind(self, values: Mapping[str, Tensor]) -> None:
        rows = {}
        for name, each in self._owner.step_inputs.items():
            value, dtype = values[name], getattr(torch, each.dtype)
            shape = (self._owner.batch_size, *each.shape)
            one = value[0] if each.per_stage else value
            device = self._owner.input.device
            if (one.shape, value.dtype, value.device) != (shape, dtype, device) or not one.is_contiguous():
                every = " for every stage" if each.per_stage else ""
                raise InputError(
                    got=f"{name} {value.dtype} {list(value.shape)} on {value.device} for a step input",
                    expected=f"{dtype} {list(shape)}{every}, contiguous on {device}",
                    remedy="make it as DeviceDenoiser.step_inputs says",
                )
            address = value.data_ptr()
            if each.per_stage:
                pitch = value.stride(0) * value.element_size()
                in_place = address % _ALIGNMENT == 0 and (pitch % _ALIGNMENT == 0 or len(value) == 1)
                rows[name] = _Rows(value, address, pitch, in_place)
            elif address % _ALIGNMENT:
                raise InputError(
                    got=f"{name} at an address that is no multiple of {_ALIGNMENT}",
                    expected="aligned memory",
                    remedy="allocate what all stages share on its own",
                )
            else:
                self._point(name, address)
        self._bound, self._rows = values, rows

    def _point(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            if not self.context.set_tensor_address(name, address):
                raise self._failed(f"that has no place for {name}")
            self._addresses[name] = address

    def _failed(self, how: str) -> CaptureError | ExportError:
        error = CaptureError if torch.cuda.is_current_stream_capturing() else ExportError
        return error(
            got=f"an engine of {self._owner.name} {how}: {self._owner.log.summary()}",
            expected="one that runs on this device",
            remedy="free memory on the device, or build the engine again on this machine",
        )


def aligned_zeros(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros at an address that the libraries accept, whatever the allocator's own alignment is."""
    shape = tuple(shape)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = torch.zeros(num_bytes + _ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).view(shape)


class RefusedEngineError(ExportError):
    """An engine that the library does not deserialise."""


def denoisers(source: NetworkSource, target: Target) -> MakeDenoiser:
    """Denoisers from TensorRT engines of the source, one for each batch size.

    The target's precision is the step network's; what comes before it is computed in float32, on the host. An engine
    that was kept from an earlier build and is refused is built again, once. Raises as TensorRtDenoiser does, and what
    the source raises where it has no engine.
    """
    chosen = choose_library(source.engine_libraries, target.library)
    device = torch.device(target.device)
    version = load_library(chosen, device.index or 0).__version__
    early = EarlyGraphs(source.before_loop(), source.spec, tables=source.tables)

    def make(batch_size: int, *, again: bool = False) -> TensorRtDenoiser:
        engine = source.tensorrt_engine(
            chosen,
            version=version,
            device=device.index or 0,
            batch_size=batch_size,
            precision=target.precision,
            again=again,
        )
        try:
            return TensorRtDenoiser(
                engine, early, source.spec, library=chosen, batch_size=batch_size, device=device, keep=target.keep
            )
        except RefusedEngineError:
            if again:
                raise
        return make(batch_size, again=True)

    return make
