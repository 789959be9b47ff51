"""skipstep build: engines for this machine's GPU, from the network in a bundle."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

DESCRIPTION = "Build engines from the step network of a bundle, where they will run, and add them to it."
EPILOG = """\
The bundle must hold the step network: export it with --target tensorrt. What it holds is verified before the builder
sees it. A signature is of the manifest as it was: sign the bundle again afterwards.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="its folder")
    parser.add_argument("--target", default="tensorrt", help="tensorrt, rtx, or rtx:smNN (default: tensorrt)")
    parser.add_argument(
        "--workspace", type=int, metavar="MIB", help="memory that the builder may use for a kernel (default: all)"
    )
    parser.add_argument(
        "--require-signature", type=Path, metavar="KEY", help="the public key that must have signed the bundle"
    )


def run(options: argparse.Namespace) -> None:
    from skipstep.export.engines import add_engines
    from skipstep.export.tensorrt_engine import parse_targets

    started = time.perf_counter()

    def progress(message: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {message}", file=sys.stderr)

    added = add_engines(
        options.bundle,
        parse_targets(options.target),
        require_signature=options.require_signature,
        workspace_bytes=None if options.workspace is None else options.workspace << 20,
        progress=progress,
    )
    print(f"added {', '.join(added)}")
