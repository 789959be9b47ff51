"""Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported."""

import os

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
