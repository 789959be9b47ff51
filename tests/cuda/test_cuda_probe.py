"""The driver is asked through its own interface: one that is not there, one that fails, and one with a device."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import HAS_GPU

from skipstep.cuda.probe import cuda_device
from skipstep.errors import DeviceUnavailableError

COMPILER = shutil.which("cc") or shutil.which("gcc")
DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return atoi(getenv("STUB_INIT")); }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 12 : attribute == 76 ? 1 : -1;
    return device == 40 ? 0 : 101;
}
int cuDeviceGetName(char *name, int bytes, int device) { strncpy(name, "a GPU", bytes); return 0; }
"""


@pytest.mark.skipif(HAS_GPU, reason="asks what happens without a CUDA device")
def test_without_a_driver_the_callers_remedy_is_given():
    with pytest.raises(DeviceUnavailableError, match=r"without a CUDA driver|CUDA error .*Remedy: go elsewhere"):
        cuda_device(remedy="go elsewhere")


@pytest.mark.parametrize(("status", "answer"), [(0, "(121, 'a GPU')"), (100, "CUDA error 100 from cuInit")])
def test_what_the_driver_answers(tmp_path, status, answer):
    if COMPILER is None:
        pytest.skip("no C compiler for the stub driver")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    program = "from skipstep.cuda.probe import cuda_device; print(cuda_device())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "STUB_INIT": str(status)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert answer in result.stdout + result.stderr


@pytest.mark.gpu
def test_the_device_that_torch_sees():
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    assert cuda_device() == (10 * major + minor, torch.cuda.get_device_name(0))
