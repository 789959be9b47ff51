"""Proofs about one call: it launches one graph and nothing else, and the host waits once, for the result.

A profiler counts what the call asks of the CUDA runtime and driver; then the call runs with torch refusing to wait.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from skipstep.bench.gpu.device import BenchDevice, Trace
from skipstep.bench.gpu.tasks import Verdict
from skipstep.bench.gpu_models import DRY_RUN_MODELS, GPU_MODELS
from skipstep.plans.plan import Plan
from skipstep.plans.scheduler_config import read_scheduler_config

_STEPS: Final = 20
_GRAPH_LAUNCHES: Final = ("cudaGraphLaunch", "cuGraphLaunch")
_KERNEL_LAUNCHES: Final = ("cudaLaunch", "cuLaunch")


def prove(device: BenchDevice) -> tuple[dict[str, Any], Verdict]:
    """Trace one call of a captured engine, at batch 1, whose result goes to memory of the caller's."""
    make, _ = next(iter((DRY_RUN_MODELS if device.simulated else GPU_MODELS).values()))
    model = make()
    plan = Plan(**read_scheduler_config(dict(model.scheduler.config)).plan_options(), steps=_STEPS)
    engine = device.build(device.place(model.unet, device.dtype), plans=[plan], batch_sizes=[1], loop="captured")
    size = model.unet.config.sample_size
    out = torch.empty(1, model.unet.config.in_channels, size, size, device=device.torch_device)

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
        "model": model.name,
        "steps": _STEPS,
        "captures": device.captures(engine),
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
