"""Fixtures of this folder."""

from __future__ import annotations

import textwrap

import pytest
from step_networks import unet_step


@pytest.fixture(scope="module")
def step_graph() -> bytes:
    return unet_step()


@pytest.fixture
def shadow(tmp_path, monkeypatch):
    """Puts another module in front of a library; it runs in the builder's process alone."""

    def write(library: str, code: str) -> None:
        (tmp_path / f"{library}.py").write_text(
            "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
            + textwrap.dedent(code)
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    return write
