"""The CUDA driver: a device, its kernels and its calls, without torch and without the CUDA runtime.

`CudaDriver` goes through cuda-bindings. Memory, streams and graphs are in skipstep.cuda.queue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from skipstep.cuda.probe import DeviceFacts
from skipstep.errors import DeviceMemoryError, DeviceUnavailableError, needs_packages

# After these nothing on the device works any more in this process.
_LOST: Final = ("ILLEGAL_", "LAUNCH_", "MISALIGNED_", "HARDWARE_", "INVALID_PC", "ECC_", "ASSERT", "CONTEXT_IS_DESTR")


@dataclass(frozen=True, slots=True)
class DeviceBuffer:
    """Memory on the device: its address, and how many bytes from there belong to it."""

    address: int
    num_bytes: int

    def part(self, start: int, num_bytes: int) -> DeviceBuffer:
        assert 0 <= start <= start + num_bytes <= self.num_bytes, "a part lies inside"
        return DeviceBuffer(self.address + start, num_bytes)


class CudaDriver:
    """The driver's own interface, on the device's primary context: the one that every CUDA library there uses.

    `lost`: the error after which nothing works any more. Raises MissingDependencyError and DeviceUnavailableError.
    """

    def __init__(self, device: int = 0) -> None:
        with needs_packages("cuda-bindings, through which kernels are launched", remedy="pip install 'skipstep[edge]'"):
            from cuda.bindings import driver
        self._cuda: Any = driver
        self._modules: list[Any] = []
        self.lost: str | None = None
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
        self.number = device
        self._device = self._call("cuDeviceGet", device)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)

    def capability(self) -> int:
        """Compute capability of the device, 87 for 8.7."""
        return 10 * self._attribute("COMPUTE_CAPABILITY_MAJOR") + self._attribute("COMPUTE_CAPABILITY_MINOR")

    def cuda_major(self) -> int:
        """Major release of CUDA that the driver serves."""
        return int(self._call("cuDriverGetVersion")) // 1000

    def facts(self) -> DeviceFacts:
        name = bytes(self._call("cuDeviceGetName", 256, self._device))
        return DeviceFacts(
            name=name.split(b"\0")[0].decode(),
            compute_capability=self.capability(),
            num_multiprocessors=self._attribute("MULTIPROCESSOR_COUNT"),
            memory_bytes=int(self._call("cuDeviceTotalMem", self._device)),
            cuda_version=int(self._call("cuDriverGetVersion")),
        )

    def _attribute(self, name: str) -> int:
        kind = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", kind, self._device))

    def load(self, cubin: bytes, kernel: str) -> Any:
        """The kernel of a cubin, which stays loaded until `close`."""
        with self.current():
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
        """Enqueue the kernel on `stream`. `parameters` is the address of an array of pointers, one per argument."""
        with self.current():
            self._call("cuLaunchKernel", kernel, *grid, threads, 1, 1, shared_bytes, stream, parameters, 0)

    def call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver's, on this device. Raises DeviceUnavailableError and DeviceMemoryError."""
        with self.current():
            return self._call(name, *arguments)

    def outcome(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """The same without an error: the status, then the results."""
        with self.current():
            return tuple(getattr(self._cuda, name)(*arguments))

    def release(self, name: str, handle: Any) -> None:
        """The same for what gives a handle back, unless it went with the context."""
        if self.lost is None:
            self.call(name, handle)

    def constant(self, kind: str, name: str) -> Any:
        """A value of one of the driver's enumerations."""
        return getattr(getattr(self._cuda, kind), name)

    def close(self) -> None:
        modules, self._modules = self._modules, []
        if self._context is not None:
            with self.current():
                for module in modules if self.lost is None else ():
                    self._call("cuModuleUnload", module)
            self._call("cuDevicePrimaryCtxRelease", self._device)
            self._context = None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context this thread's, and leave the thread as it was."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _call(self, name: str, *arguments: Any) -> Any:
        return self.check(name, getattr(self._cuda, name)(*arguments), *arguments)

    def check(self, name: str, outcome: tuple[Any, ...], *arguments: Any) -> Any:
        """The first result of a function, or the error that its status stands for."""
        status, *results = outcome
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            if status.name.removeprefix("CUDA_ERROR_").startswith(_LOST):
                self.lost = f"{status.name} from {name}"
            if status.name == "CUDA_ERROR_OUT_OF_MEMORY":
                raise DeviceMemoryError(
                    got=f"too little memory for {name}({', '.join(map(str, arguments))})",
                    expected="memory for the network's buffers, activations and graphs",
                    remedy="free memory on the device, or export the bundle with smaller batch sizes or fewer plans",
                )
            raise DeviceUnavailableError(
                got=f"{status.name} from {name}",
                expected="CUDA_SUCCESS",
                remedy="see that name in the CUDA driver's list of errors",
            )
        return results[0] if results else None
