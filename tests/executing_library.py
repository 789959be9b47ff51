"""TensorRT on a driver that executes (executing_cuda): a stand-in of the library whose launches run on the driver."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import fake_tensorrt
from executing_cuda import ExecutingCuda

_EXECUTE = fake_tensorrt.IExecutionContext.execute_async_v3


def modules(cuda: ExecutingCuda, library: str = "tensorrt_rtx") -> dict[str, Any]:
    """What to put into sys.modules: the driver and a TensorRT."""
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    package.bindings, bindings.driver = bindings, cuda  # type: ignore[attr-defined]
    names = {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.driver": cuda}
    return {**names, library: fake_tensorrt.library(library)}


def launches_on(cuda: ExecutingCuda) -> Callable[[Any, int], bool]:
    """IExecutionContext.execute_async_v3 of a TensorRT whose launches run when the driver's stream comes to them."""

    def execute_async_v3(self: Any, stream_handle: int) -> bool:
        if fake_tensorrt.PRETENCES.get("no launch"):
            return _EXECUTE(self, stream_handle)
        # Only what stands when it is launched counts.
        engine, launched = self._engine, copy.copy(self)
        launched._addresses = dict(self._addresses)

        def run() -> None:
            cuda.device(launched._memory[0], engine.device_memory_size_v2)
            for name in launched._addresses:
                array = launched._array(name)
                cuda.device(array.ctypes.data, array.nbytes)
            assert _EXECUTE(launched, stream_handle)

        cuda._enqueue(stream_handle, run)
        return True

    return execute_async_v3


def install(cuda: ExecutingCuda, library: str = "tensorrt_rtx") -> None:
    """For a process of its own."""
    sys.modules.update(modules(cuda, library))
    fake_tensorrt.IExecutionContext.execute_async_v3 = launches_on(cuda)  # type: ignore[method-assign]
