"""A CUDA device without a GPU: tensors in host memory, kernels in Triton's interpreter, streams that run late.

Work is enqueued and runs when somebody waits, in an order drawn at random from those that streams and events allow: a
dependency that is not stated shows as a wrong result. A graph is a record of operations with the very tensors that they
had, so that what was baked into it stays baked, and values that are computed twice land in the same memory.
"""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipstep.kernels.step import ddim_step, initial_noise
from skipstep.loops import mixed, places, workspace


@dataclass(eq=False)
class FakeEvent:
    stream: FakeStream
    position: int

    @property
    def done(self) -> bool:
        return self.stream.done >= self.position

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.stream.device.run_until(self)


@dataclass(eq=False)
class FakeStream:
    device: FakeDevice
    name: str
    queue: deque[Any] = field(default_factory=deque)
    enqueued: int = 0
    done: int = 0

    def run(self, work) -> None:
        self.device.fault("enqueue")
        self._append(work)

    def record(self, again: FakeEvent | None = None) -> FakeEvent:
        """`again` must not stand for later work where somebody still waits for the earlier."""
        if again is None:
            return FakeEvent(self, self.enqueued)
        assert again.done, "an event that somebody may still wait for is recorded again"
        again.stream, again.position = self, self.enqueued
        return again

    def wait(self, event: FakeEvent) -> None:
        self._append(event)

    def follow(self, other: FakeStream) -> None:
        self.wait(other.record())

    def _append(self, item) -> None:
        with self.device.lock:
            self.queue.append(item)
            self.enqueued += 1

    @property
    def ready(self) -> bool:
        return bool(self.queue) and (not isinstance(self.queue[0], FakeEvent) or self.queue[0].done)

    def step(self) -> None:
        item = self.queue.popleft()
        try:
            if not isinstance(item, FakeEvent):
                item()
        finally:  # Not before: another thread may ask whether memory is free to be written again.
            self.done += 1


class FakeGraph:
    def __init__(self, device: FakeDevice, operations: list[Any]) -> None:
        self.device = device
        self._operations = operations
        self.num_nodes = len(operations)
        self.num_bytes = 100 * len(operations)
        device.graphs.add(self)

    def replay(self) -> None:
        self.device.launches.append(self.num_nodes)
        with torch.inference_mode():
            for operation in self._operations:
                operation()


class Recorder(TorchDispatchMode):
    """Keeps operations instead of letting them change anything."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore about it")
        self.device.fault("operation")
        if func._schema.is_mutable:
            self.operations.append(lambda: func(*args, **kwargs))
            return args[0]
        recorded = func(*args, **kwargs)

        def again() -> None:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.operations.append(again)
        return recorded


class FakeDevice:
    """What skipstep.cuda.device.Device asks for. `faults`: by place, after how many passes to raise what."""

    def __init__(self, seed: int = 0, memory: int = 1 << 30) -> None:
        self.torch_device = torch.device("cpu")
        self.name = "a stand-in"
        self.num_multiprocessors, self.compute_capability = 132, 90
        self.lock = threading.RLock()
        self._random = random.Random(seed)
        self.stream = FakeStream(self, "engine")
        self._caller = FakeStream(self, "caller")
        self.memory = memory
        self.faults: dict[str, tuple[int, BaseException]] = {}
        self.launches: list[int] = []
        self.graphs: weakref.WeakSet[FakeGraph] = weakref.WeakSet()
        self.ranges: list[str] = []
        self.recorder: Recorder | None = None
        self.lost = False
        self.released = 0
        self.waits = 0

    def caller_stream(self) -> FakeStream:
        return self._caller

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.empty(shape, dtype=dtype)
        memory.view(-1).view(torch.uint8).fill_(0xA5)
        self._caller._append(memory.zero_)
        return memory

    def staging(self, num_bytes: int) -> torch.Tensor:
        self.fault("staging")
        return torch.full((num_bytes,), 0xA5, dtype=torch.uint8)

    def warm_up(self, work) -> int:
        self.fault("warm_up")
        self.stream.run(work)
        self.stream.record().synchronize()
        return 1 << 20

    def capture(self, work) -> FakeGraph:
        self.fault("capture")
        self.stream.record().synchronize()
        with self.lock:
            self.recorder = Recorder(self)
            try:
                with self.recorder:
                    work()
                return FakeGraph(self, self.recorder.operations)
            finally:
                self.recorder = None

    def free_bytes(self) -> int:
        return self.memory

    def release_memory(self) -> None:
        self.released += 1

    @contextlib.contextmanager
    def range(self, name: str):
        self.ranges.append(name)
        yield

    def is_lost(self) -> bool:
        return self.lost

    def kernel(self, launch, keywords: dict[str, Any]) -> None:
        if self.recorder is not None:
            self.fault("operation")
            self.recorder.operations.append(lambda: launch(**keywords))
        else:
            self.fault("kernel")
            launch(**keywords)

    def fault(self, place: str) -> None:
        if place in self.faults:
            passes, error = self.faults[place]
            if passes == 0:
                del self.faults[place]
                raise error
            self.faults[place] = passes - 1, error

    def run_until(self, event: FakeEvent) -> None:
        with self.lock:
            self.waits += 1
            while not event.done:
                ready = [stream for stream in (self.stream, self._caller) if stream.ready]
                assert ready, "every stream waits for another"
                self._random.choice(ready).step()

    def finish(self) -> None:
        for stream in (self.stream, self._caller):
            self.run_until(stream.record())


def build_on(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    """Let Engine.build take the device for the machine's GPU."""
    install(monkeypatch, device)
    monkeypatch.setattr("skipstep.building.resolve_device", lambda name, **_: SimpleNamespace(type="cuda"))
    monkeypatch.setattr("skipstep.cuda.device.CudaDevice", lambda torch_device: device)


def install(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    """Let kernels go through the device, which may be recording."""
    for module in (workspace, mixed):
        monkeypatch.setattr(module, "ddim_step", lambda **keywords: device.kernel(ddim_step, keywords))
    for module in (workspace, places):
        monkeypatch.setattr(module, "initial_noise", lambda **keywords: device.kernel(initial_noise, keywords))
