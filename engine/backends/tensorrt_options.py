"""How TensorRT builds an engine: what users of its builder expect to choose, where the library has it.

Of TensorRT-RTX 1.7 found by building (tests/export/test_tensorrt_options.py): it builds the same bytes at every
optimisation level, runs in one stream, measures nothing, and compiles engines with weights to be replaced on a GPU
alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstep.errors import InputError, check_flag, check_integer, check_path
from skipstep.storage.atomic import check_writable, storage_errors

if TYPE_CHECKING:
    from skipstep.backends.denoiser import Library

HIGHEST_LEVEL = 5
MOST_STREAMS = 64
OPTIONS_REMEDY = "pass skipstep.TensorRTOptions(optimization_level=4) or the like, or leave it out"
_LACKS: Mapping[str, Mapping[str, str]] = {
    "tensorrt_rtx": {
        "optimization_level": "builds the same engine at every level",
        "aux_streams": "runs an engine in one stream",
        "timing_cache": "measures nothing while it builds",
    }
}


@dataclass(frozen=True, slots=True)
class TensorRTOptions:
    """Options of the builder; what is left out is the library's own choice.

    optimization_level  0, which builds fastest, to 5, which searches longest for fast kernels. Full TensorRT only.
    aux_streams         streams beside the caller's that an engine may launch kernels on. 0: one after the other, as a
                        recorded loop runs best. More: full TensorRT only.
    workspace_bytes     memory that a kernel may use, at most.
    weight_streaming    weights are in host memory and copied in parts: for networks larger than the GPU's memory. Such
                        an engine of TensorRT-RTX cannot be recorded into a loop of one launch.
    refit               weights can be replaced in a built engine, as for a LoRA: by TensorRT's IRefitter.
    strip               the engine holds no weights; it gets those of the step network when it is loaded, which takes
                        the package onnx.
    timing_cache        a file that kernel timings are read from and written to, beside the user's cache. Full TensorRT
                        only.
    """

    optimization_level: int | None = None
    aux_streams: int = 0
    workspace_bytes: int | None = None
    weight_streaming: bool = False
    refit: bool = False
    strip: bool = False
    timing_cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("optimization_level", 0, HIGHEST_LEVEL),
            ("aux_streams", 0, MOST_STREAMS),
            ("workspace_bytes", 1, 2**63 - 1),
        ):
            value = getattr(self, name)
            if value is not None or name == "aux_streams":
                checked = check_integer(
                    name, value, low=low, high=high, remedy=f"leave {name} out, or pass such a number"
                )
                object.__setattr__(self, name, checked)
        for name in ("weight_streaming", "refit", "strip"):
            check_flag(name, getattr(self, name))
        if self.timing_cache is not None and Path(check_path("timing_cache", self.timing_cache)).is_dir():
            raise InputError(
                got=f"timing_cache={os.fspath(self.timing_cache)!r}, a folder",
                expected="a file, which need not exist",
                remedy="name a file in it",
            )


DEFAULTS = TensorRTOptions()


def check_library_options(options: TensorRTOptions, library: Library) -> None:
    """Raise InputError for an option that this library does not have."""
    for name, why in _LACKS.get(library, {}).items():
        value = getattr(options, name)
        if value != getattr(DEFAULTS, name):
            raise InputError(
                got=f"{name}={value!r} for {library}, which {why}",
                expected="options that the library has",
                remedy=f"leave {name} out, or build with full TensorRT on the device, target tensorrt",
            )


def builder_options(options: TensorRTOptions) -> dict[str, Any]:
    """All that an engine depends on: timings decide between kernels that compute the same."""
    return {name: value for name, value in asdict(options).items() if name != "timing_cache"}


def read_timings(options: TensorRTOptions) -> bytes | None:
    """None where there are none yet. Raises StorageError, also where none can be written."""
    if options.timing_cache is None:
        return None
    file = Path(options.timing_cache)
    check_writable(file.absolute().parent, may_be_missing=False)
    with storage_errors(file):
        return file.read_bytes() if file.exists() else None
