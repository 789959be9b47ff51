"""The driver is asked through its own interface: one that is not there, one that fails, and one with a device."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import HAS_GPU

from skipstep.cuda import probe
from skipstep.cuda.probe import DeviceFacts, cuda_device
from skipstep.errors import DeviceUnavailableError

COMPILER = shutil.which("cc") or shutil.which("gcc")
DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return atoi(getenv("STUB_INIT")); }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 12 : attribute == 76 ? 1 : attribute == 16 ? 70 + device : -1;
    return device == 40 || device == 41 ? 0 : 101;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 6ULL << 30; return 0; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetName(char *name, int bytes, int device) { strncpy(name, "a GPU", bytes); return 0; }
"""


@pytest.mark.skipif(HAS_GPU, reason="asks what happens without a CUDA device")
def test_without_a_driver_the_callers_remedy_is_given():
    with pytest.raises(DeviceUnavailableError, match=r"without a CUDA driver|CUDA error .*Remedy: go elsewhere"):
        cuda_device(remedy="go elsewhere")


FACTS = "DeviceFacts(name='a GPU', compute_capability=121, num_multiprocessors={}, memory_bytes=6442450944, "


@pytest.mark.parametrize(
    ("index", "status", "answer"),
    [
        (0, 0, FACTS.format(110) + "cuda_version=13010)"),
        (1, 0, FACTS.format(111)),
        (2, 0, "CUDA error 101 from cuDeviceGetAttribute"),
        (0, 100, "CUDA error 100 from cuInit"),
    ],
)
def test_what_the_driver_answers(tmp_path, index, status, answer):
    if COMPILER is None:
        pytest.skip("no C compiler for the stub driver")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    program = f"from skipstep.cuda.probe import cuda_device; print(cuda_device({index}))"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "STUB_INIT": str(status)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert answer in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("built_for", "served", "found"),
    [
        (None, 13000, "build for CPUs"),
        ("13.0", 12040, r"a GPU, whose driver serves CUDA 12.4, and torch built for 13.0"),
        ("12.8", 13000, "a GPU is there, torch cannot use it"),
        ("13.0", None, "no driver"),
    ],
)
def test_why_torch_sees_no_device(monkeypatch, built_for, served, found):
    def facts():
        if served is None:
            raise DeviceUnavailableError(got="no driver", expected="one", remedy="install it")
        return DeviceFacts("a GPU", 90, 132, 80 << 30, served)

    monkeypatch.setattr(probe, "cuda_device", facts)
    assert found in probe.why_not_seen(built_for)[0]


@pytest.mark.gpu
def test_the_device_that_torch_sees():
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    facts = cuda_device()
    assert (facts.compute_capability, facts.name) == (10 * major + minor, torch.cuda.get_device_name(0))
    assert facts.num_multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
