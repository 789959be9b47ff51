"""What is asked of a bundle's writer, and everything about it that can be wrong before the network is looked at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipstep.backends.denoiser import EIGHT_BITS
from skipstep.backends.tensorrt_options import DEFAULTS, OPTIONS_REMEDY, TensorRTOptions, check_library_options
from skipstep.bundles.bundle import is_bundle
from skipstep.errors import InputError, StorageError, check_choice, check_flag, check_path, check_text, check_type
from skipstep.export.targets import Targets
from skipstep.latency.calibration import Calibration
from skipstep.storage.atomic import check_writable

PRECISIONS = ("float32", "float16", "bfloat16", *EIGHT_BITS)


@dataclass(frozen=True, slots=True)
class QuantizedStep:
    """A step network in 8 bits, and what a manifest states of it (skipstep.export.sensitivity.Choice.facts)."""

    graph: bytes
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BundleRequest:
    """The options of Engine.save. `calibration` is what was measured of the engine, if anything; `quantized` are
    step networks in 8 bits, by form (skipstep.quantizing)."""

    name: str
    license: str
    notice: str | os.PathLike[str] | None = None
    targets: Iterable[str] = ("cpu",)
    precision: str = "float32"
    tensorrt: TensorRTOptions = DEFAULTS
    overwrite: bool = False
    sign_key: str | os.PathLike[str] | None = None
    calibration: Calibration | None = None
    quantized: Mapping[str, QuantizedStep] = field(default_factory=dict)


def check_request(path: str | os.PathLike[str], request: BundleRequest) -> Targets:
    """Everything about a request that can be wrong without looking at the engine; its targets. Raises InputError and
    StorageError."""
    check_path("path", path)
    remedy = "use float16 for GPUs, unless the network overflows in it"
    check_choice("precision", request.precision, PRECISIONS, remedy=remedy)
    check_flag("overwrite", request.overwrite)
    check_text("name", request.name)
    targets = Targets.parse(request.targets)
    if request.precision == "fp8" and not (targets.engines or targets.step_network or targets.trtexec):
        raise InputError(
            got="precision='fp8' without a target that computes in it",
            expected="TensorRT, as in targets=['rtx:sm89']",
            remedy="name such a target, or pass precision='int8', which the CPU computes in, too",
        )
    check_type("tensorrt", request.tensorrt, TensorRTOptions, remedy=OPTIONS_REMEDY)
    if request.tensorrt != DEFAULTS and not targets.engines:
        raise InputError(
            got="tensorrt= without a target whose engines are built now",
            expected="such a target, as in targets=['rtx:sm89']",
            remedy="name one, or give the options to skipstep build, which builds on the device",
        )
    check_library_options(request.tensorrt, "tensorrt_rtx")
    for target in targets.engines:
        target.check(request.precision)
    if request.sign_key is not None:
        from skipstep.storage.signature import sign

        sign(b"", request.sign_key)  # Now, because a key that cannot sign shows only when it does.
    if not check_text("license", request.license).strip():
        raise InputError(
            got="no licence of the weights",
            expected="an SPDX expression, or the terms in words",
            remedy="pass license='Apache-2.0', or what the weights came with",
        )
    if request.notice is not None and not os.path.isfile(check_path("notice", request.notice)):
        raise InputError(
            got=f"notice={str(request.notice)!r:.200}, which is no file",
            expected="a text file",
            remedy="check the path",
        )
    check_writable(Path(path).absolute().parent, may_be_missing=False)
    if Path(path).exists() and not (request.overwrite and is_bundle(path)):
        raise StorageError(
            got=f"something at {path} already",
            expected="a free name" + (", or a bundle to replace" if request.overwrite else ""),
            remedy="choose another name" + ("" if request.overwrite else ", or allow a bundle to be overwritten"),
        )
    return targets
