"""skipstep compare: the regression gate. skipstep.bench.compare says what it measures and when it fails."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from skipstep.latency.table import format_table
from skipstep.storage.atomic import check_writable

if TYPE_CHECKING:
    from skipstep.bench.compare import Change, Comparison

DESCRIPTION = (
    "Compare a run of skipstep bench with a baseline of the same machine class, by ratios to the textbook loop.\n"
    "The exit status is 1 if a contender is slower beyond the limit and beyond noise, or does not work any more."
)
EPILOG = """\
examples:
  skipstep bench --model my-ddpm --plans 10,20 --batch 1 --out bench.json
  skipstep compare baselines bench.json --accept
      once, and whenever a change of speed is meant: the run becomes the baseline of this machine class
  skipstep compare baselines bench.json --measure-again
      compare; what looks slow is measured once more, with three times the rounds, before it fails
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", type=Path, help="a run (.json), or a folder with a run for each machine class")
    parser.add_argument("result", type=Path, help="the run that skipstep bench --out wrote")
    parser.add_argument("--accept", action="store_true", help="store the result as the baseline; compare nothing")
    parser.add_argument("--limit", type=float, default=10.0, metavar="PERCENT", help="fail beyond this (default: 10)")
    parser.add_argument(
        "--gate", nargs="+", metavar="NAME", help="contenders that may fail by being slower (default: 'skipstep*')"
    )
    parser.add_argument("--measure-again", action="store_true", help="measure what looks slow once more, then decide")
    parser.add_argument("--out", type=Path, help="write the comparison as JSON")
    parser.add_argument(
        "--summary", type=Path, help="append the comparison as Markdown (default: $GITHUB_STEP_SUMMARY where set)"
    )


def run(options: argparse.Namespace) -> int:
    """0, or 1 where the gate fails."""
    from skipstep.bench.compare import GATED, baseline_path, compare_runs, read_baseline, read_run
    from skipstep.bench.record import write_whole

    for path in (options.out, options.summary):
        if path is not None:
            check_writable(path.absolute().parent)
    result = read_run(options.result)
    if options.accept:
        path = baseline_path(options.baseline, result.machine)
        write_whole(path, json.loads(options.result.read_text(encoding="utf-8")))
        print(f"wrote {path}: {len(result.entries)} benchmarks, the baseline of {result.machine}")
        return 0
    baseline = read_baseline(options.baseline, result, result_path=options.result)
    measure_again = None
    if options.measure_again:
        from skipstep.bench.measure_again import measuring_again

        measure_again = measuring_again(options.result, progress=lambda text: print(text, file=sys.stderr, flush=True))
    comparison = compare_runs(
        baseline,
        result,
        limit=options.limit / 100.0,
        gated=options.gate or GATED,
        measure_again=measure_again,
    )
    print(describe(comparison))
    if options.out:
        write_whole(options.out, comparison.as_json())
    summary = options.summary or os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with open(summary, "a", encoding="utf-8") as page:
            page.write(to_markdown(comparison))
    return 0 if comparison.passed else 1


_HEADER = ("case", "contender", "before", "now", "slowdown", "95 % interval", "rounds", "verdict")


def describe(comparison: Comparison) -> str:
    """For a terminal: one line a contender, what could not be compared, then the verdict."""
    rows = [_cells(change) for change in comparison.changes]
    return "\n".join([format_table(_HEADER, rows), *_remarks(comparison), _conclusion(comparison)])


def to_markdown(comparison: Comparison) -> str:
    """The same for a page of a CI service."""
    from skipstep.bench.markdown import markdown

    lines = [f"### {_conclusion(comparison)}", "", markdown(_HEADER, [_cells(each) for each in comparison.changes])]
    return "\n".join([*lines, "", *(f"- {remark}" for remark in _remarks(comparison))]).rstrip() + "\n\n"


def _cells(change: Change) -> list[str]:
    numbers = ["–"] * 5
    if change.slowdown is not None and change.interval is not None:
        numbers = [
            f"{change.ratio_before:.2f}×",
            f"{change.ratio_now:.2f}×",
            f"{change.slowdown:+.1%}",
            "{:+.1%} … {:+.1%}".format(*change.interval),
            f"{change.rounds}, again" if change.again else f"{change.rounds}",
        ]
    verdict = change.verdict.upper() if change.failed else change.verdict
    if change.verdict == "slower" and not change.gated:
        verdict = "slower, not gated"
    return [change.case, change.contender, *numbers, f"{verdict} ({change.reason})" if change.reason else verdict]


def _remarks(comparison: Comparison) -> list[str]:
    return [
        *(f"{name}: only in the baseline" for name in comparison.only_before),
        *(f"{name}: only in the result" for name in comparison.only_now),
        *(f"{name} was {before}, is {now}" for name, before, now in comparison.differences),
    ]


def _conclusion(comparison: Comparison) -> str:
    compared = [change for change in comparison.changes if change.slowdown is not None]
    printed = ("faster", "unclear", "unmeasured", "lost")
    count = {name: sum(each.verdict == name for each in comparison.changes) for name in printed}
    against = f"against the baseline of commit {comparison.baseline_commit}"
    if comparison.failures:
        names = "; ".join(f"{each.contender} ({each.case}) is {each.verdict}" for each in comparison.failures)
        return f"failed {against}, limit {comparison.limit:.0%}: {names}"
    notes = "".join(f", {number} {name}" for name, number in count.items() if number)
    return f"passed {against}, limit {comparison.limit:.0%}: {len(compared)} compared{notes}"
