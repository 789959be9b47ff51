"""A recording that fails must leave torch as it was: its allocator, its generator and the current stream.

Without a GPU, torch.cuda.graph itself runs over stand-ins for what it calls in the library. They do what torch 2.11's
sources say: a recording begins by routing allocations to its pool (c10/cuda/CUDACachingAllocator.cpp) and by marking
the generator (aten/src/ATen/cuda/CUDAGraph.cpp); where the driver refuses to end it, neither is undone.
"""

import contextlib
from typing import Any

import pytest
import torch

from skipstep.cuda import device as cuda_device
from skipstep.cuda.device import CudaDevice, CudaStream


class Library:
    """What is left behind: pools that allocations go to, pools in use, and whether the generator is recording."""

    def __init__(self) -> None:
        self.routed: list[Any] = []
        self.uses: dict[Any, int] = {}
        self.recording = self.broken = False
        self.events: list[str] = []
        self.pools = 0

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    def end_allocation(self, device: int, pool: Any) -> None:
        if pool not in self.routed:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.routed.remove(pool)

    def release(self, device: int, pool: Any) -> None:
        self.uses[pool] -= 1


class Graph:
    library: Library

    def __init__(self, keep_graph: bool = False) -> None:
        self.pool: Any = None

    def capture_begin(self, *pool: Any, capture_error_mode: str, **_: Any) -> None:
        library = self.library
        assert capture_error_mode == "thread_local", "other threads may be working"
        self.pool = pool[0]
        library.routed.append(self.pool)
        library.uses[self.pool] = library.uses.get(self.pool, 0) + 1
        library.recording = True

    def capture_end(self) -> None:
        library = self.library
        if library.broken:
            library.broken = False
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        library.end_allocation(0, self.pool)
        library.recording = False

    def instantiate(self) -> None:
        self.library.events.append("instantiate")

    def raw_cuda_graph(self) -> int:
        return 1

    def raw_cuda_graph_exec(self) -> int:
        return 2


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(Graph, "library", library, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", library.graph_pool_handle)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: library.events.append("empty"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", library.end_allocation, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", library.release, raising=False)
    monkeypatch.setattr(cuda_device, "upload_graph", lambda graph, stream: library.events.append("upload"))
    return library


@pytest.fixture
def device(library: Library, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    made = object.__new__(CudaDevice)
    made.torch_device = torch.device("cpu", 0)
    stream: Any = type("Stream", (), {"cuda_stream": 7})()
    made._stream = CudaStream(stream)
    made._pool = library.graph_pool_handle()

    def free_bytes() -> int:
        library.events.append("measure")
        return 0

    monkeypatch.setattr(made, "free_bytes", free_bytes)
    return made


def test_a_recording_is_uploaded_and_measured_without_the_cache(library: Library, device: CudaDevice) -> None:
    device.capture(lambda: None)
    # torch empties its cache as well, when the recording begins.
    assert library.events == ["empty", "measure", "empty", "instantiate", "upload", "measure"]
    assert (library.routed, library.recording) == ([], False)


@pytest.mark.parametrize("how", ["the driver refuses", "the network raises", "both"])
def test_a_recording_that_fails_leaves_nothing_recording(library: Library, device: CudaDevice, how: str) -> None:
    device.capture(lambda: None)
    before = dict(library.uses)

    def work() -> None:
        library.broken = how != "the network raises"
        if how != "the driver refuses":
            raise ValueError("no")

    with pytest.raises((RuntimeError, ValueError)):
        device.capture(work)
    assert library.routed == [], "the allocator still serves the recording"
    assert not library.recording, "torch.randn(device='cuda') would raise from now on"
    if how != "the network raises":
        assert all(library.uses[pool] == count for pool, count in before.items()), "the pool is never freed"
    device.capture(lambda: None)
    assert not library.recording


@pytest.mark.gpu
def test_torch_works_after_a_network_that_cannot_be_recorded() -> None:
    real = CudaDevice(torch.device("cuda", 0))
    with pytest.raises(RuntimeError):
        real.capture(lambda: torch.zeros(1, device="cuda").item())
    assert torch.randn(1, device="cuda").isfinite().all()
    assert real.capture(lambda: torch.zeros(1, device="cuda")).num_bytes >= 0
