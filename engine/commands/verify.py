"""skipstep verify: check that a bundle is complete, who signed it, and that it draws its golden samples here."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from skipstep.demo import SHIPPED_BUNDLE, SHIPPED_BUNDLES

DESCRIPTION = "Hash every file of a bundle, check its signature where one is required, and draw its golden samples."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=SHIPPED_BUNDLE, help="its folder (default: the shipped bundle)"
    )
    parser.add_argument("--require-signature", type=Path, metavar="KEY", help="the public key that must have signed it")
    parser.add_argument(
        "--device", default="cpu", help="where to draw the golden samples: cpu, cuda or cuda:N (default: cpu)"
    )
    parser.add_argument(
        "--backend", default="auto", help="what runs the network: auto, onnxruntime, openvino or webgpu"
    )
    parser.add_argument("--precision", default="auto", help="of the network on the CPU: auto, float32 or bfloat16")


def run(options: argparse.Namespace) -> None:
    from skipstep import load
    from skipstep.bundles.bundle import open_bundle
    from skipstep.bundles.golden import allowed_error, replay_golden

    shipped = options.bundle in SHIPPED_BUNDLES
    bundle = open_bundle(options.bundle, require_signature=options.require_signature, allow_hard_links=shipped)
    signed = "signed" if bundle.signed else "unsigned"
    print(
        f"manifest    schema {bundle.manifest.schema}, "
        + ("signature verified" if options.require_signature else signed)
    )
    started = time.perf_counter()
    total = sum(len(bundle.read(name)) for name in bundle.manifest.files)
    seconds = time.perf_counter() - started
    print(f"files       {len(bundle.manifest.files)} hashed, {total / 1e6:.1f} MB in {seconds:.2f} s")
    bundle.refuse_other_files()
    started = time.perf_counter()
    engine = load(
        options.bundle,
        device=options.device,
        backend=options.backend,
        precision=options.precision,
        require_signature=options.require_signature,
        allow_hard_links=shipped,
    )
    golden = bundle.manifest.golden
    error = replay_golden(engine, golden, bundle.read_arrays(golden.file), precision=engine.precision)
    seconds = time.perf_counter() - started
    allowed = allowed_error(golden, engine.precision)
    print(
        f"golden      on {engine.device}, error {error:.2g}, at most {allowed:g} allowed; {seconds:.2f} s with loading"
    )
