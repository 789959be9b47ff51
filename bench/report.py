"""Tables of committed results, written into Markdown pages: `python -m skipstep.bench.report bench/results README.md`.

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`; what is between them is replaced. With --check
nothing is written, and the exit status says whether the pages show what the results hold.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from skipstep.bench.gpu.report import gpu_tables
from skipstep.bench.markdown import describe_environment, markdown, read_result
from skipstep.bench.page.numbers import DIFFUSERS, NETWORK, Panel, panels
from skipstep.bench.result_files import REFERENCE, Run, read_runs
from skipstep.errors import InputError

# The number of steps whose cases the tables show.
STEPS = 10


def sampling_table(results: Path) -> str:
    """Our default engine beside the textbook loop and diffusers, one line a network and batch size."""
    found, runs = _panels(results)
    rows = []
    for panel in found:
        medians = [panel.of(name).get(STEPS) for name in (REFERENCE, DIFFUSERS, panel.ours)]
        if all(medians):
            ours, network = (panel.faster(panel.ours, name).get(STEPS) for name in (DIFFUSERS, NETWORK))
            rows.append(
                [
                    panel.subject,
                    str(panel.batch_size),
                    *(f"{entry.median * 1e3:.0f}" for entry in medians if entry),
                    f"{panel.faster(panel.ours)[STEPS]:.2f}×",
                    f"**{ours:.2f}×**",
                    "–" if network is None else f"{1 - network:.1%}",
                ]
            )
    header = ["network", "batch", "textbook, ms", "diffusers, ms", "ours, ms", "against textbook", "against diffusers"]
    return markdown([*header, "outside the network"], rows) + (
        f"\n\n{STEPS} steps a call, medians of whole calls; ratios are medians over rounds, each to the textbook loop "
        f"in the same round. {_where(runs)}."
    )


def contenders_table(results: Path) -> str:
    """Every contender that drew one image in STEPS steps, with its error."""
    found, runs = _panels(results)
    rows = []
    for panel in (panel for panel in found if panel.batch_size == 1):
        entries = [entry for entry in panel.entries if entry.steps == STEPS]
        faster = {entry.contender: panel.faster(entry.contender).get(STEPS, 0.0) for entry in entries}
        for entry in sorted(entries, key=lambda entry: -faster[entry.contender]):
            off = "–" if entry.error is None else f"{entry.error:.1g} of {entry.tolerance or 0:g}"
            # Without a textbook loop in its precision there is no ratio.
            ratio = f"{faster[entry.contender]:.2f}×" if faster[entry.contender] else "–"
            rows.append([panel.subject, entry.contender, f"{entry.median * 1e3:.0f}", ratio, off])
    header = ["network", "contender", "ms", "against textbook", "off by, of at most"]
    return markdown(header, rows) + f"\n\n{STEPS} steps at batch 1. {_where(runs)}."


def _panels(results: Path) -> tuple[list[Panel], list[Run]]:
    runs, _ = read_runs(sorted((results / "runs").glob("*.json")))
    return panels(runs), runs


def _where(runs: Sequence[Run]) -> str:
    facts = dict(runs[-1].versions) | {"cpu": runs[-1].processor, "cores": runs[-1].cores}
    return describe_environment(facts | {"commit": ", ".join(dict.fromkeys(run.commit for run in runs))})


def cold_start_table(results: Path) -> str:
    """Whole processes, from their start to the first image of STEPS steps."""
    found, runs = _panels(results)
    rows = []
    for panel in found:
        entries = {each.contender: each for each in panel.entries if each.steps == STEPS and each.cold_start_seconds}
        theirs = entries[DIFFUSERS].cold_start_seconds if DIFFUSERS in entries else None
        for entry in sorted(entries.values(), key=lambda entry: entry.cold_start_seconds or 0.0):
            seconds, peak = entry.cold_start_seconds or 0.0, entry.peak_bytes or 0.0
            sooner = f"{theirs / seconds:.1f}×" if theirs else "–"
            rows.append([panel.subject, entry.contender, f"{seconds * 1e3:,.0f}", sooner, f"{peak / 2**20:,.0f}"])
    header = ["network", "contender", "ms to the first image", "sooner than diffusers", "peak memory, MiB"]
    return markdown(header, rows) + f"\n\n{STEPS} steps at batch 1, medians of processes. {_where(runs)}."


def finding_table(path: Path) -> str:
    """What a finished experiment found, as it is committed."""
    result = read_result(path)
    note = f"{result['note']} {describe_environment(result['environment'])}."
    return f"{markdown(result['header'], result['rows'])}\n\n{note.strip()}"


TABLES: Mapping[str, Callable[[Path], str]] = {
    "sampling": sampling_table,
    "contenders": contenders_table,
    "cold-start": cold_start_table,
    "gpu": gpu_tables,
}


def fill(page: str, results: Path) -> str:
    """`page` with every marked table made again. Raises InputError for a mark that names no table or has no end."""

    def table(match: re.Match[str]) -> str:
        name, findings = match["name"], {path.stem: path for path in results.glob("[fe]*/*.json")}
        if name not in TABLES and name not in findings:
            got, expected = f"a mark for the table {name!r}", f"one of {', '.join([*TABLES, *sorted(findings)])}"
            raise InputError(
                got=got, expected=expected, remedy="correct the page, or add the table to skipstep.bench.report"
            )
        made = TABLES[name](results) if name in TABLES else finding_table(findings[name])
        return f"<!-- table {name} -->\n{made}\n<!-- end {name} -->"

    filled, count = re.subn(r"<!-- table (?P<name>[\w-]+) -->\n.*?<!-- end (?P=name) -->", table, page, flags=re.DOTALL)
    marks = len(re.findall(r"<!-- table [\w-]+ -->", page))
    if count != marks:
        got, expected = f"{marks} marks of which {count} have an end", "<!-- table NAME --> … <!-- end NAME -->"
        raise InputError(got=got, expected=expected, remedy="close every table's mark")
    return filled


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder with the committed JSON")
    parser.add_argument("pages", type=Path, nargs="+", help="Markdown pages with marks")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    options = parser.parse_args(arguments)
    pages = {path: path.read_text(encoding="utf-8") for path in options.pages}
    stale = {path: filled for path, page in pages.items() if (filled := fill(page, options.results)) != page}
    for path, filled in stale.items():
        if options.check:
            print(f"{path} does not show the results in {options.results}: run make readme-tables", file=sys.stderr)
        else:
            path.write_text(filled, encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
