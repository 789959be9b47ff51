"""Results as they are committed: what was measured, where, and with which versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipstep.storage.atomic import atomic_write

# Written by `make gpu-wheels`, for a machine that gets the sources without git.
_COMMIT_FILE = Path(".gpu-wheels/COMMIT")
_GPU_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "memory.used", "utilization.gpu")
_PACKAGES = ("torch", "triton", "diffusers", "onnx", "onnxruntime", "openvino", "tensorrt-rtx", "numpy")


def environment(*, simulated: bool = False) -> dict[str, str | int]:
    """Commit, processor, GPU and driver where there is one, and the versions of what was run.

    `simulated`: a dry run of the GPU gate, a machine class of its own that is never compared with a GPU.
    """
    facts: dict[str, str | int] = {
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "machine_class": f"dry run on {machine_class()}" if simulated else machine_class(),
        "python": platform.python_version(),
    }
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if gpu:
        facts["gpu"] = gpu
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def run_facts(*, simulated: bool = False) -> dict[str, Any]:
    """What a benchmark result says of where it comes from; `machine` must be equal for two to be compared."""
    facts = environment(simulated=simulated)
    versions = {name: facts[name] for name in ("python", *_PACKAGES) if name in facts}
    found = {"machine": facts["machine_class"], "processor": facts["cpu"], "cores": facts["cores"]}
    found |= {"gpu": facts["gpu"]} if "gpu" in facts else {}
    return {**found, "commit": facts["commit"], "versions": versions}


def machine_class() -> str:
    """What two machines must have in common for their results to be compared: the GPU, or the CPU's vector width and
    cores."""
    gpu = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if gpu:
        return f"gpu {gpu.splitlines()[0]}"
    flags = set(_cpu_fact("flags").split())
    widest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "scalar")
    return f"cpu {platform.machine()} {widest}, {os.cpu_count()} cores"


def gpu_state() -> dict[str, str]:
    """Clocks, temperature and load as nvidia-smi reports them now; empty where it does not answer."""
    lines = _output("nvidia-smi", f"--query-gpu={','.join(_GPU_STATE)}", "--format=csv,noheader").splitlines()
    return dict(zip(_GPU_STATE, lines[0].split(", "), strict=False)) if lines else {}


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result` with its environment, whole or not at all."""
    write_whole(path, {"environment": environment(), **result})


def write_finding(
    path: Path, *, command: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str, **more: Any
) -> None:
    """A table that skipstep.bench.report can show, what it is about, and `more` that it does not show."""
    facts = environment()
    found = {"command": command, "commit": facts["commit"], "environment": facts, "header": header, "rows": rows}
    write_json(path, {**found, "note": note, **more})


def write_whole(path: Path, contents: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all. Raises ValueError for NaN and infinity: they are not JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(contents, indent=1, allow_nan=False) + "\n").encode())


def _commit() -> str:
    """Of git, else $GATE_COMMIT, else what `make gpu-wheels` wrote."""
    if found := _output("git", "rev-parse", "--short", "HEAD") or os.environ.get("GATE_COMMIT"):
        return found
    try:
        return _COMMIT_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    return _cpu_fact("model name") or platform.processor()


def _cpu_fact(name: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return ""
