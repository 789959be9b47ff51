"""skipstep build: TensorRT engines for this machine's GPU, from the network in a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from skipstep.commands.progress import elapsed_progress
from skipstep.errors import InputError

DESCRIPTION = "Build TensorRT engines from a bundle's step network on the machine that will run them."
EPILOG = """\
The engines are built from the bundle's half-precision network (exported with --target tensorrt --precision float16), or
from its float32 network. Files are verified before the builder reads them. A signature is removed, because the manifest
changes: sign the bundle again afterwards.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="its folder")
    parser.add_argument("--target", default="tensorrt", help="tensorrt, rtx, or rtx:smNN (default: tensorrt)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the number of the GPU (default: 0)")
    parser.add_argument(
        "--workspace", type=int, metavar="MIB", help="memory that the builder may use for a kernel (default: all)"
    )
    parser.add_argument(
        "--require-signature", type=Path, metavar="KEY", help="the public key that must have signed the bundle"
    )


def run(options: argparse.Namespace) -> None:
    if options.bundle.suffix == ".onnx":
        raise InputError(
            got=f"{options.bundle}, an .onnx file",
            expected="a bundle, in which the network has been partitioned",
            remedy=f"first run skipstep export --model {options.bundle} --target tensorrt --license LICENSE "
            "--out BUNDLE, then skipstep build BUNDLE",
        )
    from skipstep.export.engines import add_engines
    from skipstep.export.tensorrt_engine import parse_targets

    added = add_engines(
        options.bundle,
        parse_targets(options.target),
        require_signature=options.require_signature,
        device=options.device,
        workspace_bytes=None if options.workspace is None else options.workspace << 20,
        progress=elapsed_progress(),
    )
    print(f"added {', '.join(added)}")
