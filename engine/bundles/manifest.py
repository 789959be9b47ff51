"""A bundle's manifest: its contents and their purpose, and the size and sha256 of every file.

Schema 2: the step network is stored once, for every plan and batch size. The types of the fields are also the rules by
which skipstep.bundles.reader reads an untrusted manifest (skipstep.storage.untrusted). They are evaluated when the
module is imported, because evaluating text takes time when a bundle is loaded: no `from __future__ import annotations`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final, Literal

from skipstep.networks.spec import MAX_BATCH_SIZE, NetworkSpec
from skipstep.storage.untrusted import (
    ADDED_LATER,
    MAX_ITEMS,
    FileName,
    Key,
    Length,
    Sha256,
    Within,
)

SCHEMA: Final = 2
FILE_NAME: Final = "manifest.json"
SIGNATURE_NAME: Final = "manifest.sig"
MAX_BYTES: Final = 16 << 20

FileSize = Annotated[int, Within(0, 64 << 30)]
BatchSize = Annotated[int, Within(1, MAX_BATCH_SIZE)]
ScheduleNumber = Annotated[int, Within(0, MAX_ITEMS)]
Seed = Annotated[int, Within(0, 2**64 - 1)]
Label = Annotated[int, Within(0, 1 << 31)]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: how many bytes, and their sha256 in hexadecimal."""

    size: FileSize
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """A plan: its key, the options that make it (skipstep.plans.plan), and the number of its schedule.

    Its arrays are in the tables file (skipstep.bundles.tables).
    """

    key: Key
    schedule: ScheduleNumber
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SamplerEntry:
    """One plan's whole loop as one self-contained ONNX graph (skipstep.export.onnx_sampler), for other hosts.

    `plan` is the plan's key, `form` "loop" or "unrolled"; a `guided` one takes guidance_scale. `noise` is where a
    sample's noise comes from: its "seeds", on runtimes with operators of uint64, or "given" as x_T and noise.
    """

    file: FileName
    plan: Key
    form: Literal["loop", "unrolled"]
    guided: bool
    noise: Annotated[Literal["seeds", "given"], ADDED_LATER] = "given"


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """A TensorRT engine; `facts` is what its builder reports (skipstep.export.tensorrt_engine)."""

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
    """Samples that the builder drew: `file` holds x_0.

    `tolerance` bounds the root mean square of the difference of a later drawing, over the root mean square of x_0.
    """

    file: FileName
    plan: Key
    seeds: Annotated[tuple[Seed, ...], Length(1, 64)]
    class_labels: tuple[Label, ...] | None
    guidance_scale: Annotated[float, Within(-1e6, 1e6)] | None
    tolerance: Annotated[float, Within(0.0, 0.01)]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest.

    `graphs` names the files of the network's parts: plan, prompt and call where the network has them; always step, in
    float32; step-float16 or step-bfloat16 where a GPU target needs it; and those in 8 bits (skipstep.quantizing), of
    which `quantized` states the error, by the same names (skipstep.export.sensitivity.Choice). `defaults`, with
    `default_schedule`, are the options of the plan of a step count; None where the model has no scheduler
    configuration. `calibration` is the file of measured latencies (skipstep.latency.calibration), None for a bundle
    that was never calibrated. `pipeline` is the file that describes the parts around a network of latents
    (skipstep.pipelines.spec).
    """

    model: str
    digest: Sha256
    license: str
    network: NetworkSpec
    batch_sizes: Annotated[tuple[BatchSize, ...], Length(1)]
    plans: Annotated[tuple[PlanEntry, ...], Length(1)]
    graphs: Mapping[str, FileName]
    tables: FileName
    golden: GoldenEntry
    files: Mapping[str, FileEntry]
    tools: Mapping[str, str]
    partition: Mapping[str, Any]
    defaults: Mapping[str, Any] | None = None
    default_schedule: ScheduleNumber | None = None
    engines: tuple[EngineEntry, ...] = ()
    kernels: tuple[KernelEntry, ...] = ()
    samplers: tuple[SamplerEntry, ...] = ()
    calibration: Annotated[FileName | None, ADDED_LATER] = None
    pipeline: Annotated[FileName | None, ADDED_LATER] = None
    quantized: Annotated[Mapping[str, Any] | None, ADDED_LATER] = None
    schema: int = field(default=SCHEMA)

    def to_json(self) -> bytes:
        """The same manifest always gives the same bytes."""
        contents = asdict(self)
        # Bundles of networks without what came later are as they were.
        for name, unset in (("conditions", {}), ("time_input", "timestep"), ("state", "vp"), ("sigma_data", None)):
            if contents["network"][name] == unset:
                del contents["network"][name]
        for name in ("calibration", "pipeline", "quantized"):
            if contents[name] is None:
                del contents[name]  # What adds the field changes nothing else in the manifest.
        return (json.dumps(contents, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
