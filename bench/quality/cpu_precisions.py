"""What a lower precision of the network costs on the CPU: `python -m skipstep.bench.quality.cpu_precisions --out FILE`.

The shipped model draws the same samples in every precision of every backend that runs bundles. They are compared with
ONNX Runtime's in float32, pixel by pixel in [-1, 1], and by what the classifier sees in them. So are those of the
networks in 8 bits that TensorRT engines are built from: on the CPU they show the accuracy, and nothing of the speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from skipstep import Engine, load
from skipstep.backends.denoiser import EIGHT_BITS
from skipstep.backends.registry import BACKENDS
from skipstep.bench.quality.judge import ShippedJudge
from skipstep.bench.record import environment, write_finding
from skipstep.demo import SHIPPED_BUNDLE, SHIPPED_MODEL
from skipstep.errors import DeviceUnavailableError, ExportError, MissingDependencyError
from skipstep.export.trtexec import float32_interface
from skipstep.loops.contract import Sampler
from skipstep.plans.plan import Plan
from skipstep.quantizing import quantize_source, sampler_of

GUIDANCE = 2.0
HEADER = [
    *("steps", "backend", "precision", "largest error", "root mean square error", "same class", "recognised"),
    "times as fast",
]
FOR_TENSORRT = "tensorrt"
PLANS = [4, 6, 8, 10, 20, 50]
CALIBRATION = range(1 << 20, (1 << 20) + 10)
TURNS = 15
NETWORK = "new samples"
told: list[str] = []


def tell(line: str) -> None:
    told.append(line)
    print(line, flush=True)


@cache
def opened(backend: str, precision: str) -> Any:
    """The shipped model; in 8 bits calibrated with all of its plans, on seeds that are not compared."""
    if backend == FOR_TENSORRT:
        return in_8_bits(precision)
    if precision != "int8":
        return load(SHIPPED_BUNDLE, allow_hard_links=True, backend=backend, precision=precision)
    return Engine.build(
        SHIPPED_MODEL,
        plans=shipped_plans(),
        batch_sizes=[1, 16],
        backend=backend,
        device="cpu",
        precision=precision,
        calibration=CALIBRATION,
        progress=tell,
    )


def shipped_plans() -> list[Plan]:
    return list(opened("onnxruntime", "float32").plans.values())


def in_8_bits(precision: str) -> Sampler:
    """The network that TensorRT's engines are built from, on ONNX Runtime."""
    plans, source = shipped_plans(), opened("onnxruntime", "float32").source
    [step] = quantize_source(source, plans, list(CALIBRATION), [precision], sampler=Engine, report=tell).values()
    return sampler_of(source, float32_interface(step.graph), plans, [1, 16], Engine)


@cache
def draw(backend: str, precision: str, steps: int, num: int) -> Any:
    labels = (np.arange(num) % 10).tolist()
    return opened(backend, precision).sample(
        steps=steps, seeds=range(num), class_labels=labels, guidance_scale=GUIDANCE
    )


def speed(backend: str, precision: str, steps: int) -> float:
    """How many times as fast as ONNX Runtime in float32, by the median of calls in turns, batch 1, no guidance."""
    seconds: list[list[float]] = [[], []]
    engines = opened("onnxruntime", "float32"), opened(backend, precision)
    for turn in range(TURNS + 1):
        for taken, engine in zip(seconds, engines, strict=True):
            started = time.perf_counter()
            engine.sample(steps=steps, seeds=0, class_labels=0)
            taken += [time.perf_counter() - started] if turn else []
    return float(np.median(seconds[0]) / np.median(seconds[1]))


def rows(backends: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Backend and precision of what is compared, and what is not, with its reason."""
    on_cpu = [(each.name, name) for each in BACKENDS if each.device == "cpu" for name in each.precisions]
    bundled = [each.name for each in BACKENDS if each.device == "cpu" and each.loads_bundles] + [FOR_TENSORRT]
    on_cpu += [(FOR_TENSORRT, name) for name in EIGHT_BITS]
    found, absent = [], []
    for backend, precision in on_cpu:
        if backend in (backends or bundled):
            try:
                opened(backend, precision)
                found.append((backend, precision))
            except (MissingDependencyError, DeviceUnavailableError, ExportError) as refused:
                absent.append(f"{backend} in {precision}: {refused.got}")
    return found, absent


def compare(judge: ShippedJudge, backend: str, precision: str, steps: int, num: int) -> list[str]:
    reference, labels = draw("onnxruntime", "float32", steps, num), np.arange(num) % 10
    found = draw(backend, precision, steps, num)
    error, seen = np.abs(found - reference), judge(found)[1]
    shares = [f"{100 * np.mean(seen == other):.1f} %" for other in (judge(reference)[1], labels)]
    fast = "–" if backend == FOR_TENSORRT else f"{speed(backend, precision, steps):.2f}"
    numbers = [f"{error.max():.2g}", f"{np.sqrt(np.mean(error**2)):.2g}"]
    return [str(steps), backend, precision, *numbers, *shares, fast]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=PLANS, help="default: those of the shipped model")
    parser.add_argument("--num", type=int, default=256, help="samples of each (default: 256)")
    parser.add_argument(
        "--backends", nargs="+", default=[], help="default: all, and tensorrt for its networks in 8 bits"
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write; rows in it are not repeated")
    options = parser.parse_args()
    command, judge = "python -m skipstep.bench.quality.cpu_precisions " + " ".join(sys.argv[1:]), ShippedJudge()
    kept = json.loads(options.out.read_bytes()) if options.out.exists() else {}
    again = (kept.get("command"), kept.get("commit")) == (command, environment()["commit"])
    table = kept["rows"] if again else []
    found, absent = rows(options.backends)
    note = (
        f"The shipped model, {options.num} samples of ten classes with guidance {GUIDANCE:g}, each against ONNX "
        "Runtime in float32. Recognised: the classifier sees the class that was asked for. Times as fast as ONNX "
        "Runtime in float32, at batch 1 without guidance, calls in turns. tensorrt: the network that its engines are "
        "built from, on ONNX Runtime."
    )
    note += "".join(f" {line}." for line in told if NETWORK in line)
    note += "".join(f" Not measured: {each}." for each in absent)
    for steps, (backend, precision) in itertools.product(options.steps, found):
        if [str(steps), backend, precision] not in [row[:3] for row in table]:
            table.append(compare(judge, backend, precision, steps, options.num))
            print(*table[-1], sep=", ", flush=True)
            write_finding(options.out, command=command, header=HEADER, rows=table, note=note)


if __name__ == "__main__":
    main()
