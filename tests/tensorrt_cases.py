"""A TensorRT denoiser for tests, on the fake library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import fake_tensorrt
import step_networks
import torch
from step_networks import SPEC

from skipstep.backends.tensorrt import TensorRtDenoiser
from skipstep.backends.tensorrt_loaded import LoadedEngine
from skipstep.cuda.probe import DeviceFacts

CPU = torch.device("cpu")
GPU = DeviceFacts("a GPU", 90, 132, 80 << 30, 13000)


class Cuda:
    """What is used of torch.cuda, in host memory: streams are numbers, and what is launched runs at once."""

    def __init__(self) -> None:
        self.current, self.made, self.waits, self.capturing = 0, 100, 0, False

    def Stream(self, device):
        self.made += 1
        return SimpleNamespace(cuda_stream=self.made, wait_stream=lambda other: None)

    def current_stream(self, device):
        return SimpleNamespace(cuda_stream=self.current)

    @contextlib.contextmanager
    def stream(self, stream) -> Iterator[None]:
        before, self.current = self.current, stream.cuda_stream
        yield
        self.current = before

    def synchronize(self, device):
        self.waits += 1

    def is_current_stream_capturing(self):
        return self.capturing

    def device(self, device):
        return contextlib.nullcontext()


def denoiser(batch_size=3, *, library="tensorrt_rtx", spec=SPEC, engine=None, precision="float32", keep=None):
    data = engine or fake_tensorrt.engine_of(step_networks.source().step_graph(precision), batch_size)
    early = step_networks.early_graphs()
    loaded = LoadedEngine(data, library=library, device=CPU, keep=keep)
    return TensorRtDenoiser(loaded, early, spec, batch_size=batch_size)


def tables(network, given, **options):
    return step_networks.tables(network.compute(*given[:2]), network.step_inputs, **options)
