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


@pytest.mark.parametrize(
    ("absent", "code", "extra"),
    [
        ("torch", "skipstep.Engine.build('x', plans=[1])", "skipstep[torch]"),
        ("triton", "import skipstep.kernels.step", "skipstep[torch]"),
        ("triton", "import skipstep.export.cubins", "skipstep[torch]"),
        ("diffusers", "load_unet(read_checkpoint(folder))", "skipstep[torch,diffusers]"),
        ("onnxscript", "export_onnx(DenoisingModule(nn.Identity()), NetworkSpec((1, 4, 4)))", "skipstep[export]"),
    ],
)
def test_a_missing_extra_is_named(absent, code, extra, tmp_path):
    """In a process of its own, where importing `absent` fails as if it were not installed."""
    from tiny_networks import tiny_unet

    tiny_unet().save_pretrained(tmp_path)
    prelude = f"""
import sys
sys.modules[{absent!r}] = None
import skipstep
from skipstep.errors import MissingDependencyError
folder = {str(tmp_path)!r}
"""
    if absent == "diffusers":
        prelude += "from skipstep.networks.checkpoint import load_unet, read_checkpoint\n"
    if absent == "onnxscript":
        prelude += """
from torch import nn
from skipstep.backends.torch import DenoisingModule
from skipstep.export.onnx_model import export_onnx
from skipstep.networks.spec import NetworkSpec
"""
    attempt = f"try:\n    {code}\nexcept MissingDependencyError as error:\n    print(error)\n"
    message = run(prelude + attempt)
    assert extra in message
    assert "emedy" in message
