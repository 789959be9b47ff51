"""ONNX Runtime on a GPU: the step network through its CUDA provider, and its step inputs, computed before the loop.

The session launches on one stream and waits for nothing. Sample, prediction and step inputs are bound once, to
buffers that never move, where rows of the tables are copied on the device. Step inputs that all stages share are read
in place. With a graph that the provider captures itself (`cuda_graph`) every address must stay the same, so they are
copied, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.backends.denoiser import Enqueue, MakeDenoiser, NetworkSource, RunPart, StepInput, Target
from skipstep.backends.device_step import (
    HOST_DTYPES,
    HostInputs,
    StepTensor,
    check_step_tensors,
    copy_row,
)
from skipstep.backends.onnxruntime import EarlyGraphs, give_weights, run_session
from skipstep.backends.onnxruntime import part as onnxruntime_part
from skipstep.calls.conditioning import Conditioning
from skipstep.cuda.probe import cuda_device
from skipstep.errors import DeviceUnavailableError, ExportError, MissingDependencyError
from skipstep.networks.graphs import PREDICTION, SAMPLE, StepInputs
from skipstep.networks.spec import NetworkSpec
from skipstep.reporting import LOGGER

_PROVIDER = "CUDAExecutionProvider"
_SESSION_DTYPES: Mapping[str, str] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}
# TensorProto.BFLOAT16, by its number in the ONNX standard.
_ONNX_BFLOAT16 = 16


@dataclass(frozen=True, slots=True)
class DeviceSession:
    """A session, the device that it runs on, and the stream that it launches on: None in host memory.

    `cuda_graph`: the provider records a graph for every denoiser, and replays it.
    """

    session: onnxruntime.InferenceSession
    device: torch.device
    stream: torch.cuda.Stream | None = None
    cuda_graph: bool = False
    _graph_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def run_options(self) -> onnxruntime.RunOptions:
        """For one denoiser: nothing waits, and no other graph shares it."""
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(next(self._graph_ids)))
        return options


def make_cuda_session(
    model: bytes,
    *,
    device: torch.device,
    stream: torch.cuda.Stream | None = None,
    cuda_graph: bool = False,
    tf32: bool = False,
) -> DeviceSession:
    """A session with the CUDA provider for a step graph of any batch size.

    It launches on `stream`, which may not be the default stream; None takes a new one. A loop that runs on that very
    stream is spared the events between two. `cuda_graph` records the network's launches into a graph of the provider's
    own: less work for the host, but releases of ONNX Runtime differ in whether the host waits for each replay.

    Raises MissingDependencyError for a build without the provider, DeviceUnavailableError where the provider cannot
    run, ExportError for a graph that it does not take.
    """
    if _PROVIDER not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            got=f"onnxruntime {onnxruntime.__version__}, a build without {_PROVIDER}",
            expected="onnxruntime-gpu, which takes the place of onnxruntime",
            remedy="pip uninstall onnxruntime, then pip install 'skipstep[gpu]'",
        )
    cuda_device(device.index or 0)
    stream = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    chosen = {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(stream.cuda_stream),
        "enable_cuda_graph": str(int(cuda_graph)),
        "use_tf32": str(int(tf32)),  # float32 means float32, as in every other backend.
    }
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    give_weights(options, model)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[(_PROVIDER, chosen), "CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class but Exception.
        raise ExportError(
            got=f"a graph that ONNX Runtime {onnxruntime.__version__} does not take: {error}",
            expected="a graph with operators that its CUDA provider knows",
            remedy="upgrade onnxruntime-gpu, or use backend='torch'",
        ) from error
    # Where a library of CUDA's is missing, ONNX Runtime would go on without the GPU.
    if _PROVIDER not in session.get_providers():
        raise DeviceUnavailableError(
            got=f"onnxruntime {onnxruntime.__version__} whose {_PROVIDER} does not load",
            expected="the CUDA and cuDNN libraries that this release of onnxruntime-gpu was built with",
            remedy="install them (pip install 'onnxruntime-gpu[cuda,cudnn]'), or use backend='torch'",
        )
    return DeviceSession(session, device, stream, cuda_graph)


class OnnxRuntimeCudaDenoiser:
    """The step graph at one batch size (skipstep.backends.denoiser). Raises ExportError for another graph.

    One session serves denoisers of several sizes. All contexts are one: the buffers are the session's only memory of a
    run.
    """

    name = "onnxruntime"
    fallback: str | None = None
    capture_refusal: str | None = (
        "ONNX Runtime's CUDA provider captures its own graphs, and takes memory while others would record"
    )

    def __init__(self, session: DeviceSession, early: EarlyGraphs, spec: NetworkSpec, *, batch_size: int) -> None:
        self._session, self._options = session, session.run_options()
        self.batch_size = batch_size
        inputs, outputs = (
            {each.name: _step_tensor(each, batch_size) for each in tensors}
            for tensors in (session.session.get_inputs(), session.session.get_outputs())
        )
        check_step_tensors(inputs, outputs, spec, batch_size=batch_size, of="a graph")
        looked_up = {name: each for name, each in inputs.items() if name != SAMPLE}
        self._inputs = HostInputs(early, spec, looked_up, batch_size=batch_size)
        self.step_inputs: Mapping[str, StepInput] = self._inputs.step_inputs
        self._copied = {
            name: torch.zeros(each.shape, dtype=getattr(torch, each.dtype), device=session.device)
            for name, each in {**inputs, **outputs}.items()
            if session.cuda_graph or name not in self.step_inputs or self.step_inputs[name].per_stage
        }
        self._binding = session.session.io_binding()
        for name, buffer in self._copied.items():
            self._bind(name, buffer)
        self.input, self.output = self._copied.pop(SAMPLE), self._copied.pop(PREDICTION)
        self._read_in_place: dict[str, int] = {}

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        return self._inputs.compute(timesteps, conditioning)

    def new_context(self) -> Enqueue:
        return self._enqueue

    def _enqueue(self, values: Mapping[str, Tensor], stage: int | Tensor) -> None:
        for name, value in values.items():
            if name not in self._copied:
                if value.data_ptr() != self._read_in_place.get(name):
                    self._bind(name, value)
                    self._read_in_place[name] = value.data_ptr()
            elif self.step_inputs[name].per_stage:
                copy_row(value, stage, self._copied[name])
            else:
                self._copied[name].copy_(value, non_blocking=True)
        own = self._session.stream
        if own is None:
            self._run()
            return
        current = torch.cuda.current_stream(self._session.device)
        if own == current:
            self._run()
            return
        own.wait_stream(current)
        self._run()
        current.wait_stream(own)

    def _bind(self, name: str, tensor: Tensor) -> None:
        bind = self._binding.bind_output if name == PREDICTION else self._binding.bind_input
        place = self._session.device.type, self._session.device.index or 0
        bind(name, *place, _element_type(tensor.dtype), tuple(tensor.shape), tensor.data_ptr())

    def _run(self) -> None:
        try:
            self._session.session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # As above.
            raise ExportError(
                got=f"a graph that failed on the device: {type(error).__name__}: {error}",
                expected="a run of the network",
                remedy="free memory on the device, or use backend='torch'",
            ) from error


def denoisers(source: NetworkSource, target: Target, *, cuda_graph: bool = False) -> MakeDenoiser:
    """Denoisers that share one session on the target's device and stream. Raises as make_cuda_session does.

    The target's precision is the step network's; what comes before it is computed in float32, on the host.
    """
    device = torch.device(target.device)
    graph, tf32 = source.step_graph(target.dtype), target.precision == "tf32"
    session = make_cuda_session(graph, device=device, stream=target.stream, cuda_graph=cuda_graph, tf32=tf32)
    early = EarlyGraphs(source.before_loop(), source.spec, tables=source.tables)
    return lambda batch_size: OnnxRuntimeCudaDenoiser(session, early, source.spec, batch_size=batch_size)


def part(graph: bytes, target: Target, *, decodes: bool, tiled: bool) -> RunPart:
    """In float32, and in TF32 where the target's precision is less (skipstep.backends.registry.Backend.part). On the
    CPU, with a warning, where this build of ONNX Runtime has no CUDA provider."""
    device, tf32 = torch.device(target.device), decodes and target.precision != "float32"
    try:
        made = make_cuda_session(graph, device=device, stream=target.stream, tf32=tf32)
    except MissingDependencyError as error:
        LOGGER.warning("a part of the pipeline runs on the CPU: %s", error)
        return onnxruntime_part(graph, target, decodes=decodes, tiled=tiled)
    return partial(run_session, made.session)


def _step_tensor(described: Any, batch_size: int) -> StepTensor:
    """What a session says of an input or output, at this batch size. Raises ExportError for a dtype of no network's."""
    if described.type not in _SESSION_DTYPES:
        raise ExportError(
            got=f"a graph whose {described.name} is {described.type}",
            expected=f"one of {', '.join(_SESSION_DTYPES)}",
            remedy="export the network again",
        )
    shape = tuple(batch_size if isinstance(size, str) else size for size in described.shape)
    return StepTensor(shape, _SESSION_DTYPES[described.type])


def _element_type(dtype: torch.dtype) -> Any:
    return _ONNX_BFLOAT16 if dtype == torch.bfloat16 else HOST_DTYPES[str(dtype).removeprefix("torch.")]
