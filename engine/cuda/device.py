"""The CUDA device, with only what capturing and running loops takes: the one place that uses torch.cuda.

`Device` is what the loops need; `CudaDevice` is the real one. Tests replace it with a simulated device, whose streams
run late and in any order that the events allow, so that a missing dependency shows without a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from skipstep.cuda.probe import graph_num_nodes, upload_graph

Work = Callable[[], object]

# One capture at a time in a process: two captures could not tell their allocations apart, and no thread may synchronize
# during a capture.
CAPTURE_LOCK = threading.Lock()
# Before it is recorded, work runs this often: libraries load kernels, choose algorithms and take workspaces.
_WARM_UP_RUNS = 2


class Event(Protocol):
    def query(self) -> bool:
        """Whether that has happened already."""
        ...

    def synchronize(self) -> None:
        """Wait, on the host, for all that the stream was given before the event."""
        ...


class Stream(Protocol):
    def run(self, work: Work) -> None:
        """Enqueue what `work` launches, after all that the stream was given before."""
        ...

    def record(self, again: Any = None) -> Any:
        """An event after all work of the stream so far: a new one, or `again`, if no wait for that is pending."""
        ...

    def wait(self, event: Any) -> None:
        """What the stream is given from now on comes after the event. The host does not wait."""
        ...

    def follow(self, other: Any) -> None:
        """What the stream is given from now on comes after all that `other` was given so far."""
        ...


class Graph(Protocol):
    """Recorded work: its nodes (None: this driver does not say), and the device memory that recording it took."""

    num_nodes: int | None
    num_bytes: int

    def replay(self) -> None:
        """Enqueue all of it on the current stream, in one launch."""
        ...


class Device(Protocol):
    """One device with one stream for an engine's work, and one pool of memory that its graphs share."""

    torch_device: torch.device
    name: str
    num_multiprocessors: int
    # 90 for 9.0.
    compute_capability: int
    stream: Stream

    def caller_stream(self) -> Stream:
        """The calling thread's own."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Device memory, filled on the calling thread's stream: other streams have to wait for that."""
        ...

    def staging(self, num_bytes: int) -> Tensor:
        """Host memory uint8 `[num_bytes]` that copies to and from the device may use while the host goes on."""
        ...

    def warm_up(self, work: Work) -> int:
        """Run `work` on the stream until it is settled, and wait; the bytes that it took at its peak."""
        ...

    def capture(self, work: Work) -> Graph:
        """Record what `work` launches on the stream. Raises RuntimeError where it may not be recorded."""
        ...

    def free_bytes(self) -> int: ...

    def release_memory(self) -> None:
        """Release cached memory that is not in use."""
        ...

    def range(self, name: str) -> AbstractContextManager[object]:
        """A range in a profiler's timeline."""
        ...

    def is_lost(self) -> bool:
        """Whether an error has broken the context for good."""
        ...


class CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.torch_stream = stream
        self._followed: torch.cuda.Event | None = None

    def run(self, work: Work) -> None:
        with torch.cuda.stream(self.torch_stream):
            work()

    def record(self, again: torch.cuda.Event | None = None) -> torch.cuda.Event:
        event: torch.cuda.Event = self.torch_stream.record_event(again)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        self.torch_stream.wait_event(event)

    def follow(self, other: CudaStream) -> None:
        # A wait is for what was recorded before it, so one event serves them all; the engine's lock is held.
        self._followed = other.record(self._followed)
        self.wait(self._followed)


class CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, num_bytes: int) -> None:
        self._graph = graph
        self.num_nodes = graph_num_nodes(graph.raw_cuda_graph())
        self.num_bytes = num_bytes

    def replay(self) -> None:
        self._graph.replay()


class CudaDevice:
    def __init__(self, torch_device: torch.device) -> None:
        index = torch.cuda.current_device() if torch_device.index is None else torch_device.index
        self.torch_device = torch.device("cuda", index)
        facts = torch.cuda.get_device_properties(self.torch_device)
        self.name = facts.name
        self.num_multiprocessors = facts.multi_processor_count
        self.compute_capability = 10 * facts.major + facts.minor
        self._stream = CudaStream(torch.cuda.Stream(self.torch_device))  # type: ignore[no-untyped-call]
        self.stream: Stream = self._stream
        self._pool = torch.cuda.graph_pool_handle()

    def caller_stream(self) -> Stream:
        return CudaStream(torch.cuda.current_stream(self.torch_device))

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def warm_up(self, work: Work) -> int:
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        for _ in range(_WARM_UP_RUNS):
            self.stream.run(work)
        self._stream.torch_stream.synchronize()
        return torch.cuda.max_memory_allocated(self.torch_device) - before

    def capture(self, work: Work) -> Graph:
        with CAPTURE_LOCK:
            # Recording empties torch's cache; emptied before, it does not count against the graph.
            torch.cuda.empty_cache()
            free = self.free_bytes()
            try:
                graph = self._record(work)
                graph.instantiate()
            except BaseException:
                self._recover()
                raise
            upload_graph(graph.raw_cuda_graph_exec(), self._stream.torch_stream.cuda_stream)
            return CudaGraph(graph, max(0, free - self.free_bytes()))

    def _record(self, work: Work) -> torch.cuda.CUDAGraph:
        # Kept apart from its executable form, so that its nodes can be counted.
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        stream = self._stream.torch_stream
        with (
            # A recording that fails leaves its stream the current one; this takes that back.
            torch.cuda.stream(stream),
            # Other threads may go on with their own work on the device.
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph

    def _recover(self) -> None:
        """After a recording that failed: torch's allocator goes on using its pool, and its generator goes on recording.

        The pool's use is ended as a recording that succeeds ends it; one that does succeed resets the generator.
        """
        pool, self._pool = self._pool, torch.cuda.graph_pool_handle()
        with contextlib.suppress(RuntimeError):  # It had ended already.
            torch._C._cuda_endAllocateToPool(self.torch_device.index, pool)
            torch._C._cuda_releasePool(self.torch_device.index, pool)
        with contextlib.suppress(RuntimeError):  # A context that is lost records nothing.
            self._record(lambda: torch.zeros(1, device=self.torch_device))

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def release_memory(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize(self.torch_device)
        except RuntimeError:
            return True
        return False
