"""Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


HAS_GPU = _has_gpu()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


# What limits the time of examples would fail on a busy machine; pytest-timeout bounds whole tests.
BUSY: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=12, **BUSY)
settings.register_profile("all", max_examples=100, **BUSY)


def pytest_configure(config: pytest.Config) -> None:
    """Fewer examples where slow tests are left out. A test that sets its own number keeps it."""
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "all")


def pytest_sessionfinish(exitstatus: int) -> None:
    if "SKIPSTEP_ATTACKS" in os.environ and exitstatus == 0:
        from attack_count import write_counts

        write_counts()


# Before pytest's own hook, which selects by markers.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_GPU:
            # Where there is a GPU, the kernels run on it: `-m gpu` selects these tests, too.
            if "kernel_device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device that torch can see"))


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where Triton kernels run in this session: the GPU, or host memory under the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _one_cache_for_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The suite neither reads nor fills the user's cache. Its processes share one, and in it their exports."""
    from engines import share_exports

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPSTEP_CACHE", str(folder / "cache"))
        share_exports(patch)
        yield
