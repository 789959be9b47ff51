"""What half precision costs in accuracy: samples of a network in less than float32 against the textbook loop's.

The state, the step and the timestep's tables stay float32, as they do in an engine; only the step network is lowered
(skipstep.export.precision). ONNX Runtime's CPU computes float16, if slowly. It computes no bfloat16: there torch's own
bfloat16 module stands in, normalisations included, which is an upper bound for what a lowered network loses.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnxruntime

from skipstep.bench.contenders import textbook
from skipstep.bench.contenders.lowered import draw_lowered
from skipstep.bench.contenders.workload import Samples, Setup, Workload
from skipstep.export.partition import partition
from skipstep.export.precision import lower_precision


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of samples against the float32 textbook loop's: `largest` difference over the largest magnitude, `rms` of the
    differences over that of the samples. Both None where nothing here computes it; `runtime` says what did, or why."""

    model: str
    precision: str
    steps: int
    batch_size: int
    runtime: str
    largest: float | None = None
    rms: float | None = None


def accuracies(workload: Workload, setup: Setup) -> list[Accuracy]:
    """Of each precision on the model of `workload`; textbook samples in float32 are the reference."""
    exact = replace(setup, device="cpu", dtype="float32")
    reference = textbook.build(workload.subject, exact).prepare(workload)()
    parts = partition(workload.subject.exported)
    runtime = f"onnxruntime {onnxruntime.__version__}, CPU"

    def accuracy(precision: str, where: str, drawn: Samples) -> Accuracy:
        difference = drawn - reference
        return Accuracy(
            workload.subject.name,
            precision,
            workload.steps,
            workload.batch_size,
            where,
            largest=float(np.abs(difference).max() / np.abs(reference).max()),
            rms=float(np.sqrt(np.mean(difference**2) / np.mean(reference**2))),
        )

    threads = setup.threads
    half = lower_precision(parts.graphs.step, "float16")
    torch_half = textbook.build(workload.subject, replace(exact, dtype="bfloat16")).prepare(workload)()
    return [
        accuracy("float32", runtime, draw_lowered(parts.graphs.step, parts, workload, threads=threads)[0]),
        accuracy("float16", runtime, draw_lowered(half, parts, workload, threads=threads)[0]),
        Accuracy(
            workload.subject.name,
            "bfloat16",
            workload.steps,
            workload.batch_size,
            "no runtime on this machine computes ONNX convolutions in bfloat16",
        ),
        accuracy("bfloat16, whole module", "torch, CPU", torch_half),
    ]


def accuracies_as_json(workload: Workload, setup: Setup) -> list[dict[str, Any]]:
    return [asdict(each) for each in accuracies(workload, setup)]
