"""From a bundle on disk to an engine: on the CPU with ONNX Runtime, or on a GPU with its TensorRT engines."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from skipstep.bundles.bundle import Bundle, open_bundle
from skipstep.calls.distinct import distinct
from skipstep.errors import InputError, MissingDependencyError
from skipstep.networks.spec import network_batch_sizes

if TYPE_CHECKING:
    from skipstep.backends.onnxruntime import LoopConstants
    from skipstep.engine import Engine
    from skipstep.latency.identity import DeviceIdentity
    from skipstep.loops.captured import CudaLoop, Lane

_PARTS = ("plan", "prompt", "call")


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    loop: str = "auto",
    require_captured: bool = False,
    num_threads: int | None = None,
    require_signature: str | os.PathLike[str] | None = None,
    allow_hard_links: bool = False,
    compile_on_miss: bool = False,
) -> Engine:
    """An engine from the bundle at `path`: with ONNX Runtime on the CPU, with TensorRT on a GPU.

    device   "cpu", or "cuda" for the first GPU, which takes torch and the engines that were built for it
             (skipstep build); `loop` and `require_captured` are then as for Engine.build.

    It holds the bundle's plans; others can be added as the network's time path is there too. It is calibrated if the
    bundle was, on a device like this one. Raises BundleError and its kinds, MissingDependencyError, and on a GPU
    DeviceUnavailableError where there is no engine for it.
    """
    on_gpu = device in ("cuda", "cuda:0")
    if not (on_gpu or device == "cpu") or (not on_gpu and (loop not in ("auto", "stepwise") or require_captured)):
        raise InputError(
            got=f"device={device!r}, loop={loop!r}" + (", require_captured=True" if require_captured else ""),
            expected="'cuda', the first GPU, or 'cpu' with loop='stepwise'",
            remedy="pass device='cuda', or leave the others out",
        )
    bundle = open_bundle(path, require_signature=require_signature, allow_hard_links=allow_hard_links)
    try:
        from skipstep.backends.onnxruntime import LoopConstants, OnnxRuntimeDenoiser, make_session
    except ImportError as error:
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="onnxruntime, which runs bundles on the CPU and computes their tables for a GPU",
            remedy="pip install 'skipstep[cpu]'",
        ) from error

    manifest = bundle.manifest
    from skipstep.bundles.tables import default_options, plan_values, read_plans
    from skipstep.engine import Engine

    graphs = {part: bundle.read_graph(manifest.graphs[part]) for part in _PARTS if part in manifest.graphs}
    arrays = bundle.read_arrays(manifest.tables)
    plans = read_plans(manifest, arrays)
    constants = LoopConstants(
        graphs,
        manifest.network,
        num_threads,
        tables={distinct(plan.evaluation_timesteps)[0].tobytes(): plan_values(plan, arrays) for plan in plans},
    )
    options: dict[str, Any] = {
        "batch_sizes": manifest.batch_sizes,
        "plan_defaults": default_options(manifest, arrays),
        "compile_on_miss": compile_on_miss,
        "num_threads": num_threads,
    }
    if on_gpu:
        loops, lane = _device_loops(bundle, constants, loop=loop, required=require_captured)
        engine = Engine(
            manifest.network,
            loops=loops,
            backend="tensorrt",
            device=str(lane.device.torch_device),
            precision=next(entry.precision for entry in manifest.engines),
            lifecycle=lane.lifecycle,
            lane=lane,
            **options,
        )
    else:
        from skipstep.loops.stepwise import HostLoop

        step = make_session(bundle.read_graph(manifest.graphs["step"]), num_threads=num_threads)
        host_loops = {
            size: HostLoop(OnnxRuntimeDenoiser(step, constants, manifest.network, batch_size=size), manifest.network)
            for size in network_batch_sizes(manifest.network, manifest.batch_sizes)
        }
        engine = Engine(manifest.network, loops=host_loops, backend="onnxruntime", device="cpu", **options)
    for plan in plans:
        engine.add_plan(plan)
    if manifest.calibration is not None:
        from skipstep.latency.calibration import matching, read_calibrations

        engine.calibration = matching(read_calibrations(bundle.read(manifest.calibration)), engine.identity())
    if on_gpu:
        engine.prepare()
    return engine


def _device_loops(
    bundle: Bundle, constants: LoopConstants, *, loop: str, required: bool
) -> tuple[dict[int, CudaLoop], Lane]:
    """Loops on the first GPU, from the bundle's engines for it."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            got="no package torch", expected="torch, which holds memory on a GPU", remedy="pip install 'skipstep[gpu]'"
        ) from error
    from skipstep.backends.tensorrt import denoisers_from_bundle
    from skipstep.building import resolve_loop
    from skipstep.cuda.device import CudaDevice
    from skipstep.loops.captured import Lane
    from skipstep.loops.lifecycle import Lifecycle
    from skipstep.loops.network_loops import make_device_loops

    wanted = resolve_loop(loop, "tensorrt", device="cuda")
    network, batch_sizes = bundle.manifest.network, bundle.manifest.batch_sizes
    sizes = network_batch_sizes(network, batch_sizes)
    first = torch.device("cuda", 0)
    # The device is probed before anything of TensorRT or CUDA is touched.
    denoisers = denoisers_from_bundle(bundle, constants, sizes, device=first)
    lane = Lane(CudaDevice(first), Lifecycle())
    return make_device_loops(denoisers, network, lane, batch_sizes, wanted=wanted, required=required), lane


def loaded_identity(*, num_threads: int | None = None) -> DeviceIdentity:
    """What must be equal for latencies to count for an engine that is loaded here."""
    import onnxruntime  # noqa: F401  # Its version is part of it.

    from skipstep.latency.identity import device_identity

    return device_identity(backend="onnxruntime", loop="stepwise", device="cpu", num_threads=num_threads)
