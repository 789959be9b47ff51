"""Writing a bundle (skipstep.bundles.bundle): everything is made, written, loaded and compared, then named.

A bundle takes its name in one step, after the engine that was loaded from it has drawn the golden samples again. If the
writer is killed at any moment before, what was there under this name stays.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

from skipstep.backends.denoiser import tensor_dtype
from skipstep.backends.onnxruntime import EarlyGraphs
from skipstep.bundles.golden import GOLDEN_FILE, draw_golden, replay_golden
from skipstep.bundles.manifest import FILE_NAME, SIGNATURE_NAME, KernelEntry, Manifest, PlanEntry, SamplerEntry
from skipstep.bundles.tables import FILE_NAME as TABLES_NAME
from skipstep.bundles.tables import write_tables
from skipstep.calls.conditioning import distinct
from skipstep.errors import InputError
from skipstep.export.bundle_files import BundleFiles, package_version
from skipstep.export.engines import Progress, built_engines
from skipstep.export.graph_cost import costs_as_json, partition_costs
from skipstep.export.large_model import refuse_large
from skipstep.export.onnx_sampler import MOST_UNROLLED, Form, Noise, build_sampler, check_unrolled
from skipstep.export.precision_check import step_graph
from skipstep.export.request import BundleRequest
from skipstep.export.targets import Targets
from skipstep.export.trtexec import check_trtexec, trtexec_files
from skipstep.export.weight_storage import compress_weights
from skipstep.latency.calibration import FILE_NAME as CALIBRATION_NAME
from skipstep.latency.calibration import write_calibrations
from skipstep.loops.contract import Sampler
from skipstep.networks.graphs import Partition
from skipstep.networks.large_graph import graph_sha256, weights_of
from skipstep.storage.atomic import atomic_folder
from skipstep.version import __version__

_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "triton", "tensorrt-rtx", "tensorrt", "numpy")


def check_engine(engine: Sampler, targets: Targets) -> None:
    """What can be known to fail before the network is exported. Raises InputError and PlanError."""
    if not engine.plans:
        raise InputError(got="an engine without plans", expected="at least one", remedy="call add_plan first")
    if targets.trtexec:
        check_trtexec(engine.network, engine.plans.values())
    if targets.onnx_unrolled:
        check_unrolled(engine.plans.values())


def write_bundle(
    engine: Sampler,
    parts: Partition,
    path: str | os.PathLike[str],
    request: BundleRequest,
    targets: Targets,
    *,
    open_again: Callable[[Path], Sampler],
    progress: Progress | None = None,
) -> None:
    """Write `engine`, whose network is `parts`, to the folder `path`. See Engine.save.

    `open_again` loads the bundle at a path, as skipstep.load does.
    """
    with atomic_folder(path, replace=request.overwrite) as folder:
        draft = _BundleDraft(engine, parts, request, targets, BundleFiles(folder), progress or (lambda message: None))
        manifest, golden = draft.write()
        data = manifest.to_json()
        (folder / FILE_NAME).write_bytes(data)
        if request.sign_key is not None:
            from skipstep.storage.signature import sign

            (folder / SIGNATURE_NAME).write_bytes(sign(data, request.sign_key))
        draft.report("replay")
        replay_golden(open_again(folder), manifest.golden, golden)


@dataclass(frozen=True, slots=True)
class _BundleDraft:
    """A bundle that is being written: each method writes files of one kind and returns their manifest entries."""

    engine: Sampler
    parts: Partition
    request: BundleRequest
    targets: Targets
    files: BundleFiles
    report: Progress

    def write(self) -> tuple[Manifest, dict[str, NDArray[Any]]]:
        """Every file but the manifest and its signature: the manifest, and the golden samples."""
        engine, request, network = self.engine, self.request, self.engine.network
        plans = list(engine.plans.values())
        targets = self.targets
        if targets.trtexec or targets.onnx_loop or targets.onnx_unrolled or targets.server:
            remedy = "leave onnx-loop, onnx-unrolled, server and trtexec out of targets"
            refuse_large(self.parts.graphs.step, "whole loops and files for trtexec of a network", remedy)
        defaults = dict(engine.plan_defaults)
        default_schedule = defaults.pop("schedule", None)
        schedules = list(dict.fromkeys(each for each in (*(p.schedule for p in plans), default_schedule) if each))
        inputs = EarlyGraphs(self.parts.graphs.before_loop, network)
        # Where there may be no torch, there need be no ONNX Runtime either.
        stored = inputs.of_labels if targets.kernels else inputs.tables_at
        values = [(plan, stored(distinct(plan.evaluation_timesteps)[0])) for plan in plans]
        self.files.add(TABLES_NAME, write_tables(schedules, values))
        graphs, step = self._network()
        engines = []
        for target in self.targets.engines:
            built = built_engines(
                step, target, network, engine.batch_sizes, request.precision, self.report, options=request.tensorrt
            )
            for entry, data in built:
                self.files.add(entry.file, data)
                engines.append(entry)
        kernels = self._kernels() if self.targets.kernels else []
        samplers = self._samplers("loop", "seeds") if self.targets.onnx_loop else []
        if self.targets.onnx_unrolled:
            samplers += self._samplers("unrolled", "given")
        if self.targets.server:
            self._server()
        if self.targets.trtexec:
            self._trtexec(step)
        pipeline = self._pipeline()
        if request.notice is not None:
            self.files.add("NOTICE.txt", Path(request.notice).read_bytes())
        self.report("golden samples")
        golden, arrays = draw_golden(engine)
        self.files.add(GOLDEN_FILE, save_arrays(arrays))
        calibration = None
        if request.calibration is not None:
            measured = write_calibrations([request.calibration.only(engine.plans)])
            calibration = self.files.add(CALIBRATION_NAME, measured)
        manifest = Manifest(
            model=request.name,
            digest=_digest(self.parts),
            license=request.license,
            network=network,
            batch_sizes=engine.batch_sizes,
            plans=tuple(PlanEntry(plan.key, schedules.index(plan.schedule), plan.options()) for plan in plans),
            graphs=graphs,
            tables=TABLES_NAME,
            golden=golden,
            files=self.files.entries,
            tools=_tools(),
            partition=costs_as_json(partition_costs(self.parts)),
            defaults=None if default_schedule is None else defaults,
            default_schedule=None if default_schedule is None else schedules.index(default_schedule),
            engines=tuple(engines),
            kernels=tuple(kernels),
            samplers=tuple(samplers),
            calibration=calibration,
            pipeline=pipeline,
            quantized={f"step-{form}": each.facts for form, each in request.quantized.items()} or None,
        )
        return manifest, arrays

    def _network(self) -> tuple[dict[str, str], bytes]:
        """Files by part, and the step network that engines are built from."""
        parts = {**self.parts.graphs.before_loop, "step": self.parts.graphs.step}
        graphs = {
            part: self.files.add_graph(f"network/{part}.onnx", compress_weights(graph)) for part, graph in parts.items()
        }
        precision = self.request.precision
        for form, quantized in self.request.quantized.items():
            graphs[f"step-{form}"] = self.files.add_graph(f"network/step-{form}.onnx", quantized.graph)
        if precision in self.request.quantized:
            return graphs, self.request.quantized[precision].graph
        if precision == "float32" or not (self.targets.engines or self.targets.step_network):
            return graphs, self.parts.graphs.step
        step = step_graph(self.parts, precision)
        graphs[f"step-{precision}"] = self.files.add_graph(f"network/step-{precision}.onnx", step)
        return graphs, step

    def _pipeline(self) -> str | None:
        parts = self.engine.runner.pipeline
        names = [
            self.files.add_graph(name, compress_weights(data)) if name.endswith(".onnx") else self.files.add(name, data)
            for name, data in ([] if parts is None else parts.files())
        ]
        return names[0] if names else None

    def _kernels(self) -> list[KernelEntry]:
        from skipstep.export.cubins import compile_kernels, loop_kernels, needed_variants

        self.report("kernels for " + ", ".join(f"sm_{each}" for each in self.targets.kernels))
        network, precision = self.engine.network, tensor_dtype(self.request.precision)
        variants = needed_variants(
            [flags for plan in self.engine.plans.values() for flags in plan.stage_flags],
            guided=network.can_guide,
            wide_output=network.learns_variance,
            rescale=network.can_guide,
        )
        binaries = compile_kernels(
            self.targets.kernels, loop_kernels(variants), [precision], num_elements=network.num_elements
        )
        entries = []
        for binary in binaries:
            facts, digest = binary.facts, hashlib.sha256(binary.cubin).hexdigest()[:12]
            name = self.files.add(f"kernels/sm_{facts.architecture}-{precision}-{digest}.cubin", binary.cubin)
            entries.append(KernelEntry(name, facts.to_json()))
        return entries

    def _samplers(self, form: Form, noise: Noise) -> list[SamplerEntry]:
        self.report(f"whole loops as ONNX graphs ({form})")
        guided = self.engine.network.can_guide
        return [
            SamplerEntry(
                self.files.add_graph(f"onnx-{form}/{name}.onnx", compress_weights(graph)),
                *(key, form, guided, noise),
            )
            for key, name, graph in self._sampler_graphs(form, noise)
        ]

    def _server(self) -> None:
        from skipstep.export.triton_server import batcher_repository, model_repository

        self.report("model repository")
        own = self.request.name
        graphs = {f"{own}-{name}": graph for _, name, graph in self._sampler_graphs("loop", "given")}
        batcher = batcher_repository(f"{own}-batcher", self.engine.network)
        stream = batcher_repository(f"{own}-stream", self.engine.network, decoupled=True)
        for name, data in {**model_repository(graphs), **batcher, **stream}.items():
            self.files.add(f"server/{name}", data)

    def _trtexec(self, step: bytes) -> None:
        self.report("networks and arrays for trtexec")
        engine, precision = self.engine, self.request.precision
        if precision not in self.request.quantized and not (
            self.targets.engines or self.targets.step_network
        ):  # Else `step` is in that precision.
            step = step_graph(self.parts, precision)
        plans = list(engine.plans.values())
        for name, data in trtexec_files(self.parts, step, engine.network, plans, engine.batch_sizes, precision):
            self.files.add(f"trtexec/{name}", data)

    def _sampler_graphs(self, form: Form, noise: Noise) -> Iterator[tuple[str, str, bytes]]:
        """Key, name and graph of each plan's whole loop, for any batch size; unrolled, of each that is short enough."""
        network = self.engine.network
        for plan in self.engine.plans.values():
            if form == "unrolled" and plan.num_evaluations > MOST_UNROLLED:
                continue
            guided = network.can_guide
            graph = build_sampler(self.parts, network, plan, batch_size=None, guided=guided, form=form, noise=noise)
            yield plan.key, f"{plan.steps}-{plan.key}", graph


def _digest(parts: Partition) -> str:
    """sha256 over the network's graphs, weights included."""
    digest = hashlib.sha256()
    for name, graph in sorted({**parts.graphs.before_loop, "step": parts.graphs.step}.items()):
        digest.update(f"{name} {len(graph)} ".encode())
        digest.update(graph_sha256(graph).digest() if weights_of(graph) else graph)
    return digest.hexdigest()


def _tools() -> dict[str, str]:
    versions = {name: package_version(name) for name in _TOOLS}
    return {"skipstep": __version__, "python": platform.python_version(), **{n: v for n, v in versions.items() if v}}
