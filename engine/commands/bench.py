"""skipstep bench: time our loops beside what people run today."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstep.errors import InputError, MissingDependencyError
from skipstep.latency.table import format_table

if TYPE_CHECKING:
    from skipstep.bench.results import Case, Contender, Run

DESCRIPTION = "Time ways to draw the same samples: the same weights, noise, steps and threads, taking turns."
EPILOG = """\
examples:
  skipstep bench --model my-ddpm --plans 10,20,50 --batch 1,8 --out results.json
  skipstep bench --quick --out results.json
      a minute on the shipped model, for CI
  skipstep bench --model my-ddpm --contenders textbook,skipstep-onnx,openvino
      of all contenders only these; the textbook loop is always there, as the ratios refer to it

A contender whose samples are off by more than its tolerance gets no number. What has been measured is kept beside OUT
after every case: after an interruption repeat the command with --resume.
"""

_QUICK = {
    "model": ["fashion-mnist"],
    "plans": (1, 10),
    "batch": (1,),
    "contenders": ("textbook", "skipstep-onnx", "diffusers"),
    "budget": 8.0,
    "measure": ("fits",),
}
_FULL = {
    "model": ["fashion-mnist"],
    "plans": (1, 5, 10, 20, 50, 100),
    "batch": (1, 4, 16, 64),
    "contenders": (),
    "budget": 60.0,
    "measure": ("fits",),
}


def numbers(text: str) -> tuple[int, ...]:
    """Integers with commas between them."""
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers such as 1,10,50") from error


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(each.strip() for each in text.split(",") if each.strip())


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        action="append",
        metavar="M",
        help="diffusers folder, bundle, fashion-mnist or cifar10-architecture; repeatable (default: fashion-mnist)",
    )
    parser.add_argument("--plans", type=numbers, metavar="S,…", help="step counts (default: 1,5,10,20,50,100)")
    parser.add_argument("--batch", type=numbers, metavar="B,…", help="batch sizes (default: 1,4,16,64)")
    parser.add_argument("--contenders", type=names, metavar="C,…", help="in order of importance (default: all)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="for a case; what would take longer is skipped (default: 60)"
    )
    parser.add_argument(
        "--measure",
        type=names,
        metavar="N,…",
        help="beside the cases: fits, build, throughput, cold_start, accuracy, peak_memory, or all (default: fits)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="the most turns of a case (default: 15)")
    parser.add_argument("--threads", type=int, default=0, help="of every contender (default: as many as torch takes)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="on a GPU")
    parser.add_argument("--compile-budget", type=float, default=180.0, metavar="SECONDS", help="for torch.compile")
    parser.add_argument("--quick", action="store_true", help="a few cases that take less than a minute")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of --out stopped")


def run(options: argparse.Namespace) -> None:
    try:
        from skipstep.bench.measure import Options
        from skipstep.bench.measurements import MEASUREMENTS, measure_run
    except ImportError as error:
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="torch, diffusers and the ONNX exporter",
            remedy="pip install 'skipstep[cpu,torch,export,diffusers]'",
        ) from error
    if options.resume and options.out is None:
        raise InputError(got="--resume without --out", expected="the file of the interrupted run", remedy="pass --out")
    preset: dict[str, Any] = _QUICK if options.quick else _FULL
    chosen = {name: getattr(options, name) or value for name, value in preset.items()}
    started = time.perf_counter()

    def progress(message: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {message}", file=sys.stderr)

    found = measure_run(
        Options(
            models=tuple(chosen["model"]),
            steps=chosen["plans"],
            contenders=chosen["contenders"],
            batch_sizes=chosen["batch"],
            budget_seconds=chosen["budget"],
            max_rounds=options.rounds,
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
            compile_seconds=options.compile_budget,
        ),
        measurements=tuple(MEASUREMENTS) if chosen["measure"] == ("all",) else chosen["measure"],
        out=options.out,
        resume=options.resume,
        progress=progress,
        command=_command(options),
    )
    print(describe_run(found))
    if options.out is not None:
        print(f"wrote {options.out}")


def _command(options: argparse.Namespace) -> str:
    """The command that measures the same again. Paths may be private: the names of files are enough to know them by."""
    parts = ["skipstep", "bench"]
    for model in options.model or ():
        parts += ["--model", Path(model).name]
    for name in ("plans", "batch", "contenders", "measure"):
        value = getattr(options, name)
        if value is not None:
            parts += [f"--{name}", ",".join(map(str, value))]
    if options.budget is not None:
        parts += ["--budget", f"{options.budget:g}"]
    parts += ["--quick"] if options.quick else []
    parts += [] if options.out is None else ["--out", options.out.name]
    return shlex.join(parts)


def describe_run(run: Run) -> str:
    """Every case as a table: times in milliseconds, ratios to the textbook loop, and why others have none."""
    return "\n\n".join(f"{case.name}\n{_table(case)}" for case in run.cases)


def _table(case: Case) -> str:
    measured = [_row(each) for each in case.contenders if each.status == "ok"]
    lines = []
    if measured:
        lines.append(format_table(["contender", "p50 ms", "p90", "p99", "turns", "× textbook", "off by"], measured))
    lines += [f"{each.name}: {each.status}: {each.reason}" for each in case.contenders if each.status != "ok"]
    return "\n".join(lines)


def _row(contender: Contender) -> list[str]:
    from skipstep.latency.calibration import nearest_rank

    return [
        contender.name,
        f"{statistics.median(contender.seconds) * 1e3:.1f}",
        *(f"{nearest_rank(contender.seconds, percent) * 1e3:.1f}" for percent in (90, 99)),
        str(len(contender.seconds)),
        "" if contender.ratio is None else f"{contender.ratio:.2f}",
        "" if contender.error is None else f"{contender.error:.1g}",
    ]
