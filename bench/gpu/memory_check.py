"""The kernels under NVIDIA's memory checker, where it is installed and the machine lets it look at the device.

What the checker reports must be the write that was planted, and nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

from skipstep.bench.gpu.tasks import Verdict

TOOL: Final = "compute-sanitizer"
_BESIDE_CUDA: Final = Path("/usr/local/cuda/bin")
_SECONDS: Final = 600.0  # The task's own limit comes first.
# Takes a few bytes of device memory through the driver alone: what the checker needs to work at all.
_PROBE: Final = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
context, memory = ctypes.c_void_p(), ctypes.c_void_p()
assert cuda.cuInit(0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
assert cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(4096)) == 0
"""
_SCRIPT: Final = (sys.executable, "-m", "skipstep.bench.gpu.checked_kernels")
_PLANTED: Final = "planted_write_kernel"


def check_memory(*, dry_run: bool) -> tuple[dict[str, Any], Verdict]:
    """Run the checker if it works here; what it said, and what follows."""
    if dry_run:
        # What can go wrong in the script shows all the same.
        _run([*_SCRIPT, "--device", "cpu"]).check_returncode()
        return {}, Verdict("absent", "a dry run has no device to watch")
    path = f"{os.environ.get('PATH', '')}{os.pathsep}{_BESIDE_CUDA}"
    tool = shutil.which(TOOL, path=path)
    if tool is None:
        return {}, Verdict("absent", f"no {TOOL} on PATH or in {_BESIDE_CUDA}")
    version = _run([tool, "--version"]).stdout.strip().splitlines()[-1:]
    facts: dict[str, Any] = {"tool": tool, "version": " ".join(version)}
    probe = _run([tool, "--error-exitcode", "99", sys.executable, "-c", _PROBE])
    if probe.returncode != 0:
        said = (probe.stdout + probe.stderr).strip()[-500:]
        return facts, Verdict("absent", f"{TOOL} does not work on this machine: {said}")
    # Tensors that share an allocation would hide writes from one into the next.
    ended = _run([tool, "--tool", "memcheck", *_SCRIPT], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = ended.stdout + ended.stderr
    found = reported_kernels(said)
    facts |= {"exit_status": ended.returncode, "reports": dict(found), "said": said[-4000:]}
    return facts, judge(found, said)


def reported_kernels(said: str) -> Counter[str]:
    """How often the checker reported an invalid access, by kernel: "at NAME+0x…" or "at 0x… in NAME" follows each."""
    pattern = r"Invalid __\w+__ \w+ of size \d+ bytes?\s*\n[^\n]*? at (?:0x[0-9a-f]+ in )?(?:void )?([A-Za-z_]\w*)"
    return Counter(re.findall(pattern, said))


def judge(found: Counter[str], said: str) -> Verdict:
    others = {kernel: count for kernel, count in found.items() if kernel != _PLANTED}
    if others:
        return Verdict("failed", f"invalid accesses in {', '.join(others)}")
    if not found:
        return Verdict("failed", f"the planted write was not reported; the checker said {said.strip()[-300:]!r}")
    return Verdict("ok", "only the planted write was reported")


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, env={**os.environ, **environment}
    )
