"""Fixtures of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import fake_tensorrt
import pytest
import torch
from fake_tensorrt import PRETENCES
from tensorrt_cases import GPU, Cuda

from skipstep.backends import tensorrt_library, tensorrt_loaded


@pytest.fixture
def cuda(monkeypatch) -> Iterator[Cuda]:
    """A machine with a device and both libraries."""
    cuda = Cuda()
    for name in ("Stream", "current_stream", "stream", "synchronize", "is_current_stream_capturing", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, fake_tensorrt.library(name))
    for module in (tensorrt_library, tensorrt_loaded):
        monkeypatch.setattr(module, "cuda_device", lambda *index, **options: GPU)
    yield cuda
    PRETENCES.clear()
    tensorrt_library.RuntimeCache._of_device.clear()
