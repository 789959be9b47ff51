"""A TensorRT engine of a step network, for every batch size that it was built for; who has the memory is its caller.

An engine of one batch size has fixed shapes. One of several has a profile for each, of exactly that size: it holds the
weights once, and TensorRT-RTX 1.7 plans the same kernels for a profile as for an engine of that size alone
(bench/results/findings/engine-profiles.json). Activations are one piece of memory for all contexts of all sizes, since
only one runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from skipstep.backends.denoiser import Keep, Library
from skipstep.backends.device_step import StepTensor
from skipstep.backends.tensorrt_library import RuntimeCache, TensorRt, error_log
from skipstep.cuda.probe import DeviceFacts
from skipstep.errors import CaptureError, ExportError
from skipstep.networks.graphs import PREDICTION, SAMPLE

if TYPE_CHECKING:
    # The full library has no stubs either; what the type checker reads of this one stands for both.
    import tensorrt_rtx as trt

# What the libraries ask of the address of an activation, an input or an output.
ALIGNMENT = 256
_DTYPES: Mapping[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


class RefusedEngineError(ExportError):
    """An engine that the library does not deserialise."""


class TensorRtEngine:
    """`data` must be bytes that were verified: from skipstep.bundles.bundle.read_engine, or from the cache through
    skipstep.export.engines.build_engine_cached. `profiles` by batch size; None where the shapes are fixed.

    `module` is the imported library. `current()` makes the device the thread's; `device` tells it from others, and
    `facts` describes it. `graph` is what the engine was built from, for one without weights. Raises RefusedEngineError
    for an engine that the library does not take, and ExportError for one whose weights are missing.
    """

    def __init__(
        self,
        data: bytes,
        *,
        library: Library,
        module: TensorRt,
        device: Hashable,
        facts: Callable[[], DeviceFacts],
        current: Callable[[], AbstractContextManager[object]],
        keep: Keep | None = None,
        graph: Callable[[], bytes] | None = None,
    ) -> None:
        self.library: Library = library
        self._trt, self._current = module, current
        self.log = error_log(self._trt)
        with current():
            # The engine needs its runtime as long as it lives.
            self._runtime = self._trt.Runtime(self.log)
            self.engine: trt.ICudaEngine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise RefusedEngineError(
                got=f"an engine that {library} {self._trt.__version__} does not take: {self.log.summary()}",
                expected="one that this version built for this GPU",
                remedy="build it on this machine: skipstep build",
            )
        self._fill(graph)
        if getattr(self.engine, "streamable_weights_size", 0) > 0:
            # All weights would be on the device otherwise. What this leaves to copy takes part of the activations.
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self._names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.profiles = self._profiles()
        self.kernels = RuntimeCache.of(device, self._trt, keep, facts) if library == "tensorrt_rtx" else None
        # The greatest profile's: any other's fits in it.
        self.activation_bytes = max(1, self.engine.device_memory_size_v2)
        self._create_context = self._context_maker()

    def tensors(
        self, batch_size: int, *, channels_last: bool = False
    ) -> tuple[dict[str, StepTensor], dict[str, StepTensor]]:
        """Inputs and outputs by name. `channels_last`: images may be in this order. Raises ExportError for what cannot
        be bound to a tensor of known shape."""
        inputs: dict[str, StepTensor] = {}
        outputs: dict[str, StepTensor] = {}
        for name in self._names:
            dtype, shape = self.engine.get_tensor_dtype(name).name, self._shape(name, batch_size)
            place, layout = self.engine.get_tensor_location(name), self.engine.get_tensor_format(name)
            last = channels_last and name in (SAMPLE, PREDICTION) and layout == self._trt.TensorFormat.HWC
            if (
                dtype not in _DTYPES
                or min(shape, default=0) < 0
                or place != self._trt.TensorLocation.DEVICE
                or not (last or layout == self._trt.TensorFormat.LINEAR)
            ):
                described = f"{dtype} {list(shape)}, {layout.name} on {place.name}"
                raise ExportError(
                    got=f"an engine of {self.library} whose {name} is {described}",
                    # Over a range of shapes TensorRT-RTX goes on compiling better kernels behind the caller's back.
                    expected=f"plain tensors on the device, of batch size {batch_size}",
                    remedy=f"build it from the step network, with {batch_size} among the batch sizes",
                )
            (inputs if self._is_input(name) else outputs)[name] = StepTensor(shape, _DTYPES[dtype], last)
        return inputs, outputs

    def context(self, batch_size: int, activations: int, stream: int) -> trt.IExecutionContext:
        """A context at this batch size, whose activations are `activation_bytes` at that address: one piece of memory
        does for all, since only one runs at a time. What it still has to do is enqueued on `stream`."""
        context: trt.IExecutionContext | None = self._create_context()
        if context is None:
            raise self.failed("that makes no execution context")
        context.set_device_memory(activations, self.activation_bytes)
        profile = self.profiles.get(batch_size)
        if profile is not None:
            if not context.set_optimization_profile_async(profile, stream):
                raise self.failed(f"that has no profile {profile}")
            for name in filter(self._is_input, self._names):
                if not context.set_input_shape(name, self._shape(name, batch_size)):
                    raise self.failed(f"that does not take batch size {batch_size}")
        return context

    def _fill(self, graph: Callable[[], bytes] | None) -> None:
        """Give an engine that was built without weights those of its graph."""
        stat = getattr(self._trt, "EngineStat", None)  # Since TensorRT 10.7, without which none is built like this.
        if stat is None or self.engine.get_engine_stat(stat.STRIPPED_WEIGHTS_SIZE) <= 0:
            return
        if graph is None:
            raise ExportError(
                got="an engine without weights, and no package onnx that reads them from a graph",
                expected="an engine that holds its weights",
                remedy="build it again without strip: skipstep build",
            )
        with self._current():
            refitter = self._trt.Refitter(self.engine, self.log)
            filled = self._trt.OnnxParserRefitter(refitter, self.log).refit_from_bytes(graph())
            if not (filled and refitter.refit_cuda_engine()):
                raise self.failed("that does not take the weights of its graph")

    def capturing(self) -> bool:
        """Whether the thread records a graph."""
        return False

    def failed(self, how: str) -> CaptureError | ExportError:
        error = CaptureError if self.capturing() else ExportError
        return error(
            got=f"an engine of {self.library} {how}: {self.log.summary()}",
            expected="one that runs on this device",
            remedy="free memory on the device, or build the engine again on this machine",
        )

    def _profiles(self) -> dict[int, int | None]:
        """The profile of each batch size; one over a range of sizes is for none."""
        found: dict[int, int | None] = {}
        if SAMPLE in self._names:
            size = self.engine.get_tensor_shape(SAMPLE)[0]
            if size >= 0:
                return {size: None}
            for profile in range(self.engine.num_optimization_profiles):
                least, _, most = self.engine.get_tensor_profile_shape(SAMPLE, profile)
                if least[0] == most[0]:
                    found[least[0]] = profile
        return found

    def _is_input(self, name: str) -> bool:
        return self.engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT

    def _shape(self, name: str, batch_size: int) -> tuple[int, ...]:
        shape = tuple(self.engine.get_tensor_shape(name)[:])
        leads = self.profiles.get(batch_size) is not None and shape[:1] == (-1,)
        return (batch_size, *shape[1:]) if leads else shape

    def _context_maker(self) -> Callable[[], trt.IExecutionContext]:
        """How to make contexts whose memory is the caller's."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.kernels is None:
            return lambda: self.engine.create_execution_context(strategy)
        # TensorRT-RTX compiles its kernels on the device, when it makes a context: once for all of them.
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # For the one shape that a profile has, at once: not in the background, while a graph is recorded.
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        with self._current():
            config.set_runtime_cache(self.kernels.made_by(config))
        return lambda: self.engine.create_execution_context(config)
