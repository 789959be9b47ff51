"""What must be equal for measured latencies to be valid: the device, what runs the network on it, and how.

The processor's model, cores and threads, or the GPU and its driver; the backend and its version; the loop; the
network's precision; the version of skipstep. Other load on the machine and its clock rates are not part of it.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from skipstep.backends.processor import cpus, thread_limit
from skipstep.backends.registry import capabilities
from skipstep.cuda.probe import cuda_device
from skipstep.errors import InputError
from skipstep.storage.untrusted import Within
from skipstep.version import __version__

if TYPE_CHECKING:
    from skipstep.loops.contract import Sampler

    class _Engine(Sampler, Protocol):
        @property
        def device(self) -> str: ...

        backend: str
        precision: str
        num_threads: int | None


# The modules that run the network, by backend; the imported ones give their version.
_LIBRARIES = {"tensorrt": ("tensorrt", "tensorrt_rtx")}
_DRIVER_FILE = "/sys/module/nvidia/version"
Count = Annotated[int, Within(1, 1 << 20)]


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """Latencies measured under one identity are valid under an equal one.

    device    "cpu" or "cuda".
    name      the processor's model or the GPU's name.
    library   what runs the network, with its version: "onnxruntime 1.31.1".
    cores     that the process may use, and `threads` that the network runs on; only on the CPU.
    driver    of the GPU; only on a GPU.
    Raises InputError where these contradict each other.
    """

    device: str
    name: str
    backend: str
    library: str
    loop: str
    precision: str
    skipstep: str = __version__
    cores: Count | None = None
    threads: Count | None = None
    driver: str | None = None

    def __post_init__(self) -> None:
        on_cpu = self.device == "cpu"
        there = [each is not None for each in (self.cores, self.threads, self.driver)]
        if self.device not in ("cpu", "cuda") or there != [on_cpu, on_cpu, not on_cpu]:
            raise InputError(
                got=f"device={self.device!r} with cores={self.cores}, threads={self.threads}, driver={self.driver!r}",
                expected="'cpu' with cores and threads, or 'cuda' with a driver, and nothing else",
                remedy="use skipstep.latency.identity.device_identity, which finds them",
            )

    def __str__(self) -> str:
        where = f"{self.cores} cores, {self.threads} threads" if self.device == "cpu" else f"driver {self.driver}"
        return f"{self.name}, {where}; {self.library}, {self.loop} loop, {self.precision}; skipstep {self.skipstep}"

    def differences(self, other: DeviceIdentity) -> list[str]:
        """The differences in words, such as "threads 2 instead of 4"."""
        pairs = [(each.name, getattr(self, each.name), getattr(other, each.name)) for each in fields(self)]
        return [f"{name} {mine} instead of {theirs}" for name, mine, theirs in pairs if mine != theirs]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def engine_identity(engine: _Engine) -> DeviceIdentity:
    """What must be equal for latencies that were measured elsewhere to count here."""
    return device_identity(
        backend=engine.backend,
        loop=engine.runner.loop.name,
        device=engine.device,
        precision=engine.precision,
        num_threads=engine.num_threads,
        gpu_name=engine.runner.loop.device_name,
    )


def device_identity(
    *,
    backend: str,
    loop: str,
    device: str,
    precision: str = "float32",
    num_threads: int | None = None,
    gpu_name: str | None = None,
) -> DeviceIdentity:
    """The identity of an engine in this process.

    device        "cpu", "cuda" or "cuda:1", as engines have it.
    num_threads   of the runtime; None: all that the process may use. torch is asked for its own.
    gpu_name      of the device; None: that of the first.
    Raises DeviceUnavailableError for a GPU that this machine lacks.
    """
    if device.partition(":")[0] == "cuda":
        return DeviceIdentity(
            device="cuda",
            name=gpu_name or cuda_device(int(device.partition(":")[2] or 0)).name,
            backend=backend,
            library=_library(backend),
            loop=loop,
            precision=precision,
            driver=_driver_version(),
        )
    cores = len(cpus())
    if backend == "torch":
        import torch

        num_threads = torch.get_num_threads()
    return DeviceIdentity(
        device="cpu",
        name=_cpu_name(),
        backend=backend,
        library=_library(backend),
        loop=loop,
        precision=precision,
        cores=cores,
        threads=num_threads or thread_limit() or cores,
    )


def _library(backend: str) -> str:
    if backend == "webgpu":  # Its GPU is another device than the loop's.
        return capabilities(backend, "cpu") or backend
    modules = {name: sys.modules.get(name) for name in _LIBRARIES.get(backend, (backend,))}
    found = [f"{name} {getattr(module, '__version__', 'unknown')}" for name, module in modules.items() if module]
    return ", ".join(found) or backend


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def _driver_version() -> str:
    try:
        with open(_DRIVER_FILE, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return "unknown"
