"""skipstep sign: put a signature on a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = "Check a bundle's files against its manifest, and sign the manifest: it holds every file's hash."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="its folder")
    parser.add_argument("--key", type=Path, required=True, help="the private key (skipstep keygen)")


def run(options: argparse.Namespace) -> None:
    from skipstep.bundles.bundle import open_bundle
    from skipstep.bundles.manifest import FILE_NAME, SIGNATURE_NAME
    from skipstep.storage.atomic import atomic_write
    from skipstep.storage.signature import sign

    bundle = open_bundle(options.bundle)
    for name in bundle.manifest.files:
        bundle.read(name)
    atomic_write(options.bundle / SIGNATURE_NAME, sign(bundle.signed_bytes, options.key))
    print(f"signed {options.bundle / FILE_NAME}")
