"""Fixtures of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import fake_tensorrt
import pytest
import torch
from fake_tensorrt import PRETENCES
from tensorrt_cases import Cuda

from skipstep.backends import tensorrt


@pytest.fixture
def cuda(monkeypatch) -> Iterator[Cuda]:
    """A machine with a device and both libraries."""
    cuda = Cuda()
    for name in ("Stream", "current_stream", "stream", "synchronize", "is_current_stream_capturing", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, fake_tensorrt.library(name))
    monkeypatch.setattr(tensorrt, "cuda_device", lambda **options: (90, "a GPU"))
    yield cuda
    PRETENCES.clear()
