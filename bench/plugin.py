"""The pytest plugin: `pytest --pyargs skipstep.bench --model my-ddpm --plans 10,20 --batch 1,8`, from any folder.

pytest loads this module in every run of an environment that has skipstep, so it imports nothing but the standard
library, and it does nothing unless the command names the benchmark: skipstep.bench, or a path in this folder. Options
such as --model thus stay free for other people's plugins.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent


def numbers(text: str) -> tuple[int, ...]:
    """Integers with commas between them."""
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 1,10,50") from error


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(each.strip() for each in text.split(",") if each.strip())


# Options of the benchmark, of `pytest --pyargs skipstep.bench` and of `skipstep bench`: name, argument, default, help.
OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("plans", numbers, (1, 10), "step counts (default: 1,10)"),
    ("batch", numbers, (1,), "batch sizes (default: 1)"),
    ("contenders", names, (), "the contenders to measure (default: all)"),
    ("budget", float, 20.0, "seconds for each case of a contender; one that needs more is left out (default: 20)"),
    ("rounds", int, 15, "the most rounds of a case (default: 15)"),
    ("measure", names, (), "also measure throughput, process (cold start and peak memory), or all"),
    ("threads", int, 0, "threads of every contender (default: as many as torch takes)"),
    ("device", str, "cpu", "cpu or cuda (default: cpu)"),
    ("dtype", str, "float32", "float32, float16 or bfloat16; half precision on a GPU alone"),
    ("compile-budget", float, 180.0, "seconds for torch.compile (default: 180)"),
)
MODEL_HELP = (
    "a diffusers folder, a bundle, fashion-mnist or cifar10-architecture; repeatable (default: fashion-mnist); "
    "NAME@1,8 measures this model at batch sizes 1 and 8 instead of those of --batch"
)

RESUME_HELP = "a result of the same commit, machine and options: what it holds is kept and not measured again"


def pytest_addoption(parser: Any, pluginmanager: Any) -> None:
    if not any(map(_names_the_benchmark, pluginmanager.get_plugin("pytestconfig").invocation_params.args)):
        return
    group = parser.getgroup("skipstep", "skipstep: latency of samplers beside a textbook loop")
    group.addoption("--model", action="append", metavar="MODEL", help=MODEL_HELP)
    for name, kind, default, text in OPTIONS:
        group.addoption(f"--{name}", type=kind, default=default, help=text)
    group.addoption("--resume", metavar="FILE", default="", help=RESUME_HELP)
    # Of the GPU gate.
    group.addoption("--unpaired", action="store_true", help=argparse.SUPPRESS)
    group.addoption("--simulated", default="", help=argparse.SUPPRESS)
    pluginmanager.register(importlib.import_module("skipstep.bench.suite"), "skipstep-bench")


def _names_the_benchmark(argument: object) -> bool:
    text = str(argument).split("::")[0]
    if "skipstep.bench" in text:
        return True
    path = Path(text).resolve()
    return path.exists() and (path == _FOLDER or path.parent == _FOLDER)
