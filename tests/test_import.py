"""Importing skipstep must cost nothing that its user did not ask for."""

import statistics
import subprocess
import sys
import time

import pytest

HEAVY = {"torch", "triton", "onnxruntime", "onnx", "diffusers", "numpy", "PIL"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_loads_no_array_library():
    loaded = set(run("import sys, skipstep; print(*sys.modules)").split())
    assert "skipstep" in loaded
    assert not loaded & HEAVY


def test_plans_need_numpy_alone():
    loaded = set(run("import sys; from skipstep import Plan, NoiseSchedule; Plan; print(*sys.modules)").split())
    assert not loaded & (HEAVY - {"numpy"})


def test_importing_takes_less_than_three_tenths_of_a_second():
    def seconds(code: str) -> float:
        started = time.perf_counter()
        run(code)
        return time.perf_counter() - started

    # Side by side and by the median: on a busy machine starting Python itself may take that long.
    cost = statistics.median(seconds("import skipstep") - seconds("pass") for _ in range(5))
    assert cost < 0.3


def test_public_names():
    import skipstep

    assert {"Engine", "NoiseSchedule", "Plan"} <= set(dir(skipstep))
    for name in skipstep.__all__:
        assert getattr(skipstep, name) is not None
    with pytest.raises(AttributeError, match="Sampler"):
        skipstep.Sampler  # noqa: B018
