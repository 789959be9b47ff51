"""A CUDA driver that executes, under a TensorRT that runs on it."""

from __future__ import annotations

import sys

import fake_tensorrt
import pytest
from executing_cuda import ExecutingCuda
from executing_library import launches_on, modules

from skipstep.backends.tensorrt_library import RuntimeCache


@pytest.fixture
def cuda(monkeypatch):
    driver = ExecutingCuda()
    for name, module in modules(driver).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "execute_async_v3", launches_on(driver))
    yield driver
    fake_tensorrt.PRETENCES.clear()
    RuntimeCache._of_device.clear()
