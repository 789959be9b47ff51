"""The kernels under NVIDIA's memory checker, where it is installed and the machine lets it look at the device.

The watched process is this module, `python -m skipstep.bench.gpu.memory_check`: the kernels on small operands, in sizes
that fill their blocks and sizes that do not, with all flags that read or write something of their own. At the end a
kernel writes out of bounds on purpose. What the checker reports must be that write, and nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch
import triton
import triton.language as tl

from skipstep.bench.gpu.tasks import Verdict
from skipstep.kernels.layout import NUM_COLUMNS, NUM_SLOTS, StepFlags
from skipstep.kernels.step import ddim_step, initial_noise

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
_SCRIPT: Final = (sys.executable, "-m", "skipstep.bench.gpu.memory_check")
_PLANTED: Final = "planted_write_kernel"
_SIZES: Final = (1, 1024, 4097)
_FEW_SIZES: Final = (1, 63)  # The interpreter takes its time.
_BATCH_SIZE: Final = 3


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


@triton.jit
def planted_write_kernel(pointer, distance):  # type: ignore[no-untyped-def]
    tl.store(pointer + distance, 1.0)


def _all_but(*left_out: str) -> StepFlags:
    return StepFlags(**{each.name: each.name not in left_out for each in fields(StepFlags)})


def _others(written: int) -> list[str]:
    """The flags of a step that writes one slot of the history, which it may not have."""
    return [f"write_h{slot}" for slot in range(NUM_SLOTS) if slot != written]


def run_kernels(device: str) -> None:
    sizes = _SIZES if device == "cuda" else _FEW_SIZES
    flag_sets = (StepFlags(clip=True), *(_all_but("clip", *_others(slot)) for slot in range(NUM_SLOTS)))
    for n, flags, dtype in itertools.product(sizes, flag_sets, (torch.float16, torch.float32)):
        network_batch, channels = _BATCH_SIZE * (2 if flags.guided else 1), 2 if flags.wide_output else 1
        state = torch.randn(_BATCH_SIZE, 1, n, 1, device=device)
        network_input = torch.empty(network_batch, 1, n, 1, device=device, dtype=dtype)
        seeds = torch.arange(_BATCH_SIZE, device=device)
        initial_noise(state=state, network_input=network_input, seeds=seeds)
        ones = torch.ones(_BATCH_SIZE, device=device)
        ddim_step(
            state=state,
            model_output=torch.randn(network_batch, channels, n, 1, device=device).to(dtype),
            network_input=network_input,
            table=torch.rand(2, _BATCH_SIZE, NUM_COLUMNS, device=device),
            stage=1,
            flags=flags,
            seeds=seeds,
            guidance=ones,
            rescale=ones,
            bound=ones,
            history=torch.zeros(NUM_SLOTS, *state.shape, device=device),
            x0=torch.empty_like(state),
            broken=torch.full((_BATCH_SIZE,), 99, device=device, dtype=torch.int32),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    run_kernels(options.device)
    if options.device == "cuda":
        torch.cuda.synchronize()
        planted_write_kernel[(1,)](torch.zeros(256, device="cuda"), 1 << 20)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
