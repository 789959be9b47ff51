"""Whether there is a CUDA device, and which, as the driver reports it.

Libraries that need a device may crash in native code without one, so the driver is asked before they are touched.
This needs neither torch nor any CUDA package.
"""

from __future__ import annotations

import ctypes
from typing import Any

from skipstep.errors import DeviceUnavailableError

# CUdevice_attribute of the driver's interface.
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76


def cuda_device(*, remedy: str = "run this on a machine with an NVIDIA GPU and its driver") -> tuple[int, str]:
    """Compute capability (86 for 8.6) and name of the first CUDA device.

    Raises DeviceUnavailableError with the caller's `remedy` where there is no device.
    """

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

    device, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    call("cuDeviceGetAttribute", ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    call("cuDeviceGetName", name, len(name), device)
    return 10 * major.value + minor.value, name.value.decode()


def graph_num_nodes(graph: int) -> int | None:
    """How many nodes a CUDA graph has (a CUgraph handle); None where the driver does not say."""
    count = ctypes.c_size_t()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count))
    except (OSError, AttributeError):
        return None
    return count.value if status == 0 else None
