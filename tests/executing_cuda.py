"""A CUDA driver that executes, without a GPU: what `cuda.bindings.driver` offers, and no more than the driver promises.

Work is queued and runs in the order of its stream when somebody waits, so memory that is used again too early shows as
wrong numbers. Every address must lie in memory that is allocated and large enough at the moment of its use; freed
memory is never given out again. A graph is a record of operations with the addresses that they had. Launches are
interpreted by the NumPy twins of the kernels. What a real driver would crash on is an AssertionError.
"""

from __future__ import annotations

import ctypes
import enum
import json
import random
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from executing_kernels import run_noise, run_statistics, run_step
from numpy.typing import NDArray

from skipstep.edge.step_binary import StepBinaryFacts

POISON = 0xA5
# An ELF header for machine 190, CUDA. What follows are the kernel's facts: there is no code to interpret.
HEADER = b"\x7fELF" + bytes(14) + (190).to_bytes(2, "little") + bytes(44)
Operation = Callable[[], None]


def cubin_of(facts: StepBinaryFacts) -> bytes:
    return HEADER + json.dumps(facts.to_json()).encode()


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OK = (CUresult.CUDA_SUCCESS,)


class FakeStream:
    def __init__(self) -> None:
        self.queue: deque[Operation] = deque()
        self.recording: list[Operation] | None = None

    def append(self, operation: Operation) -> None:
        (self.queue if self.recording is None else self.recording).append(operation)

    def drain(self) -> None:
        while self.queue:
            self.queue.popleft()()


class ExecutingCuda:
    """Install it as the module `cuda.bindings.driver`. `faults`: by function, after how many calls it answers what."""

    CUresult = CUresult
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
    )

    def __init__(self, capability: int = 87, version: int = 13000, seed: int = 0) -> None:
        self.capability, self.version = capability, version
        self._random = random.Random(seed)
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.freed: dict[int, NDArray[np.uint8]] = {}
        self.host: dict[int, NDArray[np.uint8]] = {}
        self.streams: dict[int, FakeStream] = {}
        self.handles: dict[int, Any] = {}
        self._local, self._lock = threading.local(), threading.RLock()
        self.retained = 0
        self.launched_graphs: list[int] = []
        self.faults: dict[str, tuple[int, CUresult]] = {}
        self.known: dict[bytes, StepBinaryFacts] = {}
        self._next = 0x1000

    @property
    def contexts(self) -> list[int]:
        """Of the thread."""
        return vars(self._local).setdefault("contexts", [])

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or not callable(found) or name not in self.faults:
            return found
        passes, status = self.faults[name]
        if passes:
            self.faults[name] = passes - 1, status
            return found
        del self.faults[name]
        return lambda *arguments: (status, None)

    # Device and context

    def cuInit(self, flags):
        return OK

    def cuDriverGetVersion(self):
        return *OK, self.version

    def cuDeviceGetCount(self):
        return *OK, 1

    def cuDeviceGet(self, ordinal):
        return *OK, ordinal

    def cuDeviceGetName(self, length, device):
        return *OK, b"an executing stand-in".ljust(length, b"\0")

    def cuDeviceTotalMem(self, device):
        return *OK, 1 << 33

    def cuDeviceGetAttribute(self, kind, device):
        return *OK, {75: self.capability // 10, 76: self.capability % 10, 16: 8}[kind]

    def cuDevicePrimaryCtxRetain(self, device):
        self.retained += 1
        return *OK, 0xC0

    def cuDevicePrimaryCtxRelease(self, device):
        self.retained -= 1
        return OK

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return OK

    def cuCtxPopCurrent(self):
        return *OK, self.contexts.pop()

    # Memory

    def cuMemAlloc(self, num_bytes):
        self._in_context()
        assert not self._any_recording(), "memory is taken while a graph is recorded"
        array = np.full(num_bytes + 256, POISON, np.uint8)
        array = array[-array.ctypes.data % 256 :][:num_bytes]
        self.memory[array.ctypes.data] = array
        return *OK, array.ctypes.data

    def cuMemFree(self, pointer):
        assert not any(stream.queue for stream in self.streams.values()), "memory is freed while work is queued"
        array = self.memory.pop(pointer)
        array.fill(POISON)
        self.freed[pointer] = array
        return OK

    def cuMemHostAlloc(self, num_bytes, flags):
        array = np.full(num_bytes + 64, POISON, np.uint8)
        array = array[-array.ctypes.data % 64 :][:num_bytes]
        self.host[array.ctypes.data] = array
        return *OK, array.ctypes.data

    def cuMemFreeHost(self, pointer):
        self.host.pop(pointer).fill(POISON)
        return OK

    def cuMemcpyHtoDAsync(self, target, source, num_bytes, stream):
        def copy():
            self.device(target, num_bytes)[...] = self._pinned(source, num_bytes)

        return self._enqueue(stream, copy)

    def cuMemcpyDtoHAsync(self, target, source, num_bytes, stream):
        def copy():
            self._pinned(target, num_bytes)[...] = self.device(source, num_bytes)

        return self._enqueue(stream, copy)

    def cuMemsetD8Async(self, target, value, num_bytes, stream):
        return self._enqueue(stream, lambda: self.device(target, num_bytes).fill(value))

    # Streams, events, graphs

    def cuStreamCreate(self, flags):
        assert flags == 1, "the default stream would wait for it"
        handle = self._handle(FakeStream())
        self.streams[handle] = self.handles[handle]
        return *OK, handle

    def cuStreamDestroy(self, stream):
        assert not self.streams.pop(stream).queue, "a stream is destroyed that has work"
        del self.handles[stream]
        return OK

    def cuStreamSynchronize(self, stream):
        if self.streams[stream].recording is not None:
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        with self._lock:
            self.streams[stream].drain()
        return OK

    def cuEventCreate(self, flags):
        return *OK, self._handle({"done": True, "stream": 0})

    def cuEventDestroy(self, event):
        assert self.handles.pop(event)["done"], "an event is destroyed that somebody waits for"
        return OK

    def cuEventRecord(self, event, stream):
        mark = {"done": False, "stream": stream}
        self.handles[event] = mark
        return self._enqueue(stream, lambda: mark.update(done=True))

    def cuEventQuery(self, event):
        mark = self.handles[event]
        with self._lock:
            if not mark["done"] and self._random.random() < 0.5:
                self.streams[mark["stream"]].queue.popleft()()
        return OK if mark["done"] else (CUresult.CUDA_ERROR_NOT_READY,)

    def cuEventSynchronize(self, event):
        mark = self.handles[event]
        while not mark["done"]:
            with self._lock:
                if not mark["done"]:
                    self.streams[mark["stream"]].queue.popleft()()
        return OK

    def cuStreamBeginCapture(self, stream, mode):
        assert mode == 1
        assert not self._any_recording()
        self.streams[stream].recording = []
        return OK

    def cuStreamEndCapture(self, stream):
        operations, self.streams[stream].recording = self.streams[stream].recording, None
        return *OK, self._handle(operations)

    def cuGraphInstantiate(self, graph, flags):
        return *OK, self._handle(tuple(self.handles[graph]))

    def cuGraphGetNodes(self, graph, count=0):
        return *OK, None, len(self.handles[graph])

    def cuGraphDestroy(self, graph):
        del self.handles[graph]
        return OK

    def cuGraphExecDestroy(self, executable):
        assert not any(stream.queue for stream in self.streams.values()), "a graph is destroyed that may run"
        del self.handles[executable]
        return OK

    def cuGraphUpload(self, executable, stream):
        return OK if executable in self.handles else (CUresult.CUDA_ERROR_INVALID_VALUE,)

    def cuGraphLaunch(self, executable, stream):
        operations = self.handles[executable]
        self.launched_graphs.append(len(operations))

        def replay():
            for operation in operations:
                operation()

        return self._enqueue(stream, replay)

    # Kernels

    def cuModuleLoadData(self, image):
        facts = self.known.get(image)
        if facts is None:
            facts = StepBinaryFacts.from_json(json.loads(image[len(HEADER) :]))
        if not facts.runs_on(self.capability):
            return CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, None
        return *OK, self._handle(facts)

    def cuModuleGetFunction(self, module, name):
        facts = self.handles[module]
        assert name == facts.kernel.encode()
        return *OK, self._handle(facts)

    def cuModuleUnload(self, module):
        del self.handles[module]
        return OK

    def cuLaunchKernel(self, kernel, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        facts: StepBinaryFacts = self.handles[kernel]
        assert (bx, by, bz) == (facts.threads_per_block, 1, 1)
        assert shared == facts.dynamic_shared_bytes
        pointers = (ctypes.c_void_p * len(facts.arguments)).from_address(parameters)
        values: dict[str, Any] = {}
        for each, pointer in zip(facts.arguments, pointers, strict=True):
            kind = np.float32 if each.type == "float32" else f"<u{each.num_bytes}"
            values[each.name] = np.frombuffer(ctypes.string_at(pointer, each.num_bytes), kind)[0].item()
        count, batch = values["num_elements"], gy
        assert (gx, gy, gz) == facts.grid(count, batch)
        assert count % facts.num_elements_multiple == 0
        for each in facts.arguments:
            assert not each.type.startswith("*") or values[each.name] % facts.pointer_alignment == 0, each.name
        interpret = {"noise": run_noise, "step": run_step, "statistics": run_statistics}[facts.purpose]
        return self._enqueue(stream, lambda: interpret(self.floats, facts, values, count, batch))

    # What stand-ins of libraries ask

    def floats(self, address: int, shape: tuple[int, ...], dtype: str = "float32") -> NDArray[Any]:
        kind = np.dtype(dtype)
        return self.device(address, int(np.prod(shape)) * kind.itemsize).view(kind).reshape(shape)

    def device(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        return _inside(self.memory, address, num_bytes, "device memory")

    def _pinned(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        return _inside(self.host, address, num_bytes, "pinned memory")

    def _enqueue(self, stream: int, operation: Operation) -> tuple[CUresult]:
        self._in_context()
        self.streams[stream].append(operation)
        return OK

    def _in_context(self) -> None:
        assert self.contexts, "no context is current"

    def _any_recording(self) -> bool:
        return any(stream.recording is not None for stream in self.streams.values())

    def _handle(self, value: Any) -> int:
        self._next += 0x10
        self.handles[self._next] = value
        return self._next

    @property
    def left(self) -> dict[str, int]:
        """What was not given back."""
        return {name: len(getattr(self, name)) for name in ("memory", "host", "streams", "contexts")} | {
            "retained": self.retained,
            "handles": sum(not isinstance(each, StepBinaryFacts) for each in self.handles.values()),
        }


def _inside(memory: dict[int, NDArray[np.uint8]], address: int, num_bytes: int, what: str) -> NDArray[np.uint8]:
    for start, array in memory.items():
        if start <= address and address + num_bytes <= start + len(array):
            return array[address - start :][:num_bytes]
    raise AssertionError(f"{num_bytes} bytes at {address:#x} are no {what}")
