"""TensorRT engines of a bundle's step network: built while a bundle is written, or later on the device.

Nothing here needs torch: a device needs the bundle, ONNX and TensorRT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from importlib import metadata
from typing import Any

from skipstep.backends.denoiser import EIGHT_BITS, Library
from skipstep.backends.tensorrt_library import import_library
from skipstep.bundles.bundle import open_bundle
from skipstep.bundles.cache import ArtefactCache
from skipstep.bundles.cache_key import Part, cache_key
from skipstep.bundles.manifest import EngineEntry
from skipstep.cuda.probe import cuda_device
from skipstep.errors import ExportError
from skipstep.export.bundle_rewriter import rewrite_bundle
from skipstep.export.engine_sizes import describe_launches
from skipstep.export.fusion import not_fused
from skipstep.export.tensorrt_engine import EngineTarget, build_engine
from skipstep.export.weight_storage import expand_weights
from skipstep.networks.large_graph import graph_sha256
from skipstep.networks.spec import NetworkSpec, network_batch_sizes

Progress = Callable[[str], None]


def add_engines(
    path: str | os.PathLike[str],
    targets: Iterable[EngineTarget],
    *,
    require_signature: str | os.PathLike[str] | None = None,
    device: int = 0,
    workspace_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Build engines from a bundle's step network on this machine and add them to the bundle; the files' names.

    The network is the one in 8 bits or half precision if the bundle has one, else the float32 one. Every file is
    verified on its way into the new bundle, which takes the old one's place when it is whole. Engines of the same
    target are replaced.
    `device` is the number of the GPU that they are for; `workspace_bytes` bounds the memory that the builder may use
    for a kernel.
    Raises BundleError and its kinds, ExportError, DeviceUnavailableError.
    """
    report = progress or (lambda message: None)
    bundle = open_bundle(path, require_signature=require_signature)
    manifest = bundle.manifest
    precision = next(
        (each for each in (*EIGHT_BITS, "float16", "bfloat16") if f"step-{each}" in manifest.graphs), "float32"
    )
    name = "step" if precision == "float32" else f"step-{precision}"
    step = expand_weights(bundle.read_graph(manifest.graphs[name]))
    built = [
        each
        for target in targets
        for each in built_engines(
            step,
            target,
            manifest.network,
            manifest.batch_sizes,
            precision,
            report,
            device=device,
            workspace_bytes=workspace_bytes,
        )
    ]
    replaced = {_made_for(entry) for entry, _ in built}
    kept = tuple(entry for entry in manifest.engines if _made_for(entry) not in replaced)
    changed = dataclasses.replace(manifest, engines=(*kept, *(entry for entry, _ in built)))
    rewrite_bundle(bundle, changed, {entry.file: data for entry, data in built})
    return sorted(entry.file for entry, _ in built)


def _made_for(entry: EngineEntry) -> tuple[Any, ...]:
    """What one engine is for: an earlier version made one for each batch size of it."""
    return entry.target, entry.precision, entry.facts.get("device"), entry.facts.get("num_multiprocessors")


def built_engines(
    step: bytes,
    target: EngineTarget,
    network: NetworkSpec,
    batch_sizes: Sequence[int],
    precision: str,
    report: Progress,
    *,
    device: int = 0,
    workspace_bytes: int | None = None,
) -> list[tuple[EngineEntry, bytes]]:
    """One engine for all batch sizes of the network."""
    sizes = network_batch_sizes(network, batch_sizes)
    report(f"{target}, batch {', '.join(map(str, sizes))}")
    data, facts = build_engine_cached(
        step, target, sizes, device=device, workspace_bytes=workspace_bytes, progress=report
    )
    if target.library == "tensorrt_rtx":
        facts = {**facts, "not_fused": not_fused(step)}
        # Another release may write its plan otherwise: an engine is as good without the description.
        with contextlib.suppress(ExportError):
            facts |= describe_launches(data, step)
    name = f"engines/{_file_word(target, facts)}-{precision}-batch{'-'.join(map(str, sizes))}.engine"
    return [(EngineEntry(name, str(target), precision, facts), data)]


def _file_word(target: EngineTarget, facts: Mapping[str, Any]) -> str:
    """Of the target, and of the device where the engine is for that one alone."""
    words = [str(target)]
    if facts["device"] is not None:
        words += [facts["device"], f"sm{facts['compute_capability']}", f"{facts['num_multiprocessors']}mp"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _installed(library: Library) -> tuple[str, ...]:
    """The library's own version, and the packages that it comes in: their names say for which CUDA."""
    names = {str(each.metadata["Name"]).lower().replace("_", "-") for each in metadata.distributions()}
    return import_library(library).__version__, *sorted(name for name in names if name.startswith("tensorrt"))


def build_engine_cached(
    step: bytes,
    target: EngineTarget,
    batch_sizes: Sequence[int],
    *,
    device: int = 0,
    workspace_bytes: int | None = None,
    tf32: bool = False,
    channels_last: bool = False,
    again: bool = False,
    progress: Progress | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """The TensorRT engine for these batch sizes and its facts, from the user's cache if the same one was built before;
    not if `again`.

    Everything that an engine depends on is part of the key: the library and the CUDA release that it is for, the
    platform, and the GPU and its driver where one is built for. Full TensorRT's kernel timings are kept for the next
    build under the same conditions.
    """
    sizes = tuple(sorted(set(batch_sizes)))
    cache = ArtefactCache()
    gpu = None if target.compute_capability is not None else astuple(cuda_device(device))
    library = _installed(target.library)
    built_by: dict[str, Part] = {"platform": sysconfig.get_platform(), "gpu": gpu, "library": library}
    timings_key = cache_key(kind="timings", **built_by)
    key = cache_key(
        kind="engine",
        graph=graph_sha256(step).hexdigest(),
        target=str(target),
        batch_sizes=sizes,
        workspace_bytes=workspace_bytes,
        tf32=tf32,
        channels_last=channels_last,
        **built_by,
    )
    if again:
        cache.clear(key)

    def report(phase: str, done: int, total: int) -> None:
        if done == 0 and progress is not None:
            progress(f"{target}: {phase}")

    def build() -> bytes:
        built = build_engine(
            step,
            library=target.library,
            compute_capability=target.compute_capability,
            batch_sizes=sizes,
            device=device,
            workspace_bytes=workspace_bytes,
            tf32=tf32,
            channels_last=channels_last,
            timing_cache=cache.get(timings_key) if target.library == "tensorrt" else None,
            progress=report,
        )
        if built.timing_cache is not None:
            cache.put(timings_key, built.timing_cache, f"kernel timings of {target}")
        facts = json.dumps(built.describe()).encode()
        return len(facts).to_bytes(4, "little") + facts + built.engine

    stored = cache.get_or_build(key, build, f"{target} engine, batch {', '.join(map(str, sizes))}")
    end = 4 + int.from_bytes(stored[:4], "little")
    return stored[end:], json.loads(stored[4:end])
