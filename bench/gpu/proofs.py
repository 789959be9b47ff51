"""Proofs about one call: it launches one graph and nothing else, and the host waits once, for the result.

A profiler counts what the call asks of the CUDA runtime and driver; then the call runs with torch refusing to wait.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from skipstep.bench.contenders.engines import build_engine
from skipstep.bench.contenders.workload import Setup
from skipstep.bench.gpu.device import BenchDevice, Trace
from skipstep.bench.gpu.tasks import Verdict
from skipstep.bench.models import open_subject

_STEPS: Final = 20
_GRAPH_LAUNCHES: Final = ("cudaGraphLaunch", "cuGraphLaunch")
_KERNEL_LAUNCHES: Final = ("cudaLaunch", "cuLaunch")


def prove(device: BenchDevice) -> tuple[dict[str, Any], Verdict]:
    """Trace one call of a captured engine, at batch 1, whose result goes to memory of the caller's."""
    name = "tiny-architecture" if device.simulated else "cifar10-architecture"
    with TemporaryDirectory(prefix="skipstep-proofs-") as folder:
        subject = open_subject(name, folder=Path(folder))
        where = "cpu" if device.simulated else "cuda"
        dtype = str(device.dtype).removeprefix("torch.")
        setup = Setup((subject.plan(_STEPS),), (1,), where, dtype, 1, simulated=device.simulated)
        engine = build_engine(subject, setup, backend="torch", loop="captured")
    out = torch.empty(1, *subject.spec.sample_shape, device=device.torch_device)

    def call() -> None:
        engine.sample(steps=_STEPS, seeds=[0], output_type="pt", out=out)

    for _ in range(3):
        call()
    drawn = out.clone()
    trace = device.trace(call)
    device.synchronize()
    refused = ""
    try:
        with device.refusing_to_wait():
            call()
    except RuntimeError as error:
        refused = str(error)
    same = bool(torch.equal(drawn, out))
    facts = {
        "model": name,
        "steps": _STEPS,
        "captures": [asdict(each) for each in engine.captures],
        **count(trace),
        "functions": trace.functions,
        "refused": refused,
        "same_result": same,
    }
    return facts, judge(facts)


def count(trace: Trace) -> dict[str, int]:
    """The call's launches and waits, from the functions that it called."""

    def total(*beginnings: str) -> int:
        return sum(times for name, times in trace.functions.items() if name.startswith(beginnings))

    return {
        "graph_launches": total(*_GRAPH_LAUNCHES),
        "kernel_launches": total(*_KERNEL_LAUNCHES),
        "waits": sum(times for name, times in trace.functions.items() if "Synchronize" in name),
        "device_kernels": trace.device_kernels,
    }


def judge(facts: dict[str, Any]) -> Verdict:
    wrong = []
    if facts["functions"] and facts["graph_launches"] != 1:
        wrong.append(f"{facts['graph_launches']} graph launches where one was due")
    if facts["kernel_launches"]:
        wrong.append(f"{facts['kernel_launches']} kernels launched outside of the graph")
    if facts["waits"] > 1:
        wrong.append(f"the host waited {facts['waits']} times where once was due")
    if facts["refused"]:
        wrong.append(f"the host waited inside the call: {facts['refused'].splitlines()[0]}")
    if not facts["same_result"]:
        wrong.append("the same call drew other samples")
    if wrong:
        return Verdict("failed", "; ".join(wrong))
    if not facts["functions"]:
        return Verdict("absent", "the profiler sees no CUDA function on this machine")
    return Verdict("ok", "one graph launch, no other, one wait")
