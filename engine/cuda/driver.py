"""The CUDA driver, with only what launching a kernel takes: without torch, without the CUDA runtime.

`Driver` is what skipstep.edge.launcher needs; `CudaDriver` is the real one, through cuda-bindings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from skipstep.errors import DeviceUnavailableError, MissingDependencyError


class Driver(Protocol):
    """The CUDA driver, on one device."""

    def capability(self) -> int:
        """Compute capability of the device, 87 for 8.7."""
        ...

    def cuda_major(self) -> int:
        """Major release of CUDA that the driver serves."""
        ...

    def load(self, cubin: bytes, kernel: str) -> Any:
        """Load a cubin onto the device and return its kernel, which stays loaded until `close`."""
        ...

    def launch(
        self,
        kernel: Any,
        *,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        parameters: int,
    ) -> None:
        """Enqueue the kernel on `stream`. `parameters` is the address of an array of pointers, one per argument."""
        ...

    def close(self) -> None: ...


class CudaDriver:
    """The driver's own interface, on the device's primary context: the one that every CUDA library there uses.

    Raises MissingDependencyError and DeviceUnavailableError.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise MissingDependencyError(
                got=f"no package {error.name}",
                expected="cuda-bindings, through which kernels are launched",
                remedy="pip install 'skipstep[edge]'",
            ) from error
        self._cuda: Any = driver
        self._modules: list[Any] = []
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # Also what cuda-bindings raises where no driver is installed.
            reason = error.got if isinstance(error, DeviceUnavailableError) else error
            raise DeviceUnavailableError(
                got=f"no CUDA driver that starts ({reason})",
                expected="an NVIDIA GPU with its driver",
                remedy="use backend='onnxruntime', which runs on the CPU",
            ) from error
        count = self._call("cuDeviceGetCount")
        if not 0 <= device < count:
            raise DeviceUnavailableError(
                got=f"device {device}", expected=f"one of the {count} here", remedy="pass a number below that"
            )
        self._device = self._call("cuDeviceGet", device)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)

    def capability(self) -> int:
        kinds = self._cuda.CUdevice_attribute
        major = self._call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._device)
        minor = self._call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._device)
        return 10 * int(major) + int(minor)

    def cuda_major(self) -> int:
        return int(self._call("cuDriverGetVersion")) // 1000

    def load(self, cubin: bytes, kernel: str) -> Any:
        with self._current():
            module = self._call("cuModuleLoadData", cubin)
            self._modules.append(module)
            return self._call("cuModuleGetFunction", module, kernel.encode())

    def launch(
        self,
        kernel: Any,
        *,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        parameters: int,
    ) -> None:
        with self._current():
            self._call("cuLaunchKernel", kernel, *grid, threads, 1, 1, shared_bytes, stream, parameters, 0)

    def close(self) -> None:
        modules, self._modules = self._modules, []
        if self._context is not None:
            with self._current():
                for module in modules:
                    self._call("cuModuleUnload", module)
            self._call("cuDevicePrimaryCtxRelease", self._device)
            self._context = None

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make the context this thread's, and leave the thread as it was."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise DeviceUnavailableError(
                got=f"{status.name} from {name}",
                expected="CUDA_SUCCESS",
                remedy="see that name in the CUDA driver's list of errors",
            )
        return results[0] if results else None
