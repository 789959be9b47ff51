"""Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


HAS_GPU = _has_gpu()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device that torch can see"))


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where Triton kernels run in this session: the GPU, or host memory under the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The suite neither reads nor fills the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
