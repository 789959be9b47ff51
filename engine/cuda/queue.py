"""Memory, one stream, events and graphs of a CUDA device, through the driver alone (skipstep.cuda.driver).

Everything is enqueued on the queue's stream and runs in that order. What a recorded graph refers to is fixed in it, so
memory is taken once; it is given back by the `releases` that it was taken with, when nothing uses it any more.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.cuda.driver import CudaDriver, DeviceBuffer

# No thread of this process records while another takes memory.
_RECORDING = threading.RLock()


@dataclass(frozen=True, slots=True)
class Pinned:
    """Host memory that the device copies from and to, as bytes; `done`: an event for the copy that used it last."""

    bytes: NDArray[np.uint8]
    address: int
    done: Any


@dataclass(frozen=True, slots=True)
class Graph:
    """A recorded graph, ready to be launched."""

    executable: Any
    num_nodes: int


class Queue:
    """One stream. `handle` is its CUstream as a number, for libraries that launch on it. Nothing here locks: the
    engine does. Raises DeviceUnavailableError and DeviceMemoryError."""

    def __init__(self, driver: CudaDriver) -> None:
        self.driver, self.releases = driver, ExitStack()
        # Apart from the default stream, which cannot be recorded, and not waiting for it.
        flag = driver.constant("CUstream_flags", "CU_STREAM_NON_BLOCKING")
        self._stream = driver.call("cuStreamCreate", int(flag))
        self.handle = int(self._stream)
        self.releases.callback(driver.release, "cuStreamDestroy", self._stream)
        self._copying: dict[int, deque[Pinned]] = {}

    def zeros(self, num_bytes: int, releases: ExitStack) -> DeviceBuffer:
        """New memory, of one byte at least. CUDA aligns it to 256 bytes."""
        num_bytes = max(1, num_bytes)
        with _RECORDING:
            pointer = self.driver.call("cuMemAlloc", num_bytes)
            releases.callback(self.driver.release, "cuMemFree", pointer)
        self.driver.call("cuMemsetD8Async", pointer, 0, num_bytes, self._stream)
        # So that it can be given back at any time, until work that uses it is enqueued.
        self.synchronize()
        return DeviceBuffer(int(pointer), num_bytes)

    def pinned(self, num_bytes: int) -> Pinned:
        """Host memory of that size which no copy uses, with whatever was in it. To pin memory takes longer than a short
        loop, so what comes back is used again."""
        waiting = self._copying.setdefault(num_bytes, deque())
        if waiting and self._is_done(waiting[0].done):
            return waiting.popleft()
        with _RECORDING:
            address = int(self.driver.call("cuMemHostAlloc", num_bytes, 0))
            self.releases.callback(self.driver.release, "cuMemFreeHost", address)
        flag = self.driver.constant("CUevent_flags", "CU_EVENT_DISABLE_TIMING")
        event = self.driver.call("cuEventCreate", int(flag))
        self.releases.callback(self.driver.release, "cuEventDestroy", event)
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return Pinned(np.frombuffer(memoryview(memory), np.uint8), address, event)

    def give_back(self, memory: Pinned) -> None:
        """It is free when its event, which stands for all copies until it was recorded last, has come."""
        self._copying[len(memory.bytes)].append(memory)

    def copy_in(self, target: DeviceBuffer, source: Pinned, start: int = 0) -> None:
        """Enqueue a copy of as many bytes as `target` has, from byte `start` of `source` on."""
        assert start + target.num_bytes <= len(source.bytes), "a copy ends inside"
        address = source.address + start
        self.driver.call("cuMemcpyHtoDAsync", target.address, address, target.num_bytes, self._stream)

    def copy_out(self, target: Pinned, source: DeviceBuffer, start: int = 0) -> None:
        """Enqueue the opposite copy."""
        assert start + source.num_bytes <= len(target.bytes), "a copy ends inside"
        address = target.address + start
        self.driver.call("cuMemcpyDtoHAsync", address, source.address, source.num_bytes, self._stream)

    def record(self, memory: Pinned) -> None:
        """All that is enqueued comes before the event of `memory`."""
        self.driver.call("cuEventRecord", memory.done, self._stream)

    def wait_for(self, memory: Pinned) -> None:
        """Until all that came before its event is done; other threads may enqueue meanwhile."""
        self.driver.call("cuEventSynchronize", memory.done)

    def synchronize(self) -> None:
        self.driver.call("cuStreamSynchronize", self._stream)

    def settle(self) -> None:
        """Before memory is given back: nothing that was enqueued uses it any more."""
        if self.driver.lost is None:
            self.synchronize()

    def capture(self, work: Callable[[], None], releases: ExitStack) -> Graph:
        """What `work` enqueues as a graph; nothing of it runs."""
        driver = self.driver
        mode = driver.constant("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")
        with _RECORDING:
            driver.call("cuStreamBeginCapture", self._stream, mode)
            try:
                work()
            except BaseException:
                # Or the stream would go on recording.
                ended, *graphs = driver.outcome("cuStreamEndCapture", self._stream)
                if ended == driver.constant("CUresult", "CUDA_SUCCESS"):
                    driver.release("cuGraphDestroy", graphs[0])
                raise
            graph = driver.call("cuStreamEndCapture", self._stream)
            try:
                executable = driver.call("cuGraphInstantiate", graph, 0)
                releases.callback(driver.release, "cuGraphExecDestroy", executable)
                num_nodes = int(driver.outcome("cuGraphGetNodes", graph)[2])
            finally:
                driver.release("cuGraphDestroy", graph)
        driver.call("cuGraphUpload", executable, self._stream)
        return Graph(executable, num_nodes)

    def launch(self, graph: Graph) -> None:
        self.driver.call("cuGraphLaunch", graph.executable, self._stream)

    def _is_done(self, event: Any) -> bool:
        status = self.driver.outcome("cuEventQuery", event)[0]
        return bool(status == self.driver.constant("CUresult", "CUDA_SUCCESS"))
