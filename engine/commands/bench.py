"""skipstep bench: time skipstep beside other ways to run a model. A front of `pytest --pyargs skipstep.bench`."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from skipstep.bench.plugin import MODEL_HELP, OPTIONS
from skipstep.errors import InputError, MissingDependencyError
from skipstep.storage.atomic import check_writable

DESCRIPTION = (
    "Time ways to draw the same samples: the same weights, noise, steps and threads, each beside a textbook loop.\n"
    "The same as pytest --pyargs skipstep.bench, with other defaults; the result is pytest-benchmark's JSON."
)
EPILOG = """\
examples:
  skipstep bench --model my-ddpm --plans 10,20,50 --batch 1,8 --out results.json
  skipstep bench --quick --out results.json
      a minute on the shipped model, for CI
  skipstep bench --model my-ddpm --contenders textbook,skipstep,openvino
      of all contenders only these

A contender whose samples differ by more than its tolerance gets no number, and the exit status is then 1.
Ctrl-C ends the run and keeps what has been measured; the same command with --resume continues it.
"""

_QUICK: dict[str, Any] = {"contenders": ("textbook", "skipstep", "diffusers"), "budget": 5.0, "rounds": 7}
_FULL: dict[str, Any] = {"plans": (1, 5, 10, 20, 50, 100), "batch": (1, 4, 16, 64)}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", metavar="MODEL", help=MODEL_HELP)
    for name, kind, _, text in OPTIONS:
        if name in _FULL:
            text = f"{text.split(' (')[0]} (default: {','.join(map(str, _FULL[name]))})"
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--quick", action="store_true", help="a few cases that take less than a minute")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds, of the same commit and options")
    parser.add_argument("--out", type=Path, help="the JSON file to write")


def run(options: argparse.Namespace) -> int:
    """0; 1 if a contender failed; 2 for bad options, which pytest has explained."""
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            got=f"no package {' and '.join(missing)}",
            expected="pytest and pytest-benchmark, which time the contenders",
            remedy="pip install 'skipstep[bench]'",
        )
    from skipstep.bench.measure_again import run_benchmark

    if options.resume and options.out is None:
        raise InputError(
            got="--resume without --out",
            expected="the result file to continue",
            remedy="pass --out FILE as in the run that was interrupted",
        )
    if options.out is not None:
        check_writable(options.out.absolute().parent)
    chosen: dict[str, Any] = dict(_QUICK if options.quick else _FULL)
    for name, _, _, _ in OPTIONS:
        value = getattr(options, name.replace("-", "_"))
        if value is not None:
            chosen[name] = value
    if options.resume:
        chosen["resume"] = options.out.absolute()
    status = run_benchmark({"models": options.model or (), **chosen}, out=options.out)
    return {0: 0, 1: 1, 2: 130}.get(status, 2)
