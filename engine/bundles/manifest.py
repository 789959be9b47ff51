"""A bundle's manifest: what is in it, what for, and the size and sha256 of every file.

The types of the fields are also the rules by which skipstep.bundles.reader reads an untrusted one
(skipstep.storage.untrusted). They are no text, as evaluating text takes time when a bundle is loaded.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Final

from skipstep.kernels.statistics import Thresholding
from skipstep.loops.loop_table import LoopFeatures
from skipstep.networks.spec import NetworkSpec
from skipstep.storage.untrusted import (
    ADDED_LATER,
    MAX_ITEMS,
    FileName,
    Key,
    Length,
    ReadBy,
    Sha256,
    Within,
    malformed,
    read_dataclass,
)

SCHEMA: Final = 1
FILE_NAME: Final = "manifest.json"
SIGNATURE_NAME: Final = "manifest.sig"
MAX_BYTES: Final = 16 << 20

FileSize = Annotated[int, Within(0, 64 << 30)]
BatchSize = Annotated[int, Within(1, MAX_ITEMS)]
ScheduleNumber = Annotated[int, Within(0, MAX_ITEMS)]
Seed = Annotated[int, Within(0, 2**64 - 1)]
Label = Annotated[int, Within(0, 1 << 31)]


def _loop_features(value: Any, where: str) -> LoopFeatures:
    """JSON has no infinity, so a threshold without a maximum is stored with null."""
    if isinstance(value, dict) and isinstance(threshold := value.get("thresholding"), dict):
        maximum = threshold.get("maximum", 0.0)
        if maximum is None:
            value = {**value, "thresholding": {"quantile": threshold.get("quantile"), "maximum": 1.0}}
        features = read_dataclass(LoopFeatures, value, where)
        found = features.thresholding
        assert found is not None
        if not (0.0 <= found.quantile <= 1.0 and found.maximum >= 1.0):
            raise malformed(where, f"{found}")
        return replace(features, thresholding=Thresholding(found.quantile)) if maximum is None else features
    return read_dataclass(LoopFeatures, value, where)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: how many bytes, and their sha256 in hexadecimal."""

    size: FileSize
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """A plan: its key, the options that make it (skipstep.plans.plan), and the schedule that they refer to, by number.

    Its tables are in the tables file: KEY/coefficients, KEY/timesteps, and KEY/values/NAME for what the network
    computes of its distinct timesteps.
    """

    key: Key
    schedule: ScheduleNumber
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LoopEntry:
    """A whole-loop graph, and what it can do."""

    file: FileName
    features: Annotated[LoopFeatures, ReadBy(_loop_features)]


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """A TensorRT engine; `facts` are what its builder said of it (skipstep.export.tensorrt_engine)."""

    file: FileName
    target: str
    precision: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class KernelEntry:
    """A step kernel compiled for one architecture; `facts` say how to launch it (skipstep.edge.step_binary)."""

    file: FileName
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GoldenEntry:
    """Samples that the builder drew: `file` holds x_0, and drawing them again must come this close.

    `tolerance` bounds the root mean square of the difference over that of x_0.
    """

    file: FileName
    plan: Key
    seeds: Annotated[tuple[Seed, ...], Length(1, 64)]
    class_labels: tuple[Label, ...] | None
    guidance_scale: Annotated[float, Within(-1e6, 1e6)] | None
    tolerance: Annotated[float, Within(0.0, 1.0)]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of it. `graphs` names the files of the network's parts (plan, prompt, call, step and its halves).

    `defaults` are the options of a step count's plan, with `default_schedule`; None where the model names none.
    `calibration` is the file of measured latencies (skipstep.latency.calibration), None where nobody measured.
    """

    model: str
    digest: Sha256
    license: str
    network: NetworkSpec
    batch_sizes: Annotated[tuple[BatchSize, ...], Length(1)]
    plans: Annotated[tuple[PlanEntry, ...], Length(1)]
    graphs: Mapping[str, FileName]
    loops: Annotated[tuple[LoopEntry, ...], Length(1)]
    tables: FileName
    golden: GoldenEntry | None
    files: Mapping[str, FileEntry]
    tools: Mapping[str, str]
    partition: Mapping[str, Any]
    defaults: Mapping[str, Any] | None = None
    default_schedule: ScheduleNumber | None = None
    engines: tuple[EngineEntry, ...] = ()
    kernels: tuple[KernelEntry, ...] = ()
    calibration: Annotated[FileName | None, ADDED_LATER] = None
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
