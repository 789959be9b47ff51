"""skipstep evaluate: measure quality, spread, inversion and time of every sampler."""

from __future__ import annotations

import argparse
from pathlib import Path

from skipstep.demo import SHIPPED_MODEL, checked_model
from skipstep.errors import MissingDependencyError
from skipstep.storage.atomic import check_writable

DESCRIPTION = "Measure the samplers on the shipped model and write tables (CSV, Markdown) and plots (PNG)."
EPILOG = """\
needs Fashion-MNIST (apt-get install dataset-fashion-mnist) and skipstep[evaluate].

It takes about 27 seconds a sample (--num) on two CPU cores, most of it for the rows of 1000 steps. Judged samples are
kept in OUT/cache: interrupt and repeat the command to go on, or repeat it with a larger --num.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=SHIPPED_MODEL, help="diffusers folder (default: the shipped model)"
    )
    parser.add_argument("--num", type=int, default=64, help="samples a case (default: 64)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/evaluation"), help="folder for all of it (default: out/evaluation)"
    )
    parser.add_argument("--backend", default="auto", help="auto, torch or onnxruntime (default: auto)")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four IDX files")


def run(options: argparse.Namespace) -> None:
    try:
        from skipstep.bench.quality.evaluation import Evaluation
        from skipstep.bench.quality.evaluation_report import evaluate
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("skipstep.bench"):
            raise MissingDependencyError(
                got="an installation without skipstep.bench.quality",
                expected="the evaluation, which is in skipstep's repository and not in its wheel",
                remedy="clone the repository, and run pip install -e '.[cpu,torch,export,diffusers,evaluate]' there",
            ) from error
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="torch, diffusers, torchmetrics and matplotlib",
            remedy="pip install 'skipstep[cpu,torch,export,diffusers,evaluate]'",
        ) from error
    check_writable(options.out)
    data = {} if options.data is None else {"data": options.data}
    evaluation = Evaluation(
        checked_model(options.model), options.out, num_samples=options.num, backend=options.backend, **data
    )
    command = f"skipstep evaluate --num {options.num}"
    print(f"wrote {evaluate(evaluation, options.out, command=command)}")
