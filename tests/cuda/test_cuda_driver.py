"""The real bindings on a driver library without a GPU behind it: every call, in order, with its arguments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

COMPILER = shutil.which("cc") or shutil.which("gcc")
LAUNCH = """
from step_binaries import CUBIN, step_facts
from skipstep.edge.launcher import DeviceBuffer, StepLauncher, StepOperands
from skipstep.kernels.layout import StepFlags

operands = StepOperands(
    state=DeviceBuffer(0x10000, 0x10000),
    model_output=DeviceBuffer(0x20000, 0x10000),
    network_input=DeviceBuffer(0x30000, 0x10000),
    table=DeviceBuffer(0x40000, 0x10000),
)
with StepLauncher([(step_facts(87), CUBIN)], num_elements=1040, network_dtype="float16") as launcher:
    launcher.launch(StepFlags(), operands, batch_size=2, stage=7, stream=0x5EA)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C compiler for the stub driver")
    folder = tmp_path_factory.mktemp("stub")
    source = Path(__file__).parents[1] / "cuda_stub.c"
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", source, "-ldl"],
        check=True,
    )
    return folder


def run(code, *, libraries, log, init=0):
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "STUB_LOG": str(log),
        "STUB_INIT": str(init),
        "STUB_SIZES": "8" * 13 + "44" + "88",
    }
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_a_launch_reaches_the_driver_with_every_argument_in_place(stub, tmp_path):
    log = tmp_path / "log"
    result = run(LAUNCH, libraries=stub, log=log)
    assert result.returncode == 0, result.stderr
    # x0 and history; guidance, rescale and bound.
    unused = ["10000"] * 3
    pointers = ["10000", "10000", "20000", "30000", *unused[:2], "40000", "10000", *unused, "10000", "10000"]
    launch = "launch (2 2 1) (128 1 1) 4096 5ea " + " ".join([*pointers, f"{1040:x}", "7", "0", "0"])
    assert log.read_text().splitlines() == [
        "retain",
        *("push", "load an ELF", "function ddim_step_kernel", "pop"),
        *("push", launch, "pop"),
        *("push", "unload", "pop"),
        "release",
    ]


def test_another_device_number_is_refused(stub, tmp_path):
    result = run("from skipstep.cuda.driver import CudaDriver; CudaDriver(1)", libraries=stub, log=tmp_path / "log")
    assert "DeviceUnavailableError: got device 1; expected one of the 1 here" in result.stderr


def test_a_driver_without_a_device_is_a_typed_error(stub, tmp_path):
    result = run(LAUNCH, libraries=stub, log=tmp_path / "log", init=100)
    assert "DeviceUnavailableError: got no CUDA driver that starts (CUDA_ERROR_NO_DEVICE from cuInit)" in result.stderr


def test_a_machine_without_a_driver_is_a_typed_error(tmp_path):
    code = "import ctypes, sys; ctypes.CDLL('libcuda.so.1')"
    if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0:
        pytest.skip("this machine has an NVIDIA driver")
    result = run(LAUNCH, libraries=tmp_path, log=tmp_path / "log")
    assert "DeviceUnavailableError: got no CUDA driver that starts" in result.stderr
