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
from skipstep.backends.tensorrt_options import (
    DEFAULTS,
    TensorRTOptions,
    builder_options,
    check_library_options,
    read_timings,
)
from skipstep.bundles.bundle import Bundle, open_bundle
from skipstep.bundles.cache import ArtefactCache
from skipstep.bundles.cache_key import Part, cache_key
from skipstep.bundles.manifest import EngineEntry
from skipstep.cuda.probe import cuda_device
from skipstep.errors import ExportError
from skipstep.export.bundle_rewriter import rewrite_bundle
from skipstep.export.engine_sizes import describe_launches
from skipstep.export.fusion import not_fused
from skipstep.export.request import QuantizedStep
from skipstep.export.tensorrt_engine import EngineTarget, build_engine
from skipstep.export.weight_storage import expand_weights
from skipstep.networks.large_graph import graph_sha256
from skipstep.networks.spec import NetworkSpec, network_batch_sizes
from skipstep.storage.atomic import atomic_write

Progress = Callable[[str], None]


def add_engines(
    path: str | os.PathLike[str],
    targets: Iterable[EngineTarget],
    *,
    require_signature: str | os.PathLike[str] | None = None,
    device: int = 0,
    options: TensorRTOptions = DEFAULTS,
    precision: str | None = None,
    quantize: Callable[[Bundle, str], QuantizedStep] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Build engines from a bundle's step network on this machine and add them to the bundle; the files' names.

    The network is the one in 8 bits or half precision if the bundle has one, else the float32 one. Every file is
    verified on its way into the new bundle, which takes the old one's place when it is whole. Engines of the same
    target are replaced.
    `device` is the number of the GPU that they are for. `quantize` gives the network in `precision`, which is then
    added to the bundle.
    Raises BundleError and its kinds, ExportError, DeviceUnavailableError.
    """
    report = progress or (lambda message: None)
    bundle = open_bundle(path, require_signature=require_signature)
    manifest = bundle.manifest
    targets = tuple(targets)
    added: dict[str, bytes] = {}
    if precision is None:
        held = (each for each in (*EIGHT_BITS, "float16", "bfloat16") if f"step-{each}" in manifest.graphs)
        precision = next(held, "float32")
    for target in targets:
        target.check(precision)
    if quantize is not None:
        made, name = quantize(bundle, precision), f"step-{precision}"
        added[f"network/{name}.onnx"] = step = made.graph
        quantized = {**(manifest.quantized or {}), name: made.facts}
        graphs = {**manifest.graphs, name: f"network/{name}.onnx"}
        manifest = dataclasses.replace(manifest, graphs=graphs, quantized=quantized)
    else:
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
            options=options,
        )
    ]
    replaced = {_made_for(entry) for entry, _ in built}
    kept = tuple(entry for entry in manifest.engines if _made_for(entry) not in replaced)
    changed = dataclasses.replace(manifest, engines=(*kept, *(entry for entry, _ in built)))
    rewrite_bundle(bundle, changed, added | {entry.file: data for entry, data in built})
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
    options: TensorRTOptions = DEFAULTS,
) -> list[tuple[EngineEntry, bytes]]:
    """One engine for all batch sizes of the network."""
    sizes = network_batch_sizes(network, batch_sizes)
    report(f"{target}, batch {', '.join(map(str, sizes))}")
    data, facts = build_engine_cached(step, target, sizes, device=device, options=options, progress=report)
    if options != DEFAULTS:
        facts = {**facts, "options": builder_options(options)}
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
    options: TensorRTOptions = DEFAULTS,
    tf32: bool = False,
    channels_last: bool = False,
    again: bool = False,
    progress: Progress | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """The TensorRT engine for these batch sizes and its facts, from the user's cache if the same one was built before;
    not if `again`.

    Everything that an engine depends on is part of the key: the library and the CUDA release that it is for, the
    platform, the options, and the GPU and its driver where one is built for. Full TensorRT's kernel timings are kept
    for the next build under the same conditions, and in the file that the options name.
    """
    check_library_options(options, target.library)
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
        options=tuple(builder_options(options).values()),
        tf32=tf32,
        channels_last=channels_last,
        **built_by,
    )
    if again:
        cache.clear(key)
    timings = read_timings(options)

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
            options=options,
            tf32=tf32,
            channels_last=channels_last,
            timing_cache=timings or cache.get(timings_key) if target.library == "tensorrt" else None,
            progress=report,
        )
        if built.timing_cache is not None:
            cache.put(timings_key, built.timing_cache, f"kernel timings of {target}")
        facts = json.dumps(built.describe()).encode()
        return len(facts).to_bytes(4, "little") + facts + built.engine

    stored = cache.get_or_build(key, build, f"{target} engine, batch {', '.join(map(str, sizes))}")
    if options.timing_cache is not None and (known := cache.get(timings_key)) is not None:
        atomic_write(options.timing_cache, known)
    end = 4 + int.from_bytes(stored[:4], "little")
    return stored[end:], json.loads(stored[4:end])
