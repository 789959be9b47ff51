"""Benchmark results as skipstep bench would write them, made up: two networks on a two-core machine."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

STEPS = (1, 5, 10, 20, 50)
BATCHES = (1, 4, 16)
# Milliseconds of the textbook loop at batch 1: once a call and each step, and how the latter grows with the batch.
NETWORKS = {"fashion-mnist": (2.0, 14.0, 0.72), "cifar10-architecture": (2.0, 165.0, 0.95)}
# Speed-up over the textbook loop.
SPEEDS = {
    "textbook": 1.0, "diffusers": 0.95, "diffusers-compile": 1.5, "network": 3.2, "onnxruntime": 2.7, "openvino": 2.9,
    "skipstep-torch": 1.02, "skipstep": 3.1,
}  # fmt: skip
# Keys of the evaluation's plans with eta 0.
PLANS = {5: "4eb7f18bdd7e19dd", 10: "ed98c10983d06ce6", 20: "1c1b389fa0152dfe", 50: "60b47ed78e41c33d"}
MACHINE = "cpu x86_64 avx2, 2 cores"


def a_benchmark(
    model: str, contender: str, steps: int, batch_size: int, textbook: list[float], seconds: list[float], **info: Any
) -> dict[str, Any]:
    facts = {"schema": 1, "model": model, "contender": contender, "batch_size": batch_size, "device": "cpu"}
    plan = {"steps": steps, "solver": "ddim", "key": PLANS.get(steps, f"{steps:016x}")}
    facts |= {"plan": plan, "precision": "float32", "threads": 2, "error": 3e-6, "tolerance": 1e-3}
    facts |= {"ratios": [a / b for a, b in zip(textbook, seconds, strict=True)], **info}
    return {"name": f"test_sampling[{contender}]", "extra_info": facts, "stats": {"data": seconds}}


def a_result(
    commit: str = "011de5f",
    *,
    machine: str = MACHINE,
    models: tuple[str, ...] = tuple(NETWORKS),
    steps: tuple[int, ...] = STEPS,
    batches: tuple[int, ...] = BATCHES,
    slower: float = 1.0,
    day: int = 1,
    rounds: int = 11,
) -> dict[str, Any]:
    rng, benchmarks = random.Random(day), []
    for model, batch, count in ((m, b, s) for m in models for b in batches for s in steps):
        fixed, step, growth = NETWORKS[model]
        textbook = [(fixed + step * count * batch**growth) * rng.lognormvariate(0, 0.03) / 1e3 for _ in range(rounds)]
        for name, speed in SPEEDS.items():
            own = [t / speed * rng.lognormvariate(0, 0.02) * (slower if name == "skipstep" else 1) for t in textbook]
            own = textbook if name == "textbook" else own
            info: dict[str, Any] = {"build_seconds": 1.5, "peak_bytes": 410_000_000}
            if name in ("skipstep", "diffusers") and (count, batch) == (steps[0], batches[0]):
                info["cold_start_seconds"] = 0.2 if name == "skipstep" else 5.0
                load = {"callers": 4, "calls_per_second": 21.4, "p50_seconds": 0.15, "p99_seconds": 0.19}
                info["throughput"] = [load]
            benchmarks.append(a_benchmark(model, name, count, batch, textbook, own, **info))
    absent = {"contender": "skipstep-captured", "reason": "absent: no CUDA device"}
    cases = [(model, s, b) for model in models for b in batches for s in steps]
    return {
        "machine_info": {"cpu": {"brand_raw": "AMD EPYC", "count": 2}},
        "datetime": f"2026-03-{day:02}T12:00:00+00:00",
        "benchmarks": benchmarks,
        "skipstep": {
            "schema": 1, "versions": {"torch": "2.13.0+cpu", "numpy": "2.4.6"}, "commit": commit, "machine": machine,
            "cores": 2, "absent": [{"model": m, "steps": s, "batch_size": b, **absent} for m, s, b in cases],
        },
    }  # fmt: skip


def write_evaluation(folder: Path) -> Path:
    """Rows of skipstep evaluate: DDIM by step count, Heun's method, and a fitted plan."""
    cases = [(PLANS[steps], "steps and η", "ddim", steps, value) for steps, value in ((5, 15.7), (10, 10.2), (20, 8.1))]
    cases += [(f"heun {count}", "solvers", "heun", count, value) for count, value in ((9, 8.9), (19, 7.9))]
    rows: dict[str, Any] = {
        key: {
            "table": table, "key": key, "solver": solver, "eta": 0.0, "guidance": 1.0, "evaluations": evaluations,
            "samples": 2000, "frechet": {"value": distance, "low": distance - 0.2, "high": distance + 0.2},
            "recognised": {"value": 0.9, "low": 0.88, "high": 0.92},
        }
        for key, table, solver, evaluations, distance in cases
    }  # fmt: skip
    rows["fitted"] = {**rows["heun 9"], "table": "fitted plans", "solver": "fitted", "guidance": 2.0}
    rows["spread 0"] = {"eta": 0.0, "variance": {"value": 0.0, "low": 0.0, "high": 0.0}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps({"of": {}, "rows": rows}))
    return folder


def write_result(path: Path, result: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path
