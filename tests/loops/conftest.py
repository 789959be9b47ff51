"""Fixtures of this folder."""

from __future__ import annotations

import pytest
from fake_cuda import FakeDevice, install


@pytest.fixture
def device(monkeypatch):
    device = FakeDevice()
    install(monkeypatch, device)
    return device
