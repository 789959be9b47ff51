"""The options of commands that take a model: what completes one that does not say everything of itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skipstep.errors import InputError

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
