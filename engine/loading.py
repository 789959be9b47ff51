"""From a bundle on disk to an engine: on the CPU with ONNX Runtime, or on a GPU with its TensorRT engines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from skipstep.bundles.bundle import Bundle, open_bundle
from skipstep.bundles.manifest import PlanEntry
from skipstep.calls.conditioning import distinct
from skipstep.errors import BundleError, InputError, MissingDependencyError, PlanError, ScheduleError
from skipstep.networks.spec import network_batch_sizes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from skipstep.backends.onnxruntime import LoopConstants
    from skipstep.engine import Engine
    from skipstep.latency.identity import DeviceIdentity
    from skipstep.loops.captured import CudaLoop, Lane
    from skipstep.plans.plan import Plan
    from skipstep.plans.schedule import NoiseSchedule

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
    if not (on_gpu or device == "cpu") or (not on_gpu and (loop not in ("auto", "onnx") or require_captured)):
        raise InputError(
            got=f"device={device!r}, loop={loop!r}" + (", require_captured=True" if require_captured else ""),
            expected="'cuda', the first GPU, or 'cpu', which runs the whole loop as one graph",
            remedy="pass device='cuda', or leave the others out",
        )
    bundle = open_bundle(path, require_signature=require_signature, allow_hard_links=allow_hard_links)
    try:
        from skipstep.backends.onnxruntime import LoopConstants, make_session
        from skipstep.loops.loop_sessions import LoopSessions
    except ImportError as error:
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="onnxruntime, which runs bundles on the CPU and computes their tables for a GPU",
            remedy="pip install 'skipstep[cpu]'",
        ) from error

    manifest = bundle.manifest
    held = {entry.features: entry.file for entry in manifest.loops}
    sessions = LoopSessions(
        lambda features: make_session(bundle.read_graph(held[features]), num_threads=num_threads), tuple(held)
    )
    if not on_gpu:
        # The longest part of loading, while the rest, imports included, goes on here.
        sessions.prefetch(manifest.loops[0].features)
    from skipstep.engine import Engine

    graphs = {part: bundle.read_graph(manifest.graphs[part]) for part in _PARTS if part in manifest.graphs}
    arrays = bundle.read_arrays(manifest.tables)
    schedules = stored_schedules(arrays)
    plans = [_stored_plan(entry, schedules, arrays) for entry in manifest.plans]
    constants = LoopConstants(
        graphs,
        manifest.network,
        num_threads,
        tables={distinct(plan.evaluation_timesteps)[0].tobytes(): _values(plan.key, arrays) for plan in plans},
    )
    defaults = {}
    if manifest.defaults is not None and manifest.default_schedule is not None:
        defaults = {**manifest.defaults, "schedule": _schedule(schedules, manifest.default_schedule)}
    options: dict[str, Any] = {
        "batch_sizes": manifest.batch_sizes,
        "plan_defaults": defaults,
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
        from skipstep.loops.graph_loop import GraphLoop

        one_graph = {0: GraphLoop(sessions, constants, manifest.network)}
        engine = Engine(
            manifest.network, loops=one_graph, backend="onnxruntime", device="cpu", any_batch=True, **options
        )
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

    return device_identity(backend="onnxruntime", loop="onnx", device="cpu", num_threads=num_threads)


_PARTS = ("plan", "prompt", "call")


def plan_arrays(plan: Plan, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What the tables file holds of a plan; `values` are those of its distinct timesteps, in order."""
    return {
        f"{plan.key}/coefficients": plan.coefficients,
        f"{plan.key}/timesteps": plan.evaluation_timesteps,
        **{f"{plan.key}/values/{name}": array for name, array in values.items()},
    }


def stored_schedules(arrays: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The schedules of a tables file: alpha_bar float64 `[T]` each, by number."""
    count = sum(name.startswith("schedule/") for name in arrays)
    return [arrays[f"schedule/{i}"] for i in range(count) if f"schedule/{i}" in arrays]


def _schedule(schedules: list[NDArray[Any]], number: int) -> NoiseSchedule:
    from skipstep.plans.schedule import NoiseSchedule

    if number >= len(schedules):
        raise _mismatch(f"schedule {number} of {len(schedules)}")
    try:
        return NoiseSchedule(schedules[number], name="stored")
    except ScheduleError as error:
        raise _mismatch(error.got) from error


def _stored_plan(entry: PlanEntry, schedules: list[NDArray[Any]], arrays: Mapping[str, NDArray[Any]]) -> Plan:
    from skipstep.plans.plan import Plan

    try:
        plan = Plan(schedule=_schedule(schedules, entry.schedule), **entry.options)
        stored = plan.with_tables(arrays[f"{entry.key}/coefficients"], arrays[f"{entry.key}/timesteps"])
    except (PlanError, TypeError, KeyError) as error:
        raise _mismatch(f"plan {entry.key}: {error}") from error
    if stored.key != entry.key:
        raise _mismatch(f"plan {entry.key} whose tables have the key {stored.key}")
    return stored


def _values(key: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    prefix = f"{key}/values/"
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _mismatch(got: str) -> BundleError:
    return BundleError(
        got=f"a manifest and tables that do not belong together: {got}",
        expected="plans and the tables that they were exported with",
        remedy="export the bundle again with this version of skipstep",
    )
