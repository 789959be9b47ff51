"""skipstep inspect: the contents of a bundle."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstep.demo import SHIPPED_BUNDLE
from skipstep.latency.table import format_table

if TYPE_CHECKING:
    from skipstep.bundles.bundle import Bundle
    from skipstep.bundles.manifest import EngineEntry, PlanEntry

_NOISE = {"seeds": "from seeds", "given": "from given noise"}
DESCRIPTION = "Read a bundle's manifest, and no other file of it unless --kernels asks for one, and list its contents."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=SHIPPED_BUNDLE, help="its folder (default: the shipped bundle)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the whole manifest, as JSON")
    form.add_argument(
        "--kernels", action="store_true", help="every kernel of each TensorRT-RTX engine and what it computes, as JSON"
    )


def run(options: argparse.Namespace) -> None:
    from skipstep.bundles.bundle import open_bundle

    bundle = open_bundle(options.bundle)
    if options.kernels:
        print(json.dumps(_kernels(bundle), indent=1))
        return
    print(bundle.manifest.to_json().decode().rstrip() if options.json else describe(bundle))


def _kernels(bundle: Bundle) -> dict[str, Any]:
    """By file of an engine its profiles, each a list of kernels in order."""
    from skipstep.export.engine_plan import launches

    return {
        entry.file: [[asdict(each) for each in plan] for plan in launches(bundle.read(entry.file))]
        for entry in bundle.manifest.engines
        if entry.target.startswith("rtx")
    }


def describe_bundle(path: str | os.PathLike[str]) -> str:
    from skipstep.bundles.bundle import open_bundle

    return describe(open_bundle(path))


def describe(bundle: Bundle) -> str:
    """One fact a line, then a table of the network by binding time and one of the files."""
    manifest = bundle.manifest
    network = manifest.network
    takes = [*network.described_conditions, *(["guidance"] if network.can_guide else [])]
    facts = [
        (
            "model",
            f"{manifest.model}, {'×'.join(map(str, network.sample_shape))}, {', '.join(takes) or 'unconditional'}",
        ),
        ("digest", manifest.digest),
        ("licence", manifest.license),
        ("signed", "yes; skipstep verify checks by whom" if bundle.signed else "no"),
        ("batch sizes", ", ".join(map(str, manifest.batch_sizes))),
        *(
            (
                "plan",
                f"{plan.key}  {plan.options.get('solver')}, {_steps(plan)} steps, eta "
                f"{plan.options.get('eta')}, {plan.options.get('prediction_type')}",
            )
            for plan in manifest.plans
        ),
        *(("8 bits", f"{name}{_in_8_bits(facts)}") for name, facts in (manifest.quantized or {}).items()),
        *(each for engine in manifest.engines for each in _engine_lines(engine)),
        *(("kernels", line) for line in _kernel_lines(bundle)),
        *(
            ("onnx loop", f"plan {s.plan}, {s.form}, {_NOISE[s.noise]}{', guided' if s.guided else ''}, {s.file}")
            for s in manifest.samplers
        ),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ]
    parts = [
        (
            name,
            f"{part['nodes']}",
            f"{part['flops'] / 1e6:.2f}",
            f"{part['weight_bytes'] / 1e6:.2f}",
            f"{part['crossing']}",
        )
        for name, part in manifest.partition.items()
        if isinstance(part, dict) and {"nodes", "flops", "weight_bytes", "crossing"} <= part.keys()
    ]
    files = [(name, f"{entry.size}", entry.sha256[:16]) for name, entry in sorted(manifest.files.items())]
    return "\n".join(
        [
            *(f"{name:<12}{value}" for name, value in facts),
            "",
            format_table(("evaluated once per", "nodes", "MFLOP", "weights MB", "values that cross"), parts),
            "",
            format_table(("file", "bytes", "sha256"), files),
        ]
    )


def _steps(plan: PlanEntry) -> Any:
    timesteps = plan.options.get("timesteps")
    return len(timesteps) if isinstance(timesteps, list) and timesteps else plan.options.get("steps")


def _in_8_bits(facts: Any) -> str:
    """How much of a network, and what it was measured to change."""
    names = ("layers", "candidates", "share", "largest", "samples")
    numbers = [facts.get(name) for name in names] if isinstance(facts, dict) else [None]
    if not all(isinstance(each, int | float) for each in numbers):
        return ""
    layers, of, share, largest, samples = numbers
    return (
        f": {layers} of {of} layers, {share:.0%} of the operations, at most {largest:.2g} off in {samples} new samples"
    )


def _engine_lines(engine: EngineEntry) -> list[tuple[str, str]]:
    """The engine, its kernels, and what of the network takes more kernels in it than it could."""
    counts = engine.facts.get("kernels")
    profiles = engine.facts.get("profiles")
    lines = [("engine", f"{engine.target}, {engine.precision}, {engine.file}")]
    if isinstance(counts, list) and counts:
        sizes = f" at batch {', '.join(map(str, profiles))}" if isinstance(profiles, list) and profiles else ""
        lines.append(("  kernels", f"{', '.join(map(str, counts))} an evaluation{sizes}"))
    for name, fact in (("  largest", "largest"), ("  not fused", "not_fused")):
        found = engine.facts.get(fact)
        lines += [(name, each) for each in (found if isinstance(found, list) else []) if isinstance(each, str)]
    return lines


def _kernel_lines(bundle: Bundle) -> list[str]:
    architectures: dict[str, int] = {}
    for kernel in bundle.manifest.kernels:
        name = f"sm_{kernel.facts.get('architecture')}"
        architectures[name] = architectures.get(name, 0) + 1
    return [f"{name}, {count} variants of the step" for name, count in architectures.items()]
