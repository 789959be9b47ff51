"""From an engine to a bundle on disk. A function over an engine, which is a method of `skipstep.Engine`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from skipstep.backends.denoiser import NetworkSource
from skipstep.backends.tensorrt_options import DEFAULTS, TensorRTOptions
from skipstep.errors import InputError
from skipstep.loops.contract import Sampler
from skipstep.loops.runner import CompiledNetwork
from skipstep.reporting import reporter

if TYPE_CHECKING:
    from skipstep.latency.calibration import Calibration
    from skipstep.model_source import GraphSource
    from skipstep.networks.lora_layers import Loras


class Savable(Sampler, Protocol):
    """An engine that knows its source, and whose class makes an engine of a loaded network."""

    source: NetworkSource
    backend: str
    precision: str
    calibration: Calibration | None
    loras: Loras | None

    def __new__(cls, compiled: CompiledNetwork) -> Self: ...


def save(
    engine: Savable,
    path: str | os.PathLike[str],
    *,
    license: str,
    name: str | None = None,
    notice: str | os.PathLike[str] | None = None,
    targets: Iterable[str] = ("cpu",),
    precision: str = "float32",
    calibration: Iterable[int] | str | os.PathLike[str] | None = None,
    tensorrt: TensorRTOptions = DEFAULTS,
    overwrite: bool = False,
    sign_key: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write this engine, with its plans, as a bundle that `skipstep.load` runs without torch.

    license     of the weights, as an SPDX expression or in words: it travels with them.
    name        of the model; the checkpoint folder's or the module's class where left out.
    notice      a text file that travels with the weights as NOTICE.txt, such as the attribution that they need.
    targets     "cpu"; "rtx:sm86" and the like; "sm_87" for step kernels; "tensorrt" for the graph of which skipstep
                build makes an engine on its device; "onnx-loop" and "onnx-unrolled" for whole loops as ONNX graphs;
                "server" for a Triton Inference Server repository; "trtexec" for TensorRT's own tools
                (skipstep.export.targets).
    precision   of the network for GPUs: "float32", "float16", "bfloat16", "int8" or "fp8". The CPU's is float32; with
                "int8" the bundle also holds networks in int8 for the CPU, for load(precision="int8").
    calibration as for Engine.build, with "int8" and "fp8".
    tensorrt    of the engines of "rtx:sm86" and the like.
    sign_key    an Ed25519 private key to sign the manifest with (skipstep.storage.signature).

    The bundle is loaded and draws the golden samples again before it takes its name; an existing one is replaced only
    with `overwrite`, and only by a whole one. Raises ExportError, StorageError, InputError.
    """
    report = reporter(progress)
    if engine.loras is not None:
        raise InputError(
            got="an engine with room for LoRAs to swap, to be saved",
            expected="one whose LoRAs are fused: a bundle's weights are its own",
            remedy="build it with loras= and without lora_rank=",
        )
    if engine.runner.loop.device == "cpu" and engine.precision != "float32":
        raise InputError(
            got=f"an engine in {engine.precision} to be saved",
            expected="one in float32: it draws the golden samples, which every machine compares its own with",
            remedy="build it without precision=, and save it with precision='int8' and calibration="
            if engine.precision == "int8"
            else f"build it without precision=, and call skipstep.load(path, precision={engine.precision!r}, "
            f"backend={engine.backend!r}) where the bundle is used",
        )
    from skipstep.bundle_source import load_network
    from skipstep.model_source import save_bundle
    from skipstep.quantizing import check_calibration, quantize_source

    calibration = check_calibration(precision, calibration)

    def open_again(folder: Path) -> Sampler:
        return type(engine)(load_network(folder))

    def quantize(source: GraphSource, forms: Iterable[str]) -> Mapping[str, Any]:
        plans = list(engine.plans.values())
        return quantize_source(source, plans, calibration, forms, sampler=type(engine), report=report)

    save_bundle(
        engine,
        engine.source,
        path,
        open_again=open_again,
        quantize=None if calibration is None else quantize,
        progress=report,
        name=engine.source.name if name is None else name,
        license=license,
        notice=notice,
        targets=targets,
        precision=precision,
        tensorrt=tensorrt,
        overwrite=overwrite,
        sign_key=sign_key,
        calibration=engine.calibration,
    )
