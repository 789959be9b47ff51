"""Bundles of three networks for every kind of target, made on this machine: `python -m skipstep.bench.bundles`.

Each is exported to the CPU, to TensorRT-RTX engines and to step kernels, then read, hashed and tried as
`skipstep inspect` and `skipstep verify` do.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipstep import Engine, Plan, load
from skipstep.bench.models import ALL_MODELS
from skipstep.bench.record import write_json
from skipstep.bundles.bundle import Bundle, open_bundle
from skipstep.bundles.golden import replay_golden
from skipstep.commands.inspect import describe
from skipstep.plans.scheduler_config import read_scheduler_config

TARGETS = ("cpu", "rtx:sm86,sm89,sm120", "sm_75,sm_87,sm_89,sm_90,sm_120")
STEPS = (10, 20, 50)
PRECISION = "float16"


def make_bundle(name: str, folder: Path) -> dict[str, Any]:
    """Export one network; seconds and bytes by kind of file, and how far the golden samples were off."""
    model = ALL_MODELS[name]()
    options = read_scheduler_config(dict(model.scheduler.config)).plan_options()
    started = time.perf_counter()
    engine = Engine.build(
        model.unet,
        plans=[Plan(**options, steps=steps) for steps in STEPS],
        backend="onnxruntime",
        device="cpu",
        null_label=10 if model.conditional else None,
        prompt_shape=model.prompt_shape,
    )
    build_seconds = time.perf_counter() - started
    marks: list[tuple[str, float]] = []
    engine.save(
        folder,
        license="Apache-2.0",
        name=name,
        targets=TARGETS,
        precision=PRECISION,
        progress=lambda message: marks.append((message, time.perf_counter())),
    )
    marks.append(("", time.perf_counter()))
    bundle = open_bundle(folder)
    assert describe(bundle), "inspect says something"
    for file in bundle.manifest.files:
        bundle.read(file)
    assert bundle.manifest.golden is not None, "the writer drew them"
    error = replay_golden(load(folder), bundle.manifest.golden, bundle.read_arrays(bundle.manifest.golden.file))
    return {
        "model": name,
        "build_seconds": round(build_seconds, 2),
        "seconds": _seconds_by_part(marks),
        "bytes": _bytes_by_kind(bundle),
        "engines": len(bundle.manifest.engines),
        "kernels": len(bundle.manifest.kernels),
        "golden_error": error,
    }


def _seconds_by_part(marks: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Seconds between progress messages, summed over those of one part: "rtx:sm86, batch 1: a phase of it"."""
    seconds: dict[str, float] = {}
    for (message, before), (_, after) in itertools.pairwise(marks):
        part = message.rsplit(": ", 1)[0]
        seconds[part] = round(seconds.get(part, 0.0) + after - before, 2)
    return seconds


def _bytes_by_kind(bundle: Bundle) -> Mapping[str, int]:
    sizes: dict[str, int] = {}
    for name, entry in bundle.manifest.files.items():
        kind = name.split("/")[0] if "/" in name else "tables and golden"
        sizes[kind] = sizes.get(kind, 0) + entry.size
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Nothing was built before.
        os.environ |= {"SKIPSTEP_CACHE": f"{folder}/cache", "TRITON_CACHE_DIR": f"{folder}/triton"}
        bundles = [make_bundle(name, Path(folder) / name) for name in ALL_MODELS]
    write_json(
        options.out,
        {"targets": TARGETS, "precision": PRECISION, "steps": STEPS, "batch_sizes": [1], "bundles": bundles},
    )


if __name__ == "__main__":
    main()
