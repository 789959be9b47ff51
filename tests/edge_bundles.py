"""Bundles for a GPU that never was: kernels without code, engines of the stand-in TensorRT (executing_cuda)."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_tensorrt
from executing_cuda import cubin_of
from safetensors.numpy import save
from step_binaries import step_facts

import skipstep
from skipstep.backends.denoiser import tensor_dtype
from skipstep.backends.onnxruntime import EarlyGraphs
from skipstep.bundles.bundle import open_bundle
from skipstep.bundles.manifest import EngineEntry, KernelEntry
from skipstep.bundles.tables import plan_arrays, read_plans
from skipstep.calls.conditioning import distinct
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.edge.step_binary import KernelArgument, StepBinaryFacts, argument_types
from skipstep.export.bundle_rewriter import rewrite_bundle
from skipstep.export.precision import lower_precision
from skipstep.kernels.layout import StepFlags
from skipstep.networks.spec import network_batch_sizes
from skipstep.plans.plan import Plan


def kernel_facts(
    flags: Iterable[StepFlags], *, guided: bool, num_elements: int, architecture: int = 87, dtype: str = "float32"
) -> list[StepBinaryFacts]:
    options = {
        "network_dtype": dtype,
        "num_elements_multiple": 16 if num_elements % 16 == 0 else 1,
        "dynamic_shared_bytes": 0,
    }
    steps = [step_facts(architecture, flags=each, **options) for each in dict.fromkeys(flags)]
    arguments = tuple(KernelArgument(*each) for each in argument_types(dtype, "noise").items())
    copies = [StepFlags(), StepFlags(guided=True)][: 1 + guided]
    noise = [
        step_facts(architecture, flags=each, purpose="noise", arguments=arguments, kernel="noise", **options)
        for each in copies
    ]
    arguments = tuple(KernelArgument(*each) for each in argument_types(dtype, "statistics").items())
    statistics = [
        step_facts(architecture, flags=each, purpose="statistics", arguments=arguments, kernel="statistics", **options)
        for each in dict.fromkeys(each.of_statistics for each in flags)
        if each is not None
    ]
    return [*steps, *statistics, *noise]


def edge_bundle(
    path: Path,
    *,
    source: Path = SHIPPED_BUNDLE,
    batch_sizes: tuple[int, ...] = (1, 2),
    architecture: int = 87,
    library: str = "tensorrt_rtx",
    without: tuple[str, ...] = (),
    also: Iterable[Plan] = (),
    precision: str = "float32",
    network_dtype: str | None = None,
    **built_for: Any,
) -> Path:
    """The bundle at `source` as if it had been exported for that architecture; `without` "kernels", "engines".
    It has the kernels of its plans and of those in `also`. `built_for`: facts of its engine that are others."""
    shutil.copytree(source, path, copy_function=shutil.copyfile)
    bundle = open_bundle(path)
    manifest, network = bundle.manifest, bundle.manifest.network
    plans = read_plans(manifest, bundle.read_arrays(manifest.tables))
    calls = [(False, False), (True, False), (True, True)] if network.can_guide else [(False, False)]
    flags = [
        each.in_call(guided=guided, rescale=rescale, wide_output=network.learns_variance)
        for plan in (*plans, *also)
        for each in plan.stage_flags
        for guided, rescale in calls
    ]
    facts = kernel_facts(
        flags,
        guided=network.can_guide,
        num_elements=network.num_elements,
        architecture=architecture,
        dtype=network_dtype or tensor_dtype(precision),
    )
    kernels = [] if "kernels" in without else facts
    files = {f"kernels/{number}.cubin": cubin_of(each) for number, each in enumerate(kernels)}
    entries = [KernelEntry(name, each.to_json()) for name, each in zip(files, kernels, strict=True)]
    sizes = network_batch_sizes(network, batch_sizes)
    engines = []
    if "engines" not in without:
        step = bundle.read_graph(manifest.graphs["step"])
        if tensor_dtype(precision) != "float32":
            step = lower_precision(step, tensor_dtype(precision))
        files["engines/step.engine"] = fake_tensorrt.engine_of(step, *sizes)
        about = {
            "library": library,
            "library_version": "1.7.0.0",
            "platform": sysconfig.get_platform(),
            "compute_capability": architecture,
            "device": "an executing stand-in" if library == "tensorrt" else None,
            "num_multiprocessors": 8 if library == "tensorrt" else None,
            "profiles": list(sizes),
            "inputs": [{"shape": [sizes[0]]}],
            **built_for,
        }
        engines = [EngineEntry("engines/step.engine", f"rtx:sm{architecture}", precision, about)]
    if kernels:
        early = EarlyGraphs({each: bundle.read_graph(manifest.graphs[each]) for each in ("plan", "call")}, network)
        tables = dict(bundle.read_arrays(manifest.tables))
        for plan in plans:
            tables |= plan_arrays(plan, early.of_labels(distinct(plan.evaluation_timesteps)[0]))
        files[manifest.tables] = save(tables)
    changed = replace(manifest, batch_sizes=batch_sizes, kernels=tuple(entries), engines=tuple(engines))
    rewrite_bundle(bundle, changed, files)
    return path


def load_edge(path, **options):
    return skipstep.load(path, device="cuda", runtime="edge", library="tensorrt_rtx", compile_on_miss=True, **options)
