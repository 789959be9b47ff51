"""Benchmark runs as skipstep bench would write them, made up: two networks on a two-core machine, ten contenders."""

from __future__ import annotations

import random
import statistics
from typing import Any

from skipstep.bench.fits import fits_as_json
from skipstep.bench.results import REFERENCE, Case, Contender, Run

STEPS = (1, 5, 10, 20, 50, 100)
BATCHES = (1, 4, 16, 64)
# Milliseconds at batch 1: once a call and each step, and how the latter grows with the batch.
NETWORKS = {"fashion-mnist": (2.0, 14.0, 0.72), "cifar10-architecture": (2.0, 165.0, 0.95)}
# Speed-up over the textbook loop at batch 1 and at large batches, by network.
SPEEDS = {
    "textbook": ((1.0, 1.0), (1.0, 1.0)),
    "diffusers": ((0.95, 0.99), (0.99, 1.0)),
    "diffusers-compile": ((1.5, 1.1), (1.2, 1.05)),
    "onnxruntime-stepwise-python": ((2.7, 1.18), (1.45, 1.1)),
    "skipstep-torch-stepwise": ((1.02, 1.0), (1.0, 1.0)),
    "skipstep-onnx-stepwise": ((2.95, 1.2), (1.5, 1.12)),
    "skipstep-onnx": ((3.1, 1.22), (1.54, 1.13)),
}
# Keys of the committed evaluation's plans: 5, 10, 20, 50, 100 steps, eta 0.
PLANS = {5: "4eb7f18bdd7e19dd", 10: "ed98c10983d06ce6", 20: "1c1b389fa0152dfe", 50: "60b47ed78e41c33d"}
MACHINE = "cpu x86_64 avx2, 2 cores"


def environment(commit: str = "011de5f", machine_class: str = MACHINE) -> dict[str, Any]:
    facts = {"commit": commit, "cpu": "AMD EPYC", "cores": 2, "machine_class": machine_class, "python": "3.11.7"}
    return {**facts, "torch": "2.13.0+cpu", "diffusers": "0.42.1", "onnxruntime": "1.31.1", "numpy": "2.4.6"}


def a_case(model: str, steps: int, batch: int, *, rng: random.Random, slower: float = 1.0, turns: int = 11) -> Case:
    fixed, step, growth = NETWORKS[model]
    textbook = [(fixed + step * steps * batch**growth) * rng.lognormvariate(0, 0.03) / 1e3 for _ in range(turns)]
    contenders = []
    for name, speeds in SPEEDS.items():
        first, last = speeds[list(NETWORKS).index(model)]
        speed = last + (first - last) / batch
        if name.startswith("skipstep-onnx"):
            speed /= slower
        once = {"diffusers": 1.5, "onnxruntime-stepwise-python": 0.8}.get(name, 0.4) / 1e3
        seconds = tuple(textbook) if name == REFERENCE else tuple(
            once + s / speed * rng.lognormvariate(0, 0.02) for s in textbook
        )  # fmt: skip
        contenders.append(
            Contender(
                name,
                "ok",
                backend="onnxruntime" if "onnx" in name else "torch",
                loop="onnx" if name == "skipstep-onnx" else "stepwise",
                seconds=seconds,
                ratio=statistics.median(t / s for t, s in zip(textbook, seconds, strict=True)),
                error=0.0 if name == REFERENCE else 3e-6,
                tolerance=1e-3,
                build_seconds=15.2 if "onnx" in name else 0.02,
                warmup_seconds=0.3,
                peak_memory_bytes=410_000_000 if "onnx" in name else 690_000_000,
                nodes_per_step=644 if name == "skipstep-onnx" else None,
                bytes_per_step=31_000_000 if name == "skipstep-onnx" else None,
            )
        )
    contenders += [
        Contender("openvino", "absent", reason="no package openvino: pip install openvino"),
        Contender("skipstep-captured", "absent", reason="no CUDA device"),
    ]
    if (model, batch, steps) == ("fashion-mnist", 16, 10):
        contenders[2] = Contender("diffusers-compile", "failed", reason="InductorError: no C++ compiler took the file")
    contenders.append(
        Contender("skipstep-onnx-int8", "wrong", reason="off by 0.031, allowed 0.02", error=0.031, tolerance=0.02)
    )
    plan = PLANS.get(steps, f"{steps:016x}")
    return Case(
        model,
        steps,
        batch,
        "float32",
        plan,
        tuple(contenders),
        outside_network=(0.04 if model[0] == "f" else 0.005) / batch,
    )


def a_run(
    commit: str = "011de5f",
    *,
    machine_class: str = MACHINE,
    models: tuple[str, ...] = tuple(NETWORKS),
    steps: tuple[int, ...] = STEPS,
    batches: tuple[int, ...] = BATCHES,
    slower: float = 1.0,
    seed: int = 0,
) -> Run:
    rng = random.Random(seed)
    cases = tuple(
        a_case(model, s, b, rng=rng, slower=slower) for model in models for b in batches for s in steps
        if not (model == "cifar10-architecture" and b == 64 and s > 10)
    )  # fmt: skip
    throughput = [
        {"contender": "skipstep-onnx", "threads": threads, "calls_per_second": rate, "p99_seconds": 0.02 * threads}
        for threads, rate in ((1, 21.4), (2, 23.9), (4, 23.1))
    ]
    return Run(
        environment(commit, machine_class),
        {"plans": list(steps), "batch": list(batches), "budget": 20.0, "threads": 2},
        cases,
        {"fits": fits_as_json(cases), "throughput": throughput},
    )
