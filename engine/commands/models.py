"""Options that commands share: what completes a model, and how TensorRT engines and networks in 8 bits are made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstep.errors import InputError

if TYPE_CHECKING:
    from skipstep.backends.tensorrt_options import TensorRTOptions

MODEL_FORMS = "diffusers folder, .onnx file, or .safetensors file with --config"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models that do not say everything of themselves")
    group.add_argument(
        "--inputs",
        nargs="+",
        metavar="OURS=ITS",
        help="names of an .onnx file, e.g. sample=noisy timestep=sigma (default: found by name or shape)",
    )
    group.add_argument("--config", type=Path, metavar="FOLDER", help="configuration of a .safetensors file")
    group.add_argument(
        "--scheduler", type=Path, metavar="FILE", help="scheduler_config.json (default: the one beside the model)"
    )
    group.add_argument("--sample-shape", type=int, nargs=3, metavar=("C", "H", "W"), help="of one sample")
    group.add_argument("--prompt-shape", type=int, nargs=2, metavar=("L", "D"), help="tokens and width of a prompt")
    group.add_argument("--num-classes", type=int, metavar="N", help="how many classes it knows")
    group.add_argument("--height", type=int, metavar="PIXELS", help="of a pipeline's pictures; --width alike")
    group.add_argument("--width", type=int, metavar="PIXELS", help=argparse.SUPPRESS)
    group.add_argument(
        "--no-safety-checker",
        dest="safety_checker",
        action="store_const",
        const=False,
        help="leave out the checker that a pipeline's folder has",
    )
    group.add_argument("--null-label", type=int, metavar="N", help="the label that stands for no class")


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of Engine.build that these options are; those that were left out are not in it."""
    names = ("config", "scheduler", "sample_shape", "prompt_shape", "num_classes", "null_label")
    said = {name: getattr(options, name) for name in (*names, "height", "width", "safety_checker")}
    if options.inputs is not None:
        pairs = [each.partition("=") for each in options.inputs]
        if not all(ours and its for ours, _, its in pairs):
            raise InputError(
                got=f"--inputs {' '.join(options.inputs)}",
                expected="pairs of names, ours first",
                remedy="pass e.g. --inputs sample=noisy timestep=sigma",
            )
        said["inputs"] = {ours: its for ours, _, its in pairs}
    return {name: value for name, value in said.items() if value is not None}


def plan_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the model's scheduler configuration says of plans. Raises InputError where there is none."""
    from skipstep.opening import find_scheduler

    scheduler = find_scheduler(options.model, scheduler=options.scheduler, config=options.config)
    if scheduler is None:
        raise InputError(
            got=f"{options.model} without a scheduler configuration",
            expected="scheduler_config.json, which says how the network was trained",
            remedy="pass --scheduler FILE, or copy the file into the folder of the model",
        )
    return scheduler.plan_options()


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="SEED",
        help="for int8 and fp8: seeds to draw with, or a folder of pictures or .npz files with arguments of sample()",
    )
    group = parser.add_argument_group("TensorRT's builder (skipstep.TensorRTOptions)")
    group.add_argument("--optimization-level", type=int, metavar="N", help="0 to 5; full TensorRT only")
    group.add_argument(
        "--aux-streams", type=int, metavar="N", help="beside the caller's; full TensorRT only (default: 0)"
    )
    group.add_argument("--workspace", type=int, metavar="MIB", help="memory that a kernel may use (default: all)")
    for name, what in (
        ("--weight-streaming", "weights stay in host memory and are copied in parts"),
        ("--refit", "weights can be replaced in the engine"),
        ("--strip", "the engine holds no weights: it is given the bundle's when it is loaded"),
    ):
        group.add_argument(name, action="store_const", const=True, help=what)
    group.add_argument("--timing-cache", type=Path, metavar="FILE", help="of kernel timings; full TensorRT only")


def engine_options(options: argparse.Namespace) -> tuple[Any, TensorRTOptions]:
    """Calibration and the builder's options. Raises InputError."""
    from skipstep.backends.tensorrt_options import TensorRTOptions

    names = ("optimization_level", "aux_streams", "weight_streaming", "refit", "strip", "timing_cache")
    said = {name: getattr(options, name) for name in names}
    said["workspace_bytes"] = None if options.workspace is None else options.workspace << 20
    given = options.calibration
    if given is not None:
        seeds = [int(each) for each in given if each.isascii() and each.isdigit()]
        if len(seeds) != len(given) > 1:
            raise InputError(
                got=f"--calibration {' '.join(given)}",
                expected="seeds, or one folder",
                remedy="pass e.g. --calibration 0 1 2 3 4 5 6 7",
            )
        given = seeds or given[0]
    return given, TensorRTOptions(**{name: value for name, value in said.items() if value is not None})
