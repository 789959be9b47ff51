"""What a lower precision of the network costs on the CPU: `python -m skipstep.bench.quality.cpu_precisions --out FILE`.

The shipped model draws the same samples in every precision of every backend that runs bundles. They are compared with
ONNX Runtime's in float32, pixel by pixel in [-1, 1], and by what the classifier sees in them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from skipstep import load
from skipstep.backends.registry import BACKENDS
from skipstep.bench.quality.judge import ShippedJudge
from skipstep.bench.record import environment, write_json
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import DeviceUnavailableError, MissingDependencyError

GUIDANCE = 2.0
HEADER = ["steps", "backend", "precision", "largest error", "root mean square error", "same class", "recognised"]


def draw(backend: str, precision: str, steps: int, num: int) -> Any:
    labels = np.arange(num) % 10
    with load(SHIPPED_BUNDLE, allow_hard_links=True, backend=backend, precision=precision) as engine:
        return engine.sample(steps=steps, seeds=range(num), class_labels=labels.tolist(), guidance_scale=GUIDANCE)


def rows(all_steps: list[int], num: int) -> tuple[list[list[str]], list[str]]:
    """The table, and what could not be measured, with its reason."""
    judge, labels, table, absent = ShippedJudge(), np.arange(num) % 10, [], []
    on_cpu = [(each.name, name) for each in BACKENDS if each.device == "cpu" for name in each.precisions]
    bundled = [each.name for each in BACKENDS if each.device == "cpu" and each.loads_bundles]
    for steps in all_steps:
        reference = draw("onnxruntime", "float32", steps, num)
        expected = judge(reference)[1]
        for backend, precision in on_cpu:
            if backend not in bundled:
                continue
            try:
                found = draw(backend, precision, steps, num)
            except (MissingDependencyError, DeviceUnavailableError) as refused:
                absent.append(f"{backend} in {precision}: {refused.got}")
                continue
            error = np.abs(found - reference)
            seen = judge(found)[1]
            shares = [f"{100 * np.mean(seen == other):.1f} %" for other in (expected, labels)]
            numbers = [f"{error.max():.2g}", f"{np.sqrt(np.mean(error**2)):.2g}"]
            table.append([str(steps), backend, precision, *numbers, *shares])
            print(*table[-1], sep=", ", flush=True)
    return table, list(dict.fromkeys(absent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20], help="default: 10 20")
    parser.add_argument("--num", type=int, default=256, help="samples of each (default: 256)")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    table, absent = rows(options.steps, options.num)
    facts = environment()
    write_json(
        options.out,
        {
            "command": f"python -m skipstep.bench.quality.cpu_precisions --num {options.num} --out {options.out.name}",
            "commit": facts["commit"],
            "environment": facts,
            "header": HEADER,
            "rows": table,
            "note": f"The shipped model, {options.num} samples of ten classes with guidance {GUIDANCE:g}, each against "
            "ONNX Runtime in float32. Recognised: the classifier sees the class that was asked for."
            + "".join(f" Not measured: {each}." for each in absent),
        },
    )


if __name__ == "__main__":
    main()
