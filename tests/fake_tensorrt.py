"""TensorRT at the border of its bindings, for machines without a GPU: an "engine" is an ONNX graph of fixed shapes.

A context knows nothing but addresses, as the real one: it reads its inputs from there, computes, and writes its output
there. So a wrong row, address or order shows as wrong numbers. What the real library would crash on is an assertion
here. Nothing here has a name that the real bindings lack (tests/test_tensorrt_denoiser.py).
"""

from __future__ import annotations

import ctypes
import enum
import weakref
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_refit import OnnxParserRefitter, Refitter
from numpy.typing import NDArray

ALIGNMENT = 256
WORKSPACE_BYTES = 1000


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class DataType(enum.Enum):
    FLOAT = np.float32
    HALF = np.float16
    INT64 = np.int64
    FP8 = None


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class TensorFormat(enum.Enum):
    LINEAR = 0
    HWC8 = 1
    HWC = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 1


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class EngineStat(enum.Enum):
    STRIPPED_WEIGHTS_SIZE = 1


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IRuntimeCache:
    """Holds a byte for each context that was made with it."""

    def __init__(self) -> None:
        self._kernels = b""

    def serialize(self) -> bytearray:
        return bytearray(b"kernels" + self._kernels)

    def deserialize(self, blob: bytes) -> bool:
        fits = bytes(blob).startswith(b"kernels")
        if fits:
            self._kernels = bytes(blob).removeprefix(b"kernels")
        return fits


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: weakref.ref[IRuntimeCache] | None = None
        self._specialization = DynamicShapesKernelSpecializationStrategy.LAZY

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> DynamicShapesKernelSpecializationStrategy:
        return self._specialization

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, value: DynamicShapesKernelSpecializationStrategy) -> None:
        self._specialization = value

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        # The real one keeps a raw pointer: the caller owns the cache.
        self._cache = weakref.ref(cache)
        return True


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            return ICudaEngine(serialized_engine, self._logger)
        except Exception as error:
            self._logger.log(Severity.WARNING, "not what went wrong")
            self._logger.log(Severity.ERROR, f"cannot deserialize: {type(error).__name__}")
            return None


class ICudaEngine:
    """Tests set what it pretends: the `_overrides` of what it says about a tensor, and whether contexts work."""

    def __init__(self, graph: bytes, logger: ILogger) -> None:
        self._graph, self._logger = graph, logger
        self._open()

    def _open(self) -> None:
        options = onnxruntime.SessionOptions()
        # Threads that wait for more work would take the cores from those of the loop's host.
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._outputs = {each.name: each for each in self._session.get_outputs()}
        self._contexts: list[IExecutionContext] = []
        self.weight_streaming_budget_v2 = self.streamable_weights_size
        self._overrides: dict[tuple[str, str], Any] = PRETENCES.get("tensors", {})
        said = self._session.get_modelmeta().custom_metadata_map
        self._profiles = [int(size) for size in said.get("profiles", "").split()]
        self._stripped = "stripped" in said

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    @property
    def device_memory_size_v2(self) -> int:
        return WORKSPACE_BYTES + self.streamable_weights_size - self.weight_streaming_budget_v2

    @property
    def streamable_weights_size(self) -> int:
        return int(PRETENCES.get("streamable", 0))

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 4

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._profiles))

    def get_engine_stat(self, stat: EngineStat) -> int:
        return 1 if self._stripped else -1

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        size = self._profiles[profile_index] if self._profiles else 4
        least = size if self._profiles else 1
        return [(each, *self.get_tensor_shape(name)[1:]) for each in (least, size, size)]

    def get_tensor_name(self, index: int) -> str:
        return [*self._outputs, *self._inputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        kind = (self._inputs | self._outputs)[name].type
        dtype = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int64)": DataType.INT64}[
            kind
        ]
        found: DataType = self._overrides.get((name, "dtype"), dtype)
        return found

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        shape = tuple(-1 if isinstance(size, str) else size for size in (self._inputs | self._outputs)[name].shape)
        found: Sequence[int] = self._overrides.get((name, "shape"), shape)
        return found

    def get_tensor_format(self, name: str) -> TensorFormat:
        found: TensorFormat = self._overrides.get((name, "format"), TensorFormat.LINEAR)
        return found

    def get_tensor_location(self, name: str) -> TensorLocation:
        found: TensorLocation = self._overrides.get((name, "location"), TensorLocation.DEVICE)
        return found

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, runtime_config: IRuntimeConfig | ExecutionContextAllocationStrategy
    ) -> IExecutionContext | None:
        strategy = runtime_config._strategy if isinstance(runtime_config, IRuntimeConfig) else runtime_config
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED, "it would allocate while it runs"
        if PRETENCES.get("no contexts"):
            self._logger.log(Severity.ERROR, "out of memory")
            return None
        cache = runtime_config._cache if isinstance(runtime_config, IRuntimeConfig) else None
        if self._profiles and isinstance(runtime_config, IRuntimeConfig):
            eager = DynamicShapesKernelSpecializationStrategy.EAGER
            assert runtime_config._specialization is eager, "it would compile in the background"
        held = None if cache is None else cache()
        if held is not None:
            held._kernels = held._kernels or b"compiled"
        self._contexts.append(IExecutionContext(self, cache))
        return self._contexts[-1]


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, cache: weakref.ref[IRuntimeCache] | None) -> None:
        self._engine, self._cache = engine, cache
        self._check_cache()
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        # Streams that it was launched on, and where its tensors were at each launch.
        self._launches: list[tuple[int, dict[str, int]]] = []

    def _check_cache(self) -> None:
        assert self._cache is None or self._cache() is not None, "the runtime cache was freed: a use after free"

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % ALIGNMENT == 0
        assert size >= self._engine.device_memory_size_v2
        self._memory = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle, "the default stream cannot be recorded"
        self._profile, self._shapes = profile_index, {}
        return profile_index < len(self._engine._profiles) and not PRETENCES.get("no profiles")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = tuple(shape)
        return least <= tuple(shape) <= most and not PRETENCES.get("no shapes")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % ALIGNMENT == 0, "native code would read past it"
        known = name in self._engine._inputs | self._engine._outputs and not PRETENCES.get("no addresses")
        if known:
            self._addresses[name] = memory
        return known

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(stream) and not PRETENCES.get("takes memory")

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        self._check_cache()
        assert self._addresses.keys() == engine._inputs.keys() | engine._outputs.keys()
        assert not engine._profiles or self._shapes.keys() == engine._inputs.keys(), "the shapes are not known"
        if PRETENCES.get("no launch"):
            engine._logger.log(Severity.ERROR, "no launch today")
            return False
        # Activations: whatever was there is gone.
        ctypes.memset(self._memory[0], 0xA5, WORKSPACE_BYTES)
        (result,) = engine._session.run(None, {name: self._array(name).copy() for name in engine._inputs})
        (output,) = engine._outputs
        self._array(output)[...] = result
        self._launches.append((stream_handle, dict(self._addresses)))
        return True

    def _array(self, name: str) -> NDArray[Any]:
        dtype, shape = self._engine.get_tensor_dtype(name).value, tuple(self._engine.get_tensor_shape(name))
        if self._engine._profiles:
            shape = (self._engine._profiles[self._profile], *shape[1:])
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = np.frombuffer((ctypes.c_uint8 * count).from_address(self._addresses[name]), dtype)
        if self._engine.get_tensor_format(name) == TensorFormat.HWC:
            return np.moveaxis(memory.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
        return memory.reshape(shape)


# What the library pretends; a test empties it when it is done.
PRETENCES: dict[str, Any] = {}


def library(name: str = "tensorrt_rtx") -> SimpleNamespace:
    """A module to stand in for the real one."""
    return SimpleNamespace(
        __name__=name,
        __spec__=ModuleSpec(name, None),
        __version__="1.7.0.0",
        DataType=DataType,
        DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy,
        EngineStat=EngineStat,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        ICudaEngine=ICudaEngine,
        IExecutionContext=IExecutionContext,
        ILogger=ILogger,
        IRuntimeCache=IRuntimeCache,
        IRuntimeConfig=IRuntimeConfig,
        OnnxParserRefitter=OnnxParserRefitter,
        Refitter=Refitter,
        Runtime=Runtime,
        TensorFormat=TensorFormat,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
    )


def engine_of(step_graph: bytes, *batch_sizes: int) -> bytes:
    """The step graph with its batch written into every shape, as the builder does for a single size; of several sizes
    with a profile for each."""
    model = onnx.load_from_string(step_graph)
    if len(batch_sizes) > 1:
        model.metadata_props.add(key="profiles", value=" ".join(map(str, sorted(batch_sizes))))
        return bytes(model.SerializeToString())
    for each in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in each.type.tensor_type.shape.dim:
            if dimension.dim_param == "batch":
                dimension.dim_value = batch_sizes[0]
    return bytes(model.SerializeToString())
