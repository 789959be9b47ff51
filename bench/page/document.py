"""Benchmark runs as one page that needs nothing else, and its plots as PNG files beside it.

    write_report([results.json, …], out)      out/report.html   one file: no scripts, nothing fetched, light and dark
                                              out/*.png         the same plots on white

Runs of different machines get a section each and are never drawn into one plot. What was not measured has no section.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from skipstep.bench.page import numbers
from skipstep.bench.page.numbers import DIFFUSERS, NETWORK, Choice, Panel, Quality, geometric_mean, panels
from skipstep.bench.page.plots import STYLE_SHEET, Plot, latency_plots, printable, quality_plot, to_png, to_svg
from skipstep.bench.result_files import REFERENCE, Entry, Run, read_runs
from skipstep.errors import StorageError
from skipstep.storage.atomic import atomic_write
from skipstep.version import __version__

PAGE: Final = "report.html"
_DEADLINES_MS: Final = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)
_NUMBER: Final = re.compile(r"–?|≈? ?[+-]?[0-9][0-9,.]*(e[+-]?[0-9]+)? ?(%|×|ms)?")


def write_report(
    paths: Sequence[Path], folder: Path, *, evaluation: Path | None = None, evaluated_model: str = "fashion-mnist"
) -> tuple[Path, list[str]]:
    """Read result files, write the page and its plots into `folder`, and return the page and notes on unused files.

    `evaluation` is the folder of a skipstep evaluate of the model that the runs call `evaluated_model`; without it the
    page does not compare plans. Raises InputError for files that are no results, and StorageError where the folder
    cannot be written; each file appears whole or not at all.
    """
    runs, notes = read_runs(paths)
    quality = [] if evaluation is None else numbers.read_quality(evaluation)
    # The page may be given to others: it does not name the folders of this machine.
    command = shlex.join(["skipstep", "report", *(path.name if path.is_absolute() else str(path) for path in paths)])
    page, plots = build_page(runs, quality, command=command, evaluated_model=evaluated_model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got, remedy = f"{error.strerror!r} while making {folder}", "name another folder with --out"
        raise StorageError(got=got, expected="a folder to write into", remedy=remedy) from error
    for plot in plots:
        atomic_write(folder / f"{plot.name}.png", to_png(plot))
    atomic_write(folder / PAGE, page.encode())
    return folder / PAGE, notes


def build_page(
    runs: Sequence[Run], quality: Sequence[Quality], *, command: str, evaluated_model: str
) -> tuple[str, list[Plot]]:
    """The page's text and the plots that it shows."""
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Names come from files: what cannot be printed is replaced before the rest is escaped.
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )
    environment.filters |= {
        "svg": lambda plot: Markup(to_svg(plot)),
        "numeric": lambda rows, column: all(_NUMBER.fullmatch(str(row[column])) for row in rows),
    }
    names = list(dict.fromkeys(run.machine for run in runs))
    groups = [[run for run in runs if run.machine == name] for name in names]
    machines = [_machine(f"m{i}", group, quality, evaluated_model) for i, group in enumerate(groups, 1)]
    page = environment.get_template("report.html.j2").render(
        machines=machines, style=Markup(STYLE_SHEET), version=__version__, command=command
    )
    return page, [plot for machine in machines for plot in machine["plots"]]


def _machine(id_: str, runs: Sequence[Run], quality: Sequence[Quality], model: str) -> dict[str, Any]:
    """Everything that the template shows of one machine; the template leaves out what is empty."""
    newest, found = runs[-1], panels(runs)
    entries = [(panel, entry) for panel in found for entry in panel.entries]
    latency = _latency(id_, found)
    choice = _choice(id_, found, quality, model)
    history = [panels([run]) for run in runs]
    return {
        "id": id_,
        "run": newest,
        "models": _listed(entry.model for _, entry in entries),
        "steps": _listed(sorted({entry.steps for _, entry in entries})),
        "batches": _listed(sorted({entry.batch_size for _, entry in entries})),
        "num_cases": sum(len({entry.key for entry in panel.entries}) for panel in found),
        "ours": next((panel.ours for panel in found if panel.ours), None),
        "cards": _cards(found),
        "choice": choice,
        "latency": latency,
        "plots": [plot for block in latency for plot in (*block["open"], *block["folded"])]
        + ([choice["plot"]] if choice and choice["plot"] else []),
        "fits": [
            [panel.title, name, f"{1e3 * fit.fixed:,.2f}", f"{1e3 * fit.per_step:,.2f}", f"{fit.residual:.1%}"]
            for panel in found
            for name in panel.names
            if (fit := panel.fit(name)) is not None
        ],
        "shares": [
            [f"{panel.title}, {steps} steps", f"{100 * (1 - ratio):.1f} %"]
            for panel in found
            for steps, ratio in panel.faster(panel.ours, NETWORK).items()
        ],
        "commits": [row for panel in found if (row := _course(panel, history))],
        "commit_header": ["case", *(run.commit for run in runs), "change"],
        "numbers": [(panel.title, [_row(panel, entry) for entry in panel.entries], panel.ours) for panel in found],
        "costs": _costs([entry for _, entry in entries]),
        "throughput": [
            [panel.title, entry.contender, str(load.callers), f"{load.calls_per_second:.1f}",
             _ms(load.p50_seconds), _ms(load.p99_seconds)]
            for panel, entry in entries
            for load in entry.throughput
        ],
        "absent": _absent(runs, found),
        "commits_shown": _listed(run.commit for run in runs),
        "notes": list(dict.fromkeys(run.note for run in runs if run.note)),
        "commands": list(dict.fromkeys(run.command for run in runs if run.command)),
        "environment": [["commit", newest.commit], *map(list, newest.versions.items())],
    }  # fmt: skip


def _ms(seconds: float | None) -> str:
    """Three digits that count, in milliseconds."""
    value = 1e3 * (seconds or 0)
    return (
        "–" if not seconds else f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    )


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def _listed(values: Iterable[object]) -> str:
    *most, last = list(map(str, dict.fromkeys(values))) or ["none"]
    return f"{', '.join(most)} and {last}" if most else last


def _slug(*words: object) -> str:
    """A name for a file and for ids, whatever the words are."""
    return "-".join(re.findall("[a-z0-9]+", "-".join(map(str, words)).lower()))[:60]


def _cards(found: Sequence[Panel]) -> list[tuple[str, str, str]]:
    """The numbers to take away: each network at its smallest and largest batch, and the first image of a process."""
    cards = []
    for subject in dict.fromkeys(panel.subject for panel in found):
        of = [(panel, values) for panel in found if panel.subject == subject and (values := panel.faster(panel.ours))]
        if not of:
            continue
        (panel, values), (last, final) = of[0], of[-1]
        ends = f"{min(values.values()):.2f} to {_times(max(values.values()))}"
        detail = [f"{panel.title}: {ends} over {len(values)} step counts" if len(values) > 1 else panel.title]
        if last is not panel:
            detail.append(f"{_times(geometric_mean(final.values()))} at batch {last.batch_size}")
        if others := panel.faster(panel.ours, DIFFUSERS):
            detail.append(f"{_times(geometric_mean(others.values()))} against diffusers at batch {panel.batch_size}")
        mean = _times(geometric_mean(values.values()))
        cards.append((mean, "as fast as the textbook PyTorch loop", "; ".join(detail)))
    starts = {entry.contender: entry for panel in found for entry in panel.entries if entry.cold_start_seconds}
    mine = next((starts[panel.ours] for panel in found if panel.ours in starts), None)
    if mine is not None and mine.cold_start_seconds:
        theirs = starts[DIFFUSERS].cold_start_seconds if DIFFUSERS in starts else None
        detail = [f"{mine.steps} steps of {mine.model}", *([f"diffusers takes {theirs:.2g} s"] if theirs else [])]
        number = f"{1e3 * mine.cold_start_seconds:,.0f} ms"
        cards.append((number, "from process start to first image", "; ".join(detail)))
    return cards


def _choice(id_: str, found: Sequence[Panel], quality: Sequence[Quality], model: str) -> dict[str, Any] | None:
    """The curve that a plan is chosen from, the most steps for each deadline, and the plans worth their time."""
    panel = next((panel for panel in found if panel.ours and panel.entries[0].model == model), None)
    plans = numbers.choices(panel, quality) if panel else []
    if panel is None or not plans:
        return None
    return {
        "plot": quality_plot(f"{id_}-quality", f"{panel.title}, {panel.ours}", plans),
        "samples": _listed(sorted({each.quality.samples for each in plans})),
        "deadlines": _deadlines(plans),
        "efficient": [_plan_row(each) for each in numbers.efficient(plans)],
        "all": [_plan_row(each) for each in plans],
    }


def _deadlines(plans: Sequence[Choice]) -> list[list[str]]:
    """Rows of (deadline, steps) where more time buys more steps."""
    rows: list[list[str]] = []
    for limit in _DEADLINES_MS:
        fitting = [each for each in plans if each.p99 is not None and 1e3 * each.p99 <= limit]
        if fitting:
            most = max(fitting, key=lambda each: (each.quality.steps, -each.quality.distance))
            row = [f"{limit:,} ms", str(most.quality.steps), _ms(most.p99), f"{most.quality.distance:.2f}"]
            rows += [row] if not rows or rows[-1][1] != row[1] else []
    return rows


def _plan_row(choice: Choice) -> list[str]:
    quality, estimated = choice.quality, "≈ " if choice.p99 is None else ""
    cells = [estimated + _ms(choice.p50), _ms(choice.p99), f"{quality.distance:.2f}", f"{quality.recognised:.0%}"]
    return [quality.label, str(quality.steps), *cells]


def _latency(id_: str, found: Sequence[Panel]) -> list[dict[str, Any]]:
    """For each network its plots by batch size; the smallest and the largest batch are open."""
    blocks = []
    for subject in dict.fromkeys(panel.subject for panel in found if panel.drawn()):
        of = [panel for panel in found if panel.subject == subject and panel.drawn()]
        pairs = [latency_plots(_slug(id_, found.index(panel) + 1, panel.title), panel) for panel in of]
        ends, inner = [*pairs[0], *(pairs[-1] if len(pairs) > 1 else [])], pairs[1:-1]
        between = _listed(panel.batch_size for panel in of[1:-1]) if inner else ""
        folded = [plot for pair in inner for plot in pair]
        blocks.append({"subject": subject, "open": ends, "folded": folded, "between": between})
    return blocks


def _course(panel: Panel, history: Sequence[Sequence[Panel]]) -> list[str]:
    """Our ratio in each run that has this panel; empty where fewer than two have."""
    same = [next((each for each in of if each.title == panel.title), None) for of in history]
    values = [{} if each is None else each.faster(panel.ours) for each in same]
    measured = [each for each in values if each]
    shared = set.intersection(*map(set, measured)) if len(measured) > 1 else set()
    if not shared:
        return []
    means = [geometric_mean(each[steps] for steps in shared) if each else None for each in values]
    known = [mean for mean in means if mean is not None]
    return [panel.title, *map(_times, means), f"{100 * (known[-1] / known[0] - 1):+.0f} %"]


def _row(panel: Panel, entry: Entry) -> list[str]:
    off = "–" if entry.error is None else f"{entry.error:.1e}" if entry.error else "0"
    seconds = [_ms(each) for each in (entry.median, entry.percentile(90), entry.percentile(99))]
    faster = [_times(panel.faster(entry.contender, name).get(entry.steps)) for name in (REFERENCE, DIFFUSERS)]
    return [str(entry.steps), entry.contender, *seconds, *faster, str(len(entry.data)), off]


def _costs(entries: Sequence[Entry]) -> list[list[str]]:
    """What contenders need besides time, for each the first value that was measured."""
    rows = []
    for model, name in dict.fromkeys((entry.model, entry.contender) for entry in entries):
        of = [entry for entry in entries if (entry.model, entry.contender) == (model, name)]
        build, peak, start = (
            next((value for entry in of if (value := getattr(entry, field)) is not None), None)
            for field in ("build_seconds", "peak_bytes", "cold_start_seconds")
        )
        if peak or start or build:
            memory = "–" if peak is None else f"{peak / 1e6:,.0f}"
            rows.append([model, name, "–" if build is None else f"{build:.1f}", memory, _ms(start)])
    return rows


def _absent(runs: Sequence[Run], found: Sequence[Panel]) -> list[list[str]]:
    """Contenders without a number in any run, and why."""
    measured = {(e.model, e.contender, e.steps, e.batch_size) for panel in found for e in panel.entries}
    where: dict[tuple[str, str], dict[str, None]] = {}
    for each in (each for run in runs for each in run.absent):
        if (each.model, each.contender, each.steps, each.batch_size) not in measured:
            case = f"{each.model}, {each.steps} steps, batch {each.batch_size}"
            where.setdefault((each.contender, each.reason), {})[case] = None
    return [[name, next(iter(of)) if len(of) == 1 else f"{len(of)} cases", why] for (name, why), of in where.items()]
