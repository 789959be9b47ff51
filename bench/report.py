"""Tables of committed results, written into a page: `python -m skipstep.bench.report README.md bench/results`.

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`; what is between them is replaced. With --check
nothing is written, and the exit status says whether the page shows what the results hold.
"""

from __future__ import annotations

import argparse
import importlib
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from skipstep.bench.markdown import describe_environment, markdown, read_result
from skipstep.bench.results import REFERENCE, Contender, Run, read_run
from skipstep.bench.timing import median_ratio
from skipstep.errors import InputError

# Runs of the suite, one file a network, below the folder of committed results.
RUNS = "runs"
# The step count whose cases the tables show; the fits tell of all.
STEPS = 10
OURS, DIFFUSERS = "skipstep-onnx", "diffusers"


def sampling_table(results: Path) -> str:
    """Our default engine beside the textbook loop and diffusers, one line a network and batch size."""
    runs = _runs(results)
    rows = []
    for run in runs:
        fits = {(fit["batch_size"], fit["contender"]): fit for fit in run.measurements.get("fits", [])}
        for case in run.cases:
            ours, diffusers, textbook = (case.contender(name) for name in (OURS, DIFFUSERS, REFERENCE))
            if case.steps != STEPS or ours is None or diffusers is None or textbook is None:
                continue
            if not (ours.seconds and diffusers.seconds and ours.ratio):
                continue
            fit = fits.get((case.batch_size, OURS))
            outside = case.outside_network
            rows.append(
                [
                    case.model,
                    str(case.batch_size),
                    *(_milliseconds(each) for each in (textbook, diffusers, ours)),
                    f"{ours.ratio:.2f}×",
                    f"**{median_ratio(list(diffusers.seconds), list(ours.seconds)):.2f}×**",
                    "–" if fit is None else f"{fit['fixed_seconds'] * 1e3:.1f} + {fit['per_step_seconds'] * 1e3:.1f}·S",
                    "–" if outside is None else f"{outside:.1%}",
                ]
            )
    header = [
        "network",
        "batch",
        "textbook, ms",
        "diffusers, ms",
        "ours, ms",
        "against textbook",
        "against diffusers",
        "ours over S steps, ms",
        "outside the network",
    ]
    return markdown(header, rows) + (
        f"\n\n{STEPS} steps a call, medians of whole calls; ratios are medians of those of single turns. Outside the "
        "network is what as many runs of the network alone leave over: noise, where it is negative. "
        f"{describe_environment(runs[0].environment)}, {runs[0].options['threads']} threads."
    )


def contenders_table(results: Path) -> str:
    """Everybody who drew one image in STEPS steps, with what each is off by, and why some have no number."""
    rows = []
    for run in _runs(results):
        for case in run.cases:
            if (case.steps, case.batch_size) != (STEPS, 1):
                continue
            for each in sorted(case.contenders, key=lambda each: -(each.ratio or 0.0)):
                ok = each.status == "ok"
                rows.append(
                    [
                        case.model,
                        each.name,
                        _milliseconds(each) if ok else each.status,
                        f"{each.ratio:.2f}×" if ok and each.ratio else "–",
                        "–" if each.error is None else f"{each.error:.1g} of {each.tolerance:g}",
                    ]
                )
    return markdown(["network", "contender", "ms", "against textbook", "off by, of at most"], rows)


def _milliseconds(contender: Contender) -> str:
    return f"{statistics.median(contender.seconds) * 1e3:.0f}"


def _runs(results: Path) -> list[Run]:
    files = sorted((results / RUNS).glob("*.json"))
    if not files:
        raise InputError(
            got=f"no benchmark runs in {results / RUNS}", expected="a file a network", remedy="run make bench"
        )
    return [read_run(file) for file in files]


def agreement_table(results: Path) -> str:
    """Samples that a separate classifier recognises as the class that was asked for."""
    result = read_result(results / "class-agreement.json")
    runs = result["results"]
    weakest = {run["steps"]: min(run["agreement_by_class"].items(), key=lambda item: item[1]) for run in runs}
    rows = [
        [str(run["steps"]), f"{run['agreement']:.1%}", f"{weakest[run['steps']][1]:.0%} ({weakest[run['steps']][0]})"]
        for run in runs
    ]
    first = runs[0]
    return markdown(["steps", "recognised", "weakest class"], rows) + (
        f"\n\n{first['num_samples']} samples each, the same seeds, guidance scale {first['guidance_scale']:g}."
    )


def partition_table(results: Path) -> str:
    """What each network evaluates at which time: nodes, operations for one sample, and weights."""
    rows = []
    for network in read_result(results / "partition.json")["networks"]:
        parts = network["parts"]
        cells = [
            f"{part['nodes']} ({part['flops'] / 1e6:,.1f} MFLOP, {part['weight_bytes'] / 1e6:.1f} MB)" if part else "–"
            for part in (parts.get(name) for name in ("plan", "prompt", "call", "step"))
        ]
        crossing = [str(part["crossing"]) for name in ("plan", "prompt", "call") if (part := parts.get(name))]
        rows.append([network["model"], *cells, " + ".join(crossing)])
    header = [
        "network",
        "nodes once per plan",
        "per prompt",
        "per call, all stages",
        "at every step",
        "values that cross",
    ]
    return markdown(header, rows)


def cold_start_table(results: Path) -> str:
    """Whole processes, from their start to the first image."""
    result = read_result(results / "cold-start.json")
    seconds = result["median_seconds"]
    rows = [
        ["Python alone", f"{seconds['interpreter'] * 1e3:.0f}", ""],
        [
            "skipstep, from the bundle",
            f"{seconds['bundle'] * 1e3:.0f}",
            f"**{result['ratio_to_diffusers']:.1f}×** sooner",
        ],
        ["diffusers, from the checkpoint", f"{seconds['diffusers'] * 1e3:.0f}", ""],
    ]
    return markdown(["process", "ms", ""], rows) + (
        f"\n\n{result['steps']} steps at batch 1, medians of {len(result['seconds']['bundle'])} processes each, taking "
        f"turns. {describe_environment(result['environment'])}."
    )


def bundles_table(results: Path) -> str:
    """What bundles hold for each kind of target, and how long that took to make."""
    result = read_result(results / "bundles.json")
    rows = []
    for bundle in result["bundles"]:
        sizes, seconds = bundle["bytes"], bundle["seconds"]
        engines = sum(time for step, time in seconds.items() if step.startswith("rtx"))
        rows.append(
            [
                bundle["model"],
                f"{bundle['build_seconds']:.0f}",
                f"{sizes['cpu'] / 1e6:.1f}",
                f"{bundle['engines']} in {engines:.0f} s, {sizes['engines'] / 1e6:.0f} MB",
                f"{bundle['kernels']}, {sizes['kernels'] / 1e3:.0f} kB",
                f"{bundle['golden_error']:.1g}",
            ]
        )
    header = [
        "network",
        "export, s",
        "one graph for the CPU, MB",
        "RTX engines",
        "step kernels",
        "golden samples off by",
    ]
    return markdown(header, rows) + (
        f"\n\nTargets {', '.join(result['targets'])}; {result['precision']} on GPUs, plans of "
        f"{', '.join(map(str, result['steps']))} steps, batch {result['batch_sizes'][0]}. "
        f"{describe_environment(result['environment'])}."
    )


def openvino_table(results: Path) -> str:
    """The step network in two runtimes, and what OpenVINO made of being asked for bfloat16."""
    result = read_result(results / "openvino.json")
    rows = [
        [
            network["model"],
            *(f"{milliseconds:.1f}" for milliseconds in network["milliseconds"].values()),
            network["ran_in"]["openvino bf16"],
        ]
        for network in result["networks"]
    ]
    contenders = [f"{name}, ms" for name in result["networks"][0]["milliseconds"]]
    return markdown(["network, batch 1", *contenders, "asked for bf16, it ran in"], rows) + (
        f"\n\nMedians over processes that take turns. {describe_environment(result['environment'])}."
    )


# Where each table is made. Modules are imported when their table is wanted: some measure, and need much for that.
TABLES: Mapping[str, str] = {
    "sampling": "skipstep.bench.report:sampling_table",
    "contenders": "skipstep.bench.report:contenders_table",
    "agreement": "skipstep.bench.report:agreement_table",
    "kernel": "skipstep.bench.step_codegen:codegen_table",
    "partition": "skipstep.bench.report:partition_table",
    "cold-start": "skipstep.bench.report:cold_start_table",
    "bundles": "skipstep.bench.report:bundles_table",
    "openvino": "skipstep.bench.report:openvino_table",
    "step-reference": "skipstep.bench.step_reference:reference_table",
    "estimate": "skipstep.bench.gpu_estimate:estimate_table",
    "gpu": "skipstep.bench.gpu.report:gpu_tables",
    "planted": "skipstep.bench.planted:planted_table",
}


def fill(page: str, results: Path) -> str:
    """`page` with every marked table made again. Raises InputError for a mark that names no table or has no end."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise InputError(
                got=f"a mark for the table {name!r}",
                expected=f"one of {', '.join(TABLES)}",
                remedy="correct the page, or add the table to skipstep.bench.report",
            )
        module, function = TABLES[name].split(":")
        made = getattr(importlib.import_module(module), function)(results)
        return f"<!-- table {name} -->\n{made}\n<!-- end {name} -->"

    filled, count = re.subn(r"<!-- table (?P<name>[\w-]+) -->\n.*?<!-- end (?P=name) -->", table, page, flags=re.DOTALL)
    marks = len(re.findall(r"<!-- table [\w-]+ -->", page))
    if count != marks:
        raise InputError(
            got=f"{marks} marks of which {count} have an end",
            expected="<!-- table NAME --> … <!-- end NAME -->",
            remedy="close every table's mark",
        )
    return filled


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the Markdown page with marks")
    parser.add_argument("results", type=Path, help="folder with the committed JSON")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    options = parser.parse_args(arguments)
    page = options.page.read_text(encoding="utf-8")
    filled = fill(page, options.results)
    if options.check:
        if filled != page:
            print(f"{options.page} is not what {options.results} holds: run make readme-tables", file=sys.stderr)
        return int(filled != page)
    options.page.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
