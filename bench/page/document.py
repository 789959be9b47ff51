"""Benchmark runs as one page that needs nothing else, and its plots as PNG files beside it.

    write_report([results, …], out)      out/report.html   one file: no scripts, nothing fetched, light and dark
                                         out/*.png         the same plots on white

Runs of different machine classes get a section each and are never drawn into one plot. What is missing is named, with
the command that would make it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from skipstep.bench.page.canvas import to_png
from skipstep.bench.page.html import Html, element, join
from skipstep.bench.page.inputs import ReportInputs, read_inputs
from skipstep.bench.page.parts import Album
from skipstep.bench.page.plan import plan_section
from skipstep.bench.page.roofline import roofline_section
from skipstep.bench.page.sections import (
    cards,
    course_section,
    latency_section,
    styles_for,
    summary,
    time_section,
)
from skipstep.bench.page.style import style_sheet
from skipstep.bench.page.tables import absent_section, environment_section, measurements_section, numbers_section
from skipstep.errors import StorageError
from skipstep.storage.atomic import atomic_write
from skipstep.version import __version__

PAGE: Final = "report.html"
# Nothing may be loaded or run, whatever a name in a result contains.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(
    paths: Sequence[Path],
    folder: Path,
    *,
    evaluation: Path | None = None,
    evaluated_model: str = "fashion-mnist",
) -> tuple[Path, tuple[str, ...]]:
    """Read result files, write the page and its plots into `folder`, and return the page and notes on files left aside.

    `evaluation` is the folder of a skipstep evaluate of the model that the runs call `evaluated_model`; without it the
    page has no quality curve. Raises InputError for files that are no results, MissingDependencyError without
    matplotlib, and StorageError where the folder cannot be written; the page appears whole or not at all.
    """
    inputs = read_inputs(paths, evaluation=evaluation)
    # The page may be given to others, whom the folders of this machine do not concern.
    names = [path.name if path.is_absolute() else str(path) for path in paths]
    command = shlex.join(["skipstep", "report", *names])
    page, album = build_page(inputs, command=command, evaluated_model=evaluated_model)
    pictures = {f"{plot.name}.png": to_png(plot) for plot in album.plots}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            got=f"{error.strerror!r} while making {folder}",
            expected="a folder to write into",
            remedy="name another folder with --out",
        ) from error
    for name, data in pictures.items():
        atomic_write(folder / name, data)
    atomic_write(folder / PAGE, page.encode())
    return folder / PAGE, inputs.notes


def build_page(inputs: ReportInputs, *, command: str, evaluated_model: str) -> tuple[str, Album]:
    """The page's text and the plots that it shows."""
    album = Album()
    many = len(inputs.groups) > 1
    sections, links = [], []
    for number, group in enumerate(inputs.groups, 1):
        id_ = f"m{number}"
        ours, styles = styles_for(group)
        parts = {
            "Choose a plan": plan_section(group, ours, inputs.quality, evaluated_model, album, f"{id_}-plan"),
            "Latency": latency_section(group, styles, album, f"{id_}-latency"),
            "Where the time goes": time_section(group, ours, album, f"{id_}-time"),
            "Over commits": course_section(group, ours, album, f"{id_}-commits"),
            "All numbers": numbers_section(group, ours, f"{id_}-numbers"),
            "Without a number": absent_section(group, f"{id_}-without"),
            "Measured besides": measurements_section(group, f"{id_}-besides"),
            "Environment": environment_section(group, f"{id_}-environment"),
        }
        title = element("h2", group.machine_class, id=f"{id_}-title")
        top = element("div", title, summary(group, ours), cards(group, ours), class_="class")
        shown = [part for part in parts.values() if part is not None]
        sections.append(element("section", top, *shown, id=id_, aria_labelledby=f"{id_}-title"))
        names = ["plan", "latency", "time", "commits", "numbers", "without", "besides", "environment"]
        links += (
            [(id_, group.machine_class)]
            if many
            else [(f"{id_}-{n}", t) for n, (t, part) in zip(names, parts.items(), strict=True) if part is not None]
        )
    roofline = element(
        "section", element("h2", "The step kernel's roofline", id="roofline-title"), *roofline_section(inputs, album),
        id="roofline", aria_labelledby="roofline-title",
    )  # fmt: skip
    links.append(("roofline", "Roofline"))
    navigation = element(
        "nav", element("ul", *(element("li", element("a", words, href=f"#{id_}")) for id_, words in links)),
        aria_label="On this page",
    )  # fmt: skip
    return _document(inputs, navigation, [*sections, roofline], command), album


def _document(inputs: ReportInputs, navigation: Html, sections: Sequence[Html], command: str) -> str:
    classes = [group.machine_class for group in inputs.groups]
    count = sum(len(group.cases()) for group in inputs.groups)
    machines = "one class of machine" if len(classes) == 1 else f"{len(classes)} classes of machine"
    lede = f"{count} cases on {machines}, every contender with the same weights, noise, steps and threads."
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"skipstep {__version__}"),
        element("title", f"skipstep benchmark: {', '.join(classes)}"),
        element("style", Html(style_sheet())),
    )
    header = element(
        "header",
        element("div", _brand(), "skipstep benchmark report", class_="brand"),
        element("h1", "How fast the samplers are, and what a step is worth"),
        element("p", lede, class_="lede"),
        navigation,
    )
    made = join([f"Made by skipstep {__version__} with ", element("code", command), "."])
    footer = element("footer", element("p", made, " The plots lie beside this page as PNG files."))
    body = element("body", header, element("main", *sections), footer)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _brand() -> Html:
    """A schedule of which most steps are skipped."""
    dots = [
        element("circle", cx=6 + 12 * i, cy=8, r=4.6 if i % 3 == 0 else 2,
                fill="var(--ours)" if i % 3 == 0 else "var(--reference)")
        for i in range(10)
    ]  # fmt: skip
    return element("svg", *dots, viewBox="0 0 120 16", aria_hidden="true")
