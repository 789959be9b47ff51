"""An evaluation on paper: tables, plots and pictures on one Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.figure import Figure

from skipstep.bench.markdown import describe_environment, markdown
from skipstep.bench.page.plots import LIGHT, plot_settings
from skipstep.bench.quality.evaluation import LONG, SHORT, Case, Evaluation, Row
from skipstep.bench.quality.pictures import draw_pictures
from skipstep.bench.quality.statistics import BLOCK, Estimate
from skipstep.bench.record import environment, write_json
from skipstep.storage.atomic import atomic_write

PAGE = "evaluation.md"
# Column, its form, its factor, and whether less is better.
_COLUMNS = (
    ("frechet", "Fréchet distance", "{:.2f}", 1.0, True),
    ("kernel", "kernel distance, ×1000", "{:.2f}", 1000.0, True),
    ("rmse", "RMSE to the converged image", "{:.4f}", 1.0, True),
    ("recognised", "recognised, %", "{:.1f}", 100.0, False),
)
# Of each table of cases: its title, and the names of its first two columns.
_TITLES = {
    "fitted-plans": ("Fitted plans beside textbook solvers", ("plan", "steps")),
    "steps": ("Steps and η", ("η", "steps")),
    "spacings": ("Spacings", ("spacing", "steps")),
    "solvers": ("Solvers at equal network evaluations", ("solver", "budget")),
}


def evaluate(evaluation: Evaluation, *, command: str) -> Path:
    """Measure everything and write the page, again after every case. Measured cases are not measured again.

    What takes long comes last: an evaluation that is stopped has all the rest.
    """
    cases, page = evaluation.cases(), evaluation.folder / PAGE
    evaluation.folder.mkdir(parents=True, exist_ok=True)
    head, sections = _introduction(evaluation, command), list[str]()
    others = [draw for name, draw in _OTHERS.items() if name in evaluation.grid.tables]
    measured: dict[Case, Row] = {}

    def write() -> None:
        rows = [(case, measured[case]) for case in cases if case in measured]
        tables = [_section(evaluation, name, rows, command) for name in _TITLES]
        atomic_write(page, ("\n\n".join(each for each in (head, *tables, *sections) if each) + "\n").encode())

    ordered = sorted(cases, key=lambda case: case.plan.num_evaluations)
    short = [case for case in ordered if case.plan.num_evaluations <= SHORT]
    for case in short:
        measured[case] = evaluation.measure(case)
        write()
    sections += [draw(evaluation) for draw in others]
    write()
    for case in ordered[len(short) :]:
        measured[case] = evaluation.measure(case)
        write()
    return page


def _introduction(evaluation: Evaluation, command: str) -> str:
    scale = markdown(
        ["", "Fréchet distance"], [[row["what"], f"{row['frechet']:.2f}"] for row in evaluation.ends_of_the_scale()]
    )
    return (
        f"# Evaluation\n\nMade by `{command}`, on {evaluation.engine.backend}, {evaluation.engine.device}: "
        f"{evaluation.num} samples a case, {evaluation.num_long} of plans of more than {LONG} evaluations, the same "
        f"seeds in each. {describe_environment(environment())}.\n\n"
        f"The distances are to {len(evaluation.reference)} reference images, in the features of a judge: the shipped "
        "classifier unless another was named. They are not FID, and compare on this page among cases of equally many "
        "samples. The kernel distance is a mean over "
        f"blocks of {BLOCK} samples. Converged images are where the same noises lead in many steps; *recognised* is "
        "the share of samples that the judge takes for the class asked for. Each number stands with the interval of "
        "95 % of resampled sets of noises. **Bold** is the best of its column in a table, and all that its interval "
        f"does not separate from it: what is bold does not differ.\n\nThe ends of the scale:\n\n{scale}"
    )


def _section(evaluation: Evaluation, name: str, measured: Sequence[tuple[Case, Row]], command: str) -> str:
    rows = [(case, row) for case, row in measured if case.table == name]
    if not rows:
        return ""
    found = {column: [_read(row[column]) for _, row in rows] for column, *_ in _COLUMNS}
    shown = [each for each in _COLUMNS if any(estimate is not None for estimate in found[each[0]])]
    cells = [_cells(found[column], form, factor, less) for column, _, form, factor, less in shown]
    lines = [
        [*case.labels, str(row["evaluations"]), str(row["samples"]), *(column[i] for column in cells)]
        for i, (case, row) in enumerate(rows)
    ]
    title, first = _TITLES[name]
    header = [*first, "evaluations", "samples", *(title for _, title, *_ in shown)]
    note = "In brackets 95 % of resampled sets of noises; bold is what does not differ from the best."
    if name == "fitted-plans":
        note = f"Guidance {rows[0][0].guidance:g}, trailing spacing, noises that no fit has seen. {note}"
    commit = ", ".join(dict.fromkeys(row["commit"] for _, row in rows))
    finding = {"commit": commit, "command": command, "header": header, "rows": lines, "note": note}
    write_json(evaluation.folder / f"{name}.json", finding)
    points = [(case.labels[0], row["evaluations"], _read(row["frechet"])) for case, row in rows]
    _plot(evaluation.folder / f"{name}.png", points)
    return f"## {title}\n\n{note}\n\n{markdown(header, lines)}\n\n![{title}: distance by evaluations]({name}.png)"


def _read(kept: Row | None) -> Estimate | None:
    return None if kept is None else Estimate(**kept)


def _cells(found: Sequence[Estimate | None], form: str, factor: float, less: bool) -> list[str]:
    known = [each for each in found if each is not None]
    best = (min if less else max)(known, key=lambda each: each.value)
    cells = []
    for each in found:
        if each is None:
            cells.append("–")
            continue
        value, low, high = (form.format(number * factor) for number in (each.value, each.low, each.high))
        cells.append(f"**{value}** ({low} … {high})" if each.overlaps(best) else f"{value} ({low} … {high})")
    return cells


def _interval(kept: Row, form: str) -> str:
    return "{} ({} … {})".format(*(form.format(kept[name]) for name in ("value", "low", "high")))


def _spread(evaluation: Evaluation) -> str:
    rows = evaluation.spread()
    return (
        f"## The difference of runs from one initial noise\n\nVariance between {rows[0]['runs']} runs from one x_T, "
        f"{evaluation.grid.spread_steps} steps, "
        "mean over pixels in [-1, 1]; beside it the closed form for data N(0.3, 0.7²), which is not monotone in η:\n\n"
        + markdown(
            ["η", "this network", "Gaussian data, exact"],
            [[f"{r['eta']:g}", _interval(r["variance"], "{:.4f}"), f"{r['gaussian_data_exact']:.4f}"] for r in rows],
        )
    )


def _inversion(evaluation: Evaluation) -> str:
    rows = evaluation.inversion()
    return (
        f"## Inversion\n\nMean squared error of {rows[0]['images']} reference images, pixels in [0, 1], after "
        f"inversion and sampling with S steps each; refined: {evaluation.grid.refinements} fixed-point iterations a "
        "step. The paper's numbers are for CIFAR-10 (Song, Meng and Ermon 2021, table 2):\n\n"
        + markdown(
            ["S", "plain", "refined", "paper, CIFAR-10"],
            [
                [
                    str(row["steps"]),
                    *(_interval(row[name], "{:.2g}") for name in ("plain", "refined")),
                    f"{row['paper_cifar10'] or '–'}",
                ]
                for row in rows
            ],
        )
    )


def _pictures(evaluation: Evaluation) -> str:
    captions = draw_pictures(evaluation, evaluation.folder)
    return "## Pictures\n\n" + "\n\n".join(f"{caption}\n\n![{name}]({name}.png)" for name, caption in captions.items())


_OTHERS: Final[Mapping[str, Callable[[Evaluation], str]]] = {
    "spread": _spread,
    "inversion": _inversion,
    "pictures": _pictures,
}


def _plot(path: Path, points: Sequence[tuple[str, int, Estimate | None]]) -> None:
    with mpl.rc_context(plot_settings(LIGHT)):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name in dict.fromkeys(name for name, *_ in points):
            line = sorted((count, each) for label, count, each in points if label == name and each is not None)
            counts, values = [count for count, _ in line], [each.value for _, each in line]
            errors = [[each.value - each.low for _, each in line], [each.high - each.value for _, each in line]]
            axes.errorbar(counts, values, yerr=errors, marker="o", capsize=3, label=name)
        axes.set(xlabel="network evaluations", ylabel="Fréchet distance", xscale="log", yscale="log")
        ticks = sorted({count for _, count, _ in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        # A logarithmic axis of about a decade has one labelled tick or none; 1, 2 and 5 of each decade are enough.
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        figure.legend(loc="outside right upper")
        figure.savefig(path, dpi=120)
