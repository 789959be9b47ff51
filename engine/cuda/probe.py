"""Whether there is a CUDA device, and which, as the driver reports it.

Libraries that need a device may crash in native code without one, so the driver is asked before they are touched.
This needs neither torch nor any CUDA package. Devices are numbered as CUDA numbers them: of those that are visible.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

from skipstep.errors import DeviceUnavailableError, MissingDependencyError

# CUdevice_attribute of the driver's interface.
_MULTIPROCESSOR_COUNT, _COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 16, 75, 76


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What tells one device from another, and what its driver can do.

    `compute_capability` is 86 for 8.6, `cuda_version` the newest CUDA that the driver serves: 13000 for 13.0. Two
    devices of one name may differ: both large and small modules of a generation report "Orin".
    """

    name: str
    compute_capability: int
    num_multiprocessors: int
    memory_bytes: int
    cuda_version: int


def cuda_device(
    index: int = 0, *, remedy: str = "run this on a machine with an NVIDIA GPU and its driver"
) -> DeviceFacts:
    """The CUDA device of that number. Raises DeviceUnavailableError with the caller's `remedy` where there is none."""

    def unavailable(got: str) -> DeviceUnavailableError:
        return DeviceUnavailableError(got=got, expected="a CUDA device", remedy=remedy)

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise unavailable("a machine without a CUDA driver (libcuda.so.1)") from error

    def call(function: str, *arguments: Any) -> None:
        status = getattr(driver, function)(*arguments)
        if status != 0:
            raise unavailable(f"CUDA error {status} from {function}")

    device, version, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()

    def attribute(kind: int) -> int:
        call("cuDeviceGetAttribute", ctypes.byref(number), kind, device)
        return number.value

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), index)
    call("cuDeviceGetName", name, len(name), device)
    call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    call("cuDriverGetVersion", ctypes.byref(version))
    return DeviceFacts(
        name=name.value.decode(),
        compute_capability=10 * attribute(_COMPUTE_CAPABILITY_MAJOR) + attribute(_COMPUTE_CAPABILITY_MINOR),
        num_multiprocessors=attribute(_MULTIPROCESSOR_COUNT),
        memory_bytes=memory.value,
        cuda_version=version.value,
    )


def graph_num_nodes(graph: int) -> int | None:
    """How many nodes a CUDA graph has (a CUgraph handle); None where the driver does not say."""
    count = ctypes.c_size_t()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count))
    except (OSError, AttributeError):
        return None
    return count.value if status == 0 else None


def upload_graph(graph: int, stream: int) -> None:
    """Send an executable graph (a CUgraphExec handle) to the device, which its first launch would do otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # Then the first launch does it.
        ctypes.CDLL("libcuda.so.1").cuGraphUpload(ctypes.c_void_p(graph), ctypes.c_void_p(stream))


def resolve_device(name: str, *, needs_torch: bool) -> Any:
    """A torch device; None for the CPU where a model that needs no torch can do without."""
    if name == "cpu" and not needs_torch:
        return None
    try:
        import torch
    except ImportError as error:
        if name == "auto" and not needs_torch:
            return None
        raise MissingDependencyError(
            got="no package torch", expected="torch, which builds engines", remedy="pip install 'skipstep[torch]'"
        ) from error
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            problem, remedy = why_not_seen(torch.version.cuda) if not count else ("", "pass a number below that")
            raise DeviceUnavailableError(
                got=f"device={name!r} on a machine with {count} CUDA devices that torch can see{problem}",
                expected="a CUDA device",
                remedy=f"use device='cpu', or {remedy}",
            )
    return device


def why_not_seen(built_for: str | None) -> tuple[str, str]:
    """Why torch sees no CUDA device, and the remedy."""
    if built_for is None:
        return ": torch is a build for CPUs", "install a build of torch for CUDA, and an NVIDIA driver"
    try:
        facts = cuda_device()
    except DeviceUnavailableError as error:
        return f": {error.got}", "install an NVIDIA driver"
    served = facts.cuda_version // 1000, facts.cuda_version % 1000 // 10
    if served < tuple(map(int, built_for.split("."))):
        found = f": {facts.name}, whose driver serves CUDA {served[0]}.{served[1]}, and torch built for {built_for}"
        return found, f"update the driver to one for CUDA {built_for}, or install torch for CUDA {served[0]}"
    return f": {facts.name} is there, torch cannot use it", "see what torch.cuda.init() says"
