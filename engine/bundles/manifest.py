"""A bundle's manifest: what is in it, what for, and the size and sha256 of every file (read by manifest_reader)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from skipstep.loops.loop_table import LoopFeatures
from skipstep.networks.spec import NetworkSpec

SCHEMA: Final = 1
FILE_NAME: Final = "manifest.json"
SIGNATURE_NAME: Final = "manifest.sig"
MAX_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: how many bytes, and their sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """A plan: its key, the options that make it (skipstep.plans.plan), and the schedule that they refer to, by number.

    Its tables are in the tables file: KEY/coefficients, KEY/timesteps, and KEY/values/NAME for what the network
    computes of its distinct timesteps.
    """

    key: str
    schedule: int
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LoopEntry:
    """A whole-loop graph, and what it can do."""

    file: str
    features: LoopFeatures


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """A TensorRT engine; `facts` are what its builder said of it (skipstep.export.tensorrt_engine)."""

    file: str
    target: str
    precision: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class KernelEntry:
    """A step kernel compiled for one architecture; `facts` say how to launch it (skipstep.edge.step_binary)."""

    file: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GoldenEntry:
    """Samples that the builder drew: `file` holds x_0, and drawing them again must come this close.

    `tolerance` bounds the root mean square of the difference over that of x_0.
    """

    file: str
    plan: str
    seeds: tuple[int, ...]
    class_labels: tuple[int, ...] | None
    guidance_scale: float | None
    tolerance: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of it. `graphs` names the files of the network's parts (plan, prompt, call, step and its halves).

    `defaults` are the options of a step count's plan, with `default_schedule`; None where the model names none.
    `calibration` is the file of measured latencies (skipstep.latency.calibration), None where nobody measured.
    """

    model: str
    digest: str
    license: str
    network: NetworkSpec
    batch_sizes: tuple[int, ...]
    plans: tuple[PlanEntry, ...]
    graphs: Mapping[str, str]
    loops: tuple[LoopEntry, ...]
    tables: str
    golden: GoldenEntry | None
    files: Mapping[str, FileEntry]
    tools: Mapping[str, str]
    partition: Mapping[str, Any]
    defaults: Mapping[str, Any] | None = None
    default_schedule: int | None = None
    engines: tuple[EngineEntry, ...] = ()
    kernels: tuple[KernelEntry, ...] = ()
    calibration: str | None = None
    schema: int = field(default=SCHEMA)

    def to_json(self) -> bytes:
        """The same manifest always gives the same bytes."""
        contents = asdict(self)
        if self.calibration is None:
            del contents["calibration"]  # A bundle that was never calibrated has the bytes that it always had.
        for loop in contents["loops"]:
            thresholding = loop["features"]["thresholding"]
            if thresholding is not None and math.isinf(thresholding["maximum"]):
                thresholding["maximum"] = None  # JSON has no infinity.
        return (json.dumps(contents, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
