"""TensorRT and TensorRT-RTX: a step network as an engine, made to be recorded into graphs of its caller's.

    input, output    fixed addresses, which the step kernel writes and reads
    tables           a stage's rows are read where they stand, by address; where that is not aligned, from a copy
    engine           weights and activations once for all batch sizes (skipstep.backends.tensorrt_engine)
    context          one per recorded graph, and run once before anything is recorded: a first run may take memory

The two libraries have the same Python interface, so this is written once; what TensorRT-RTX alone has is looked up
alone. An engine is native code: deserialising one that was not verified would run whatever is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.backends.denoiser import Enqueue, MakeDenoiser, NetworkSource, StepInput, Target
from skipstep.backends.device_step import HostInputs, StepTensor, check_step_tensors, copy_row
from skipstep.backends.onnxruntime import EarlyGraphs
from skipstep.backends.tensorrt_engine import ALIGNMENT, RefusedEngineError
from skipstep.backends.tensorrt_library import choose_library, load_library
from skipstep.backends.tensorrt_loaded import LoadedEngine, aligned_zeros
from skipstep.calls.conditioning import Conditioning
from skipstep.cuda.device import CAPTURE_LOCK
from skipstep.errors import InputError
from skipstep.networks.graphs import PREDICTION, SAMPLE, StepInputs
from skipstep.networks.spec import NetworkSpec

if TYPE_CHECKING:
    import tensorrt_rtx as trt


class TensorRtDenoiser:
    """An engine of a step network at one of its batch sizes (skipstep.backends.denoiser.DeviceDenoiser).

    Run it on a stream that is not the default one, on which TensorRT waits for the device, and no two of one engine at
    once. Raises ExportError for an engine that is not this network's, or does not run.
    """

    fallback: str | None = None

    def __init__(self, loaded: LoadedEngine, early: EarlyGraphs, spec: NetworkSpec, *, batch_size: int) -> None:
        self.name: str = loaded.library
        self.batch_size = batch_size
        self.loaded, self.device = loaded, loaded.device
        inputs, outputs = loaded.tensors(batch_size, channels_last=True)
        check_step_tensors(inputs, outputs, spec, batch_size=batch_size, of=f"an engine of {loaded.library}")
        looked_up = {name: each for name, each in inputs.items() if name != SAMPLE}
        self._inputs = HostInputs(early, spec, looked_up, batch_size=batch_size)
        self.step_inputs: Mapping[str, StepInput] = self._inputs.step_inputs

        def buffer(each: StepTensor) -> Tensor:
            count, *rest = each.shape
            shape = (count, *rest[1:], rest[0]) if each.channels_last else each.shape
            zeros = aligned_zeros(shape, getattr(torch, each.dtype), self.device)
            return zeros.movedim(-1, 1) if each.channels_last else zeros

        self.input, self.output = buffer(inputs[SAMPLE]), buffer(outputs[PREDICTION])
        self.rows = {name: buffer(looked_up[name]) for name, each in self.step_inputs.items() if each.per_stage}
        first = self._settled_context()
        self._spare: _Context | None = first
        if loaded.kernels is not None:
            loaded.kernels.save()
        self.capture_refusal: str | None = None
        # Full TensorRT has no such question, and records whatever does not choose shapes while it runs.
        if loaded.kernels is not None and not first.context.is_stream_capturable(loaded.stream.cuda_stream):
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
            context = _Context(self, self.loaded.new_context(self.batch_size))
            zeros = {
                name: aligned_zeros(
                    (*((1,) if each.per_stage else ()), self.batch_size, *each.shape),
                    getattr(torch, each.dtype),
                    self.device,
                )
                for name, each in self.step_inputs.items()
            }
            # These zeros and all buffers were filled there.
            self.loaded.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.loaded.stream):
                context(zeros, 0)
            torch.cuda.synchronize(self.device)
            context.forget()
        return context


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
        self._addresses: dict[str, int] = {}
        self._bound: Mapping[str, Tensor] | None = None
        self._rows: dict[str, _Rows] = {}
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
            raise self._owner.loaded.failed("that does not launch")

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
                in_place = address % ALIGNMENT == 0 and (pitch % ALIGNMENT == 0 or len(value) == 1)
                rows[name] = _Rows(value, address, pitch, in_place)
            elif address % ALIGNMENT:
                raise InputError(
                    got=f"{name} at an address that is no multiple of {ALIGNMENT}",
                    expected="aligned memory",
                    remedy="allocate what all stages share on its own",
                )
            else:
                self._point(name, address)
        self._bound, self._rows = values, rows

    def _point(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            if not self.context.set_tensor_address(name, address):
                raise self._owner.loaded.failed(f"that has no place for {name}")
            self._addresses[name] = address


def denoisers(source: NetworkSource, target: Target) -> MakeDenoiser:
    """Denoisers from TensorRT engines of the source: one for all batch sizes of the target where the source has it.

    The target's precision is the step network's; what comes before it is computed in float32, on the host. An engine
    that was kept from an earlier build and is refused is built again, once. Raises as LoadedEngine and TensorRtDenoiser
    do, and what the source raises where it has no engine.
    """
    chosen = choose_library(source.engine_libraries, target.library)
    device = torch.device(target.device)
    version = load_library(chosen, device.index or 0).__version__
    early = EarlyGraphs(source.before_loop(), source.spec, tables=source.tables)
    engines: list[LoadedEngine] = []

    def load(batch_size: int, *, again: bool = False) -> LoadedEngine:
        data = source.tensorrt_engine(
            chosen,
            version=version,
            device=device.index or 0,
            batch_sizes=tuple(dict.fromkeys((batch_size, *target.batch_sizes))),
            precision=target.precision,
            again=again,
        )
        try:
            return LoadedEngine(
                data,
                library=chosen,
                device=device,
                keep=target.keep,
                graph=lambda: source.engine_graph(target.precision),
            )
        except RefusedEngineError:
            if again:
                raise
        return load(batch_size, again=True)

    def make(batch_size: int) -> TensorRtDenoiser:
        loaded = next((each for each in engines if batch_size in each.profiles), None)
        if loaded is None:
            loaded = load(batch_size)
            engines.append(loaded)
        return TensorRtDenoiser(loaded, early, source.spec, batch_size=batch_size)

    return make
