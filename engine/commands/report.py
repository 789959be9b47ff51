"""skipstep report: benchmark results as one HTML page and PNG plots."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from skipstep.errors import InputError, needs_packages
from skipstep.storage.atomic import check_writable

DESCRIPTION = "Make one self-contained HTML page, and PNG plots beside it, from what skipstep bench measured."
EPILOG = """\
examples:
  skipstep report results.json
  skipstep report bench/results/runs/*.json --evaluation bench/results/evaluation --out out/report
  skipstep report v1.json v2.json v3.json        also compares our ratios over these commits

A JSON file that is no benchmark result is named and not used. Needs skipstep[bench].
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="JSON that skipstep bench wrote")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="folder to write (default: out/report)")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FOLDER",
        help="what skipstep evaluate wrote, for quality against latency (default: `evaluation` beside a result)",
    )
    parser.add_argument(
        "--evaluated-model",
        default="fashion-mnist",
        metavar="NAME",
        help="what the results call the model that was evaluated (default: fashion-mnist)",
    )


def run(options: argparse.Namespace) -> None:
    with needs_packages("it, for the report", remedy="pip install 'skipstep[bench]'"):
        from skipstep.bench.page.document import write_report
    check_writable(options.out)
    evaluation = options.evaluation
    if evaluation is None:
        beside = (path.parent / "evaluation" for path in options.results)
        evaluation = next((folder for folder in beside if (folder / "rows.json").is_file()), None)
    elif not evaluation.is_dir():
        raise InputError(
            got=f"{evaluation}, which is no folder",
            expected="the folder that skipstep evaluate wrote",
            remedy="run skipstep evaluate first, or correct --evaluation",
        )
    page, notes = write_report(
        options.results, options.out, evaluation=evaluation, evaluated_model=options.evaluated_model
    )
    for note in notes:
        print(note, file=sys.stderr)
    print(f"wrote {page}")
