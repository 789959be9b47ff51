"""An evaluation on paper: one CSV and one PNG per table, and a Markdown page that shows them all."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skipstep.bench.markdown import describe_environment, markdown
from skipstep.bench.quality.evaluation import PAPER_FID, PAPER_STEPS, Evaluation, Row
from skipstep.bench.quality.pictures import draw_pictures
from skipstep.bench.record import environment
from skipstep.errors import MissingDependencyError
from skipstep.storage.atomic import atomic_write

PAGE = "evaluation.md"


def evaluate(evaluation: Evaluation, folder: Path, *, command: str) -> Path:
    """Measure everything, write it into `folder`, and return the page. Measured chunks are not measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = (_steps_and_eta, _spacings, _solvers, _spread, _inversion, _ancestral, _pictures)
    sections = [_introduction(evaluation, command), *(part(evaluation, folder) for part in parts)]
    page = folder / PAGE
    atomic_write(page, ("\n\n".join(sections) + "\n").encode())
    return page


def _introduction(evaluation: Evaluation, command: str) -> str:
    ends = evaluation.ends_of_the_scale()
    scale = markdown(
        ["", "proxy Fréchet", "recognised"],
        [[row["what"], f"{row['proxy_frechet']:.1f}", f"{row['agreement']:.0%}"] for row in ends],
    )
    return (
        f"# Evaluation\n\nMade by `{command}`: {evaluation.num_samples} samples a case, the same seeds in each, "
        f"no guidance, {evaluation.engine.backend} on {evaluation.engine.device}. "
        f"{describe_environment(environment())}.\n\n"
        "The **proxy Fréchet distance** is between Gaussians fitted to the features of this repository's own "
        "classifier and those of the 10 000 test images. It is not FID, and compares only within this page: with few "
        "samples it is biased upward, alike in every case of one size. *Recognised* is the share of samples that the "
        f"classifier takes for the requested class. The ends of the scale, with as many images:\n\n{scale}"
    )


def _steps_and_eta(evaluation: Evaluation, folder: Path) -> str:
    rows, etas, counts = evaluation.quality_by_steps_and_eta(), evaluation.grid.etas, evaluation.grid.steps
    _write_csv(folder / "quality.csv", rows)

    def table(form: Callable[[Row], str]) -> str:
        cells = {(row["steps"], row["eta"]): form(row) for row in rows}
        lines = [[_eta_name(eta), *(cells[steps, eta] for steps in counts)] for eta in etas]
        return markdown(["η", *(f"S = {steps}" for steps in counts)], lines)

    lines = {f"η = {_eta_name(e)}": [(r["steps"], r["proxy_frechet"]) for r in rows if r["eta"] == e] for e in etas}
    _plot(folder / "quality.png", lines, x="steps", y="proxy Fréchet distance", log=True)
    paper = [[_eta_name(eta), *(f"{value:.2f}" for value in PAPER_FID[eta])] for eta in PAPER_FID]
    return (
        "## Steps and η\n\nProxy Fréchet distance:\n\n"
        + table(lambda row: f"{row['proxy_frechet']:.1f}")
        + "\n\nRecognised:\n\n"
        + table(lambda row: f"{row['agreement']:.0%}")
        + "\n\n![Proxy Fréchet distance by steps](quality.png)\n\nThe DDIM paper's own table, for the shape of it "
        "(CIFAR-10, FID, quadratic spacing; Song, Meng and Ermon 2021, table 1):\n\n"
        + markdown(["η", *(f"S = {steps}" for steps in PAPER_STEPS)], paper)
    )


def _spacings(evaluation: Evaluation, folder: Path) -> str:
    rows = evaluation.quality_by_spacing()
    _write_csv(folder / "spacings.csv", rows)
    cells = {(row["spacing"], row["steps"]): f"{row['proxy_frechet']:.1f}" for row in rows}
    names = list(dict.fromkeys(row["spacing"] for row in rows))
    counts = evaluation.grid.steps
    lines = [[name, *(cells.get((name, steps), "–") for steps in counts)] for name in names]
    return (
        "## Uniform and quadratic spacing\n\nProxy Fréchet distance, η = 0; – where that many distinct timesteps do "
        "not exist:\n\n" + markdown(["spacing", *(f"S = {steps}" for steps in counts)], lines)
    )


def _solvers(evaluation: Evaluation, folder: Path) -> str:
    rows = evaluation.quality_by_solver()
    _write_csv(folder / "solvers.csv", rows)
    budgets = sorted({row["budget"] for row in rows})
    cells = {(r["solver"], r["budget"]): f"{r['proxy_frechet']:.1f} ({r['evaluations']})" for r in rows}
    names = list(dict.fromkeys(row["solver"] for row in rows))
    lines = {name: [(r["evaluations"], r["proxy_frechet"]) for r in rows if r["solver"] == name] for name in names}
    _plot(folder / "solvers.png", lines, x="network evaluations", y="proxy Fréchet distance", log=True)
    return (
        "## Solvers at equal network evaluations\n\nProxy Fréchet distance (evaluations made):\n\n"
        + markdown(
            ["solver", *(f"at most {budget}" for budget in budgets)],
            [[name, *(cells[name, budget] for budget in budgets)] for name in names],
        )
        + "\n\n![Proxy Fréchet distance by network evaluations](solvers.png)"
    )


def _spread(evaluation: Evaluation, folder: Path) -> str:
    rows = evaluation.spread()
    _write_csv(folder / "spread.csv", rows)
    lines = {
        "model": [(row["eta"], row["variance"]) for row in rows],
        "Gaussian data, exact": [(row["eta"], row["gaussian_data_exact"]) for row in rows],
    }
    _plot(folder / "spread.png", lines, x="η", y="variance between runs")
    return (
        f"## The difference of runs from one initial noise\n\nVariance between {rows[0]['runs']} runs from one x_T, "
        f"S = {evaluation.grid.spread_steps}, "
        "mean over pixels in [-1, 1]; beside it the closed form for data N(0.3, 0.7²), which is not monotone in η:\n\n"
        + markdown(
            ["η", "this model", "Gaussian data, exact"],
            [[f"{r['eta']:g}", f"{r['variance']:.4f}", f"{r['gaussian_data_exact']:.4f}"] for r in rows],
        )
        + "\n\n![Variance between runs by η](spread.png)"
    )


def _inversion(evaluation: Evaluation, folder: Path) -> str:
    rows = evaluation.inversion()
    _write_csv(folder / "inversion.csv", rows)
    lines = {name: [(row["steps"], row[name]) for row in rows] for name in ("plain", "refined")}
    _plot(folder / "inversion.png", lines, x="steps", y="mean squared error", log=True)
    return (
        f"## Inversion\n\nMean squared error of {rows[0]['images']} test images, pixels in [0, 1], after inversion "
        f"and sampling with S steps each; refined: {evaluation.grid.refinements} fixed-point iterations a step. The "
        "paper's numbers are for CIFAR-10 (table 2 there):\n\n"
        + markdown(
            ["S", "plain", "refined", "paper, CIFAR-10"],
            [
                [str(r["steps"]), f"{r['plain']:.2g}", f"{r['refined']:.2g}", f"{r['paper_cifar10'] or '–'}"]
                for r in rows
            ],
        )
        + "\n\n![Reconstruction error by steps](inversion.png)"
    )


def _ancestral(evaluation: Evaluation, folder: Path) -> str:
    rows = evaluation.ancestral()
    _write_csv(folder / "ancestral.csv", rows)
    return "## DDPM and DDIM\n\nTwo runs of each share x_T; pixels in [0, 1].\n\n" + markdown(
        ["sampler", "evaluations", "ms per image", "MSE between two runs", "proxy Fréchet", "recognised"],
        [
            [
                row["sampler"],
                str(row["evaluations"]),
                f"{row['ms_per_image']:.0f}",
                f"{row['mse_between_two_runs']:.3g}",
                f"{row['proxy_frechet']:.1f}",
                f"{row['agreement']:.0%}",
            ]
            for row in rows
        ],
    )


def _pictures(evaluation: Evaluation, folder: Path) -> str:
    captions = draw_pictures(evaluation, folder)
    return "## Pictures\n\n" + "\n\n".join(f"{caption}\n\n![{name}]({name}.png)" for name, caption in captions.items())


def _eta_name(eta: float | str) -> str:
    return "σ̂" if isinstance(eta, str) else f"{eta:g}"


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())


def _plot(path: Path, lines: Mapping[str, Sequence[tuple[Any, Any]]], *, x: str, y: str, log: bool = False) -> None:
    try:
        import matplotlib as mpl
        from matplotlib import ticker
        from matplotlib.figure import Figure

        from skipstep.bench.page.plots import LIGHT, plot_settings
    except ImportError as error:
        raise MissingDependencyError(
            got="no package matplotlib", expected="it, for the plots", remedy="pip install 'skipstep[evaluate]'"
        ) from error
    with mpl.rc_context(plot_settings(LIGHT)):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=x, ylabel=y)
        if log:
            axes.set(xscale="log", yscale="log")
            ticks = sorted({float(point[0]) for points in lines.values() for point in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            # A logarithmic axis of about a decade has one labelled tick or none; 1, 2 and 5 of each decade are enough.
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.legend()
        figure.savefig(path, dpi=120)
