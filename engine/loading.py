"""skipstep.load: from a bundle on disk to an engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypedDict, Unpack

from skipstep.bundle_source import load_network

if TYPE_CHECKING:
    from skipstep.engine import Engine


class LoadOptions(TypedDict, total=False):
    """How a bundle is loaded; each may be left out.

    device             "cpu", or "cuda" or "cuda:1" for a GPU, which takes the engines that were built for it (skipstep
                       build).
    runtime            on a GPU "torch", or "edge": the driver alone, with the bundle's compiled kernels, for machines
                       without torch and Triton. "auto" is "torch" where torch is installed.
    backend            on the CPU "onnxruntime" or "openvino", or "webgpu" for a GPU under a CPU loop; "auto": the first
                       of those two that is installed. On a GPU "tensorrt".
    precision          of the network on the CPU: "float32" (also "auto"), or with openvino "bfloat16", on a processor
                       that has it. On a GPU that of the bundle's engines.
    library            on a GPU "tensorrt" or "tensorrt_rtx"; None: the one that is installed and has engines here.
    loop, require_captured
                       on a GPU, as for Engine.build.
    num_threads        of ONNX Runtime and OpenVINO on the CPU; None: every core that the process may use.
    require_signature  the public key that must have signed the bundle.
    allow_hard_links   for folders that a package manager fills by linking.
    """

    device: str
    runtime: str
    backend: str
    precision: str
    library: str | None
    loop: str
    require_captured: bool
    num_threads: int | None
    require_signature: str | os.PathLike[str] | None
    allow_hard_links: bool


def load(path: str | os.PathLike[str], *, compile_on_miss: bool = False, **options: Unpack[LoadOptions]) -> Engine:
    """An engine from the bundle at `path`: with ONNX Runtime or OpenVINO on the CPU, with TensorRT on
    a GPU.

    options: device, num_threads, require_signature and so on: LoadOptions.

    It holds the bundle's plans; others can be added, because the network's time path is in the bundle. It is calibrated
    if the bundle was, on a device like this one. Raises BundleError and its kinds, MissingDependencyError, and on a GPU
    DeviceUnavailableError where the bundle has no engine for it; on the CPU where the processor lacks the precision.
    """
    compiled = load_network(path, compile_on_miss=compile_on_miss, **options)
    from skipstep.engine import Engine  # While the runtime loads its session in the background.

    engine = Engine(compiled)
    if engine.device != "cpu":
        try:
            engine.prepare()
        except BaseException:
            engine.close()  # What it has taken on the device is given back.
            raise
    return engine
