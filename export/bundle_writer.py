"""Writing a bundle (skipstep.bundles.bundle): everything is made, written, loaded and tried, then named.

A bundle takes its name in one step, after the engine that was loaded from it drew the golden samples again. Killed at
any moment before, the writer leaves what was there.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

from skipstep.backends.onnxruntime import LoopConstants
from skipstep.bundles.bundle import is_bundle
from skipstep.bundles.golden import GOLDEN_FILE, draw_golden, replay_golden
from skipstep.bundles.manifest import (
    FILE_NAME,
    SIGNATURE_NAME,
    KernelEntry,
    LoopEntry,
    Manifest,
    PlanEntry,
)
from skipstep.calls.conditioning import distinct
from skipstep.errors import InputError, StorageError
from skipstep.export.bundle_files import BundleFiles, package_version
from skipstep.export.engines import Progress, built_engines
from skipstep.export.graph_cost import costs_as_json, partition_costs
from skipstep.export.onnx_loop import build_loop
from skipstep.export.partition import Partition
from skipstep.export.targets import Targets
from skipstep.export.weight_storage import compress_weights
from skipstep.latency.calibration import FILE_NAME as CALIBRATION_NAME
from skipstep.latency.calibration import Calibration, write_calibrations
from skipstep.loading import load, plan_arrays
from skipstep.loops.loop_table import shared_features
from skipstep.plans.plan import Plan
from skipstep.plans.schedule import NoiseSchedule
from skipstep.plans.stages import Stages
from skipstep.storage.atomic import atomic_folder
from skipstep.version import __version__

if TYPE_CHECKING:
    from skipstep.engine import Engine

PRECISIONS = ("float32", "float16", "bfloat16")
_TABLES = "tables.safetensors"
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "triton", "tensorrt-rtx", "tensorrt", "numpy")


@dataclass(frozen=True, slots=True)
class BundleRequest:
    """What is wanted of a bundle; see Engine.save. `calibration` is what was measured of the engine, if anything."""

    name: str
    license: str
    targets: tuple[str, ...] = ("cpu",)
    precision: str = "float32"
    any_plan: bool = False
    overwrite: bool = False
    sign_key: str | os.PathLike[str] | None = None
    calibration: Calibration | None = None


def write_bundle(
    engine: Engine,
    parts: Partition,
    path: str | os.PathLike[str],
    request: BundleRequest,
    *,
    progress: Progress | None = None,
) -> None:
    """Write `engine`, whose network is `parts`, to the folder `path`. See Engine.save."""
    report = progress or (lambda message: None)
    targets = Targets.parse(request.targets)
    _check(engine, path, request)
    with atomic_folder(path, replace=request.overwrite) as folder:
        files = BundleFiles(folder)
        plans = tuple(engine.plans.values())
        schedules = _distinct_schedules(plans, engine.plan_defaults)
        files.add(_TABLES, _tables(engine, parts, plans, schedules))
        graphs = _network_graphs(files, parts, targets, request.precision)
        loops = _loops(files, engine, parts, plans, request)
        engines = []
        for target in targets.engines:
            step = (folder / graphs["step"]).read_bytes()
            for entry, data in built_engines(
                step, target, engine.network, engine.batch_sizes, request.precision, report
            ):
                files.add(entry.file, data)
                engines.append(entry)
        kernels = _kernels(files, engine, plans, targets, request, report) if targets.kernels else []
        if targets.server:
            _server(files, engine, parts, plans, request, report)
        report("golden samples")
        golden, arrays = draw_golden(engine)
        files.add(GOLDEN_FILE, save_arrays(arrays))
        calibration = None
        if request.calibration is not None:
            measured = request.calibration.only(engine.plans)
            calibration = files.add(CALIBRATION_NAME, write_calibrations([measured]))
        defaults = {name: value for name, value in engine.plan_defaults.items() if name != "schedule"}
        schedule = engine.plan_defaults.get("schedule")
        manifest = Manifest(
            model=request.name,
            digest=_digest(parts),
            license=request.license,
            network=engine.network,
            batch_sizes=engine.batch_sizes,
            plans=tuple(PlanEntry(plan.key, schedules.index(plan.schedule), plan.options()) for plan in plans),
            graphs=graphs,
            loops=tuple(loops),
            tables=_TABLES,
            golden=golden,
            files=files.entries,
            tools=_tools(),
            partition=costs_as_json(partition_costs(parts)),
            defaults=None if schedule is None else defaults,
            default_schedule=None if schedule is None else schedules.index(schedule),
            engines=tuple(engines),
            kernels=tuple(kernels),
            calibration=calibration,
        )
        data = manifest.to_json()
        (folder / FILE_NAME).write_bytes(data)
        if request.sign_key is not None:
            from skipstep.storage.signature import sign

            (folder / SIGNATURE_NAME).write_bytes(sign(data, request.sign_key))
        report("replay")
        replay_golden(load(folder), manifest.golden, arrays)


def _check(engine: Engine, path: str | os.PathLike[str], request: BundleRequest) -> None:
    if request.precision not in PRECISIONS:
        raise InputError(
            got=f"precision={request.precision!r}",
            expected=f"one of {', '.join(PRECISIONS)}",
            remedy="use float16 for GPUs, unless the network overflows in it",
        )
    if not request.license.strip():
        raise InputError(
            got="no licence of the weights",
            expected="an SPDX expression, or the terms in words",
            remedy="pass license='Apache-2.0', or what the weights came with",
        )
    if not engine.plans:
        raise InputError(got="an engine without plans", expected="at least one", remedy="call add_plan first")
    if Path(path).exists() and not (request.overwrite and is_bundle(path)):
        raise StorageError(
            got=f"something at {path} already",
            expected="a free name" + (", or a bundle to replace" if request.overwrite else ""),
            remedy="choose another name" + ("" if request.overwrite else ", or allow a bundle to be overwritten"),
        )


def _distinct_schedules(plans: tuple[Plan, ...], defaults: Mapping[str, Any]) -> list[NoiseSchedule]:
    schedules = [plan.schedule for plan in plans]
    if "schedule" in defaults:
        schedules.append(defaults["schedule"])
    return list(dict.fromkeys(schedules))


def _tables(engine: Engine, parts: Partition, plans: tuple[Plan, ...], schedules: list[NoiseSchedule]) -> bytes:
    constants = LoopConstants(parts.graphs.before_loop, engine.network)
    arrays: dict[str, NDArray[Any]] = {f"schedule/{i}": each.alpha_bar for i, each in enumerate(schedules)}
    for plan in plans:
        arrays |= plan_arrays(plan, constants.tables_at(distinct(plan.evaluation_timesteps)[0]))
    return save_arrays(arrays)


def _network_graphs(files: BundleFiles, parts: Partition, targets: Targets, precision: str) -> dict[str, str]:
    graphs = {
        part: files.add_graph(f"network/{part}.onnx", compress_weights(graph))
        for part, graph in parts.graphs.before_loop.items()
    }
    if targets.engines or targets.step_network:
        step = parts.graphs.step
        if precision != "float32":
            from skipstep.export.precision import lower_precision
            from skipstep.export.precision_check import check_precision

            dtype: Literal["float16", "bfloat16"] = "float16" if precision == "float16" else "bfloat16"
            exact, step = step, lower_precision(step, dtype)
            check_precision(step, exact, dtype)
        graphs["step"] = files.add_graph(f"network/step-{precision}.onnx", step)
    return graphs


def _loops(
    files: BundleFiles, engine: Engine, parts: Partition, plans: tuple[Plan, ...], request: BundleRequest
) -> list[LoopEntry]:
    stages = [Stages.of([plan]) for plan in plans]
    features = shared_features(engine.network, stages, any_plan=request.any_plan)
    return [
        LoopEntry(
            files.add_graph(
                f"cpu/loop{f'-{i}' if i else ''}.onnx", compress_weights(build_loop(parts, engine.network, each))
            ),
            each,
        )
        for i, each in enumerate(features)
    ]


def _kernels(
    files: BundleFiles,
    engine: Engine,
    plans: tuple[Plan, ...],
    targets: Targets,
    request: BundleRequest,
    report: Progress,
) -> list[KernelEntry]:
    from skipstep.export.cubins import compile_step_kernels, needed_variants

    report("step kernels for " + ", ".join(f"sm_{each}" for each in targets.kernels))
    variants = needed_variants(
        [flags for plan in plans for flags in plan.stage_flags],
        guided=engine.network.can_guide,
        wide_output=engine.network.learns_variance,
        rescale=request.any_plan,
    )
    binaries = compile_step_kernels(
        targets.kernels, variants, [request.precision], num_elements=engine.network.num_elements
    )
    entries = []
    for binary in binaries:
        facts = binary.facts.to_json()
        digest = hashlib.sha256(binary.cubin).hexdigest()[:12]
        name = files.add(f"kernels/sm_{binary.facts.architecture}-{request.precision}-{digest}.cubin", binary.cubin)
        entries.append(KernelEntry(name, facts))
    return entries


def _server(
    files: BundleFiles,
    engine: Engine,
    parts: Partition,
    plans: tuple[Plan, ...],
    request: BundleRequest,
    report: Progress,
) -> None:
    from skipstep.export.onnx_sampler import build_sampler
    from skipstep.export.triton_server import model_repository

    report("model repository")
    graphs = {
        f"{request.name}-{plan.steps}-{plan.key}": build_sampler(
            parts, engine.network, plan, batch_size=None, guided=engine.network.can_guide
        )
        for plan in plans
    }
    for name, data in model_repository(graphs).items():
        files.add(f"server/{name}", data)


def _digest(parts: Partition) -> str:
    """sha256 over the network's graphs, weights included."""
    digest = hashlib.sha256()
    for name, graph in sorted({**parts.graphs.before_loop, "step": parts.graphs.step}.items()):
        digest.update(f"{name} {len(graph)} ".encode())
        digest.update(graph)
    return digest.hexdigest()


def _tools() -> dict[str, str]:
    found = {name: package_version(name) for name in _TOOLS}
    return {"skipstep": __version__, "python": platform.python_version(), **{n: v for n, v in found.items() if v}}
