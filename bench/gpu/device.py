"""The device that is measured: what the harness and the GPU gate ask of a GPU, and what answers on a CPU.

`CudaBench` is short on purpose: it is the part that only a machine with a GPU can run. `HostBench` answers the same
calls on a CPU, for benchmarks there and for dry runs of the GPU gate, whose numbers mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from skipstep.kernels.launch import DEFAULT_LAUNCH, StepLaunch, choose_launch

Work = Callable[[], object]
_WARM_UP_RUNS = 3


@dataclass(frozen=True, slots=True)
class Trace:
    """What a profiler saw of one call: the CUDA runtime's and driver's functions by name, and kernels that ran."""

    functions: dict[str, int]
    device_kernels: int


class BenchDevice(Protocol):
    """`dtype` is what networks compute in, `cache_bytes` the device's last cache; `simulated` in a dry run."""

    name: str
    torch_device: torch.device
    dtype: torch.dtype
    cache_bytes: int
    simulated: bool

    def place(self, network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        """The network on the device in that dtype, laid out as its convolutions like it best."""
        ...

    def launch(self, *, num_elements: int, batch_size: int, item_size: int) -> StepLaunch:
        """How an engine here launches the step (skipstep.kernels.launch)."""
        ...

    def synchronize(self) -> None: ...

    def seconds(self, work: Work) -> float:
        """How long the device takes for what `work` enqueues."""
        ...

    def graph(self, work: Work) -> Callable[[], None]:
        """`work`, warmed up and recorded: calling it replays it in one launch."""
        ...

    def forget_peak(self) -> None:
        """Free what nobody holds, and measure memory from here."""
        ...

    def peak_bytes(self) -> int:
        """The most that was held since, beyond what was held then."""
        ...

    def trace(self, call: Work) -> Trace:
        """Run `call` under a profiler."""
        ...

    def refusing_to_wait(self) -> AbstractContextManager[object]:
        """Inside it, whatever makes the host wait for the device raises, as far as torch can tell."""
        ...


class CudaBench:
    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.torch_device)
        self.dtype = torch.float16
        self.cache_bytes = int(torch.cuda.get_device_properties(self.torch_device).L2_cache_size)
        self.simulated = False
        self._held_bytes = 0

    def place(self, network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        return _to(network, self.torch_device, dtype, memory_format=torch.channels_last)

    def launch(self, *, num_elements: int, batch_size: int, item_size: int) -> StepLaunch:
        facts = torch.cuda.get_device_properties(self.torch_device)
        return choose_launch(
            num_elements=num_elements,
            batch_size=batch_size,
            num_multiprocessors=facts.multi_processor_count,
            compute_capability=10 * facts.major + facts.minor,
            network_item_size=item_size,
        )

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def graph(self, work: Work) -> Callable[[], None]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def forget_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._held_bytes = torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() - self._held_bytes

    def trace(self, call: Work) -> Trace:
        from torch.profiler import ProfilerActivity, profile, record_function

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function("one call"):
                call()
            torch.cuda.synchronize()
        events = profiler.events()
        on_host = [event for event in events if event.device_type.name == "CPU"]
        span = next(event.time_range for event in on_host if event.name == "one call")
        # The profiler's own waiting, before and after, is not the call's.
        within = [e.name for e in on_host if span.start <= e.time_range.start and e.time_range.end <= span.end]
        kernels = [
            event.name
            for event in events
            if event.device_type.name == "CUDA" and not event.name.startswith(("Mem", "one call"))
        ]
        return Trace(dict(Counter(name for name in within if name.startswith("cu"))), len(kernels))

    @contextlib.contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class HostBench:
    def __init__(self) -> None:
        self.name, self.torch_device = "cpu", torch.device("cpu")
        self.dtype = torch.float32
        self.cache_bytes = 1 << 14
        self.simulated = True

    def place(self, network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        return _to(network, self.torch_device, dtype)

    def launch(self, *, num_elements: int, batch_size: int, item_size: int) -> StepLaunch:
        return DEFAULT_LAUNCH

    def synchronize(self) -> None:
        """Nothing runs late here."""

    def seconds(self, work: Work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def graph(self, work: Work) -> Callable[[], None]:
        def replay() -> None:
            work()

        return replay

    def forget_peak(self) -> None:
        """Host memory is not measured."""

    def peak_bytes(self) -> int:
        return 1 << 20

    def trace(self, call: Work) -> Trace:
        call()
        return Trace({"cudaGraphLaunch": 1, "cudaMemcpyAsync": 2, "cudaEventSynchronize": 1}, 61)

    def refusing_to_wait(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


def _to(network: torch.nn.Module, *arguments: Any, **options: Any) -> torch.nn.Module:
    # Not the network's own method: that of diffusers warns of every change of dtype.
    placed: torch.nn.Module = torch.nn.Module.to(network, *arguments, **options)
    return placed


@functools.cache
def bench_device(*, simulated: bool) -> BenchDevice:
    return HostBench() if simulated else CudaBench()
