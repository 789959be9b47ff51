"""skipstep build: TensorRT engines for this machine's GPU, from the network in a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from skipstep.commands.models import add_engine_options, engine_options
from skipstep.commands.progress import elapsed_progress
from skipstep.errors import InputError

DESCRIPTION = "Build TensorRT engines from a bundle's step network on the machine that will run them."
EPILOG = """\
The engines are built from the bundle's network in 8 bits or half precision (exported with --target tensorrt --precision
float16), or from its float32 network; with --precision int8 --calibration 0 1 2 3 from one in 8 bits that is made here
and added to the bundle. Files are verified before the builder reads them. A signature is removed, because the manifest
changes: sign the bundle again afterwards.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="its folder")
    parser.add_argument("--target", default="tensorrt", help="tensorrt, rtx, or rtx:smNN (default: tensorrt)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the number of the GPU (default: 0)")
    parser.add_argument(
        "--precision", choices=("int8", "fp8"), help="make the network in 8 bits (default: what there is)"
    )
    parser.add_argument(
        "--require-signature", type=Path, metavar="KEY", help="the public key that must have signed the bundle"
    )
    add_engine_options(parser)


def run(options: argparse.Namespace) -> None:
    if options.bundle.suffix == ".onnx":
        raise InputError(
            got=f"{options.bundle}, an .onnx file",
            expected="a bundle, in which the network has been partitioned",
            remedy=f"first run skipstep export --model {options.bundle} --target tensorrt --license LICENSE "
            "--out BUNDLE, then skipstep build BUNDLE",
        )
    from skipstep.backends.tensorrt_options import check_library_options
    from skipstep.engine import Engine
    from skipstep.export.engines import add_engines
    from skipstep.export.tensorrt_engine import parse_targets
    from skipstep.quantizing import check_calibration, quantize_bundle

    given, tensorrt = engine_options(options)
    calibration = check_calibration(options.precision, given)
    targets, progress = parse_targets(options.target), elapsed_progress()
    for target in targets:
        check_library_options(tensorrt, target.library)

    added = add_engines(
        options.bundle,
        targets,
        require_signature=options.require_signature,
        device=options.device,
        options=tensorrt,
        precision=options.precision,
        quantize=None
        if calibration is None
        else lambda bundle, precision: quantize_bundle(bundle, precision, calibration, sampler=Engine, report=progress),
        progress=progress,
    )
    print(f"added {', '.join(added)}")
