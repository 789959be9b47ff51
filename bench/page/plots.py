"""The plots of the report, drawn once and saved twice: as SVG inside the page, and as PNG beside it.

A plot names roles ("ours", "muted", …), not colours; the style sheet has a colour for each. In the PNG a role is its
colour on white. In the SVG it is a CSS variable, so that the plot follows the page from light to dark: Matplotlib gets
a placeholder colour for each role, and the finished SVG has the variable in its place.
"""

from __future__ import annotations

import importlib.resources
import io
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from skipstep.bench.page.numbers import Choice, Panel, efficient
from skipstep.bench.result_files import REFERENCE
from skipstep.latency.pareto import Pareto

STYLE_SHEET: Final = (importlib.resources.files(__package__) / "style.css").read_text(encoding="utf-8")
LIGHT: Final = dict(re.findall(r"--(\w+):(#\w{6})", STYLE_SHEET.split("@media")[0]))
_PLACEHOLDERS: Final = {role: f"#01{number:02x}fe" for number, role in enumerate(LIGHT)}
_SVG: Final = "http://www.w3.org/2000/svg"
# Characters that a name must not bring in: they would turn the rest of the line around.
_DIRECTIONS: Final = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)))


def printable(text: str) -> str:
    """Text with what cannot be shown, or would change how its surroundings are shown, replaced by U+FFFD."""
    return "".join(
        "\ufffd" if c in _DIRECTIONS or (unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") and c not in "\n\t") else c
        for c in text
    )


@dataclass(frozen=True, slots=True)
class Line:
    """Points by x, joined; some may be hollow or have a label."""

    label: str
    role: str
    marker: str
    points: Sequence[tuple[float, float]]
    hollow: Sequence[bool] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines over a logarithmic x. `ticks`: the labelled values of x; `rule`: a dashed line at that height."""

    name: str
    title: str
    lines: Sequence[Line]
    x: str
    y: str
    log_y: bool = False
    rule: float | None = None
    ticks: Sequence[int] = ()

    @property
    def alt(self) -> str:
        """In words what the plot shows."""
        ends = (
            f"{each.label}: {each.points[0][1]:.3g} at {each.points[0][0]:.3g}, "
            f"{each.points[-1][1]:.3g} at {each.points[-1][0]:.3g}"
            for each in self.lines
        )
        return f"{self.title}: {self.y} by {self.x}. {'; '.join(ends)}."


def latency_plots(name: str, panel: Panel) -> list[Plot]:
    """Milliseconds by steps, and how many times as fast as the textbook loop."""
    latency, ratio = [], []
    for label, (role, marker) in _marks(panel.drawn(), panel.ours).items():
        points = [(float(steps), 1e3 * entry.median) for steps, entry in panel.of(label).items()]
        latency.append(Line(label, role, marker, points))
        points = [(float(steps), value) for steps, value in panel.faster(label).items()]
        if label != REFERENCE and len(points) > 1:
            ratio.append(Line(label, role, marker, points))
    ticks = sorted({entry.steps for entry in panel.entries})
    title = f"{panel.title}: latency"
    plots = [Plot(f"{name}-latency", title, latency, "steps", "ms a call", log_y=True, ticks=ticks)]
    if ratio:
        title = f"{panel.title}: times as fast as {REFERENCE}"
        plots.append(Plot(f"{name}-ratio", title, ratio, "steps", "times as fast", rule=1, ticks=ticks))
    return plots


def quality_plot(name: str, title: str, plans: Sequence[Choice]) -> Plot | None:
    """Distance by latency, a line a sampler: the one that was timed and at most four others that are worth their time.

    Distances beyond three times the best are left to the table: they would flatten all that matters.
    """
    limit = 3 * max(1.0, min(each.quality.distance for each in plans))
    main = next(each.quality.label for each in plans if each.p99 is not None)
    labels = [each.quality.label for each in (*efficient(plans), *plans) if each.quality.label != main]
    lines = []
    for label, (role, marker) in _marks([*list(dict.fromkeys(labels))[:4], main], main).items():
        shown = [each for each in plans if each.quality.label == label and each.quality.distance <= limit]
        points = [(1e3 * each.p50, each.quality.distance) for each in shown]
        steps = [str(each.quality.steps) for each in shown] if label == main else []
        if len(points) > 1:
            lines.append(Line(label, role, marker, points, [each.p99 is None for each in shown], steps))
    return Plot(name, f"Quality against latency: {title}", lines, "ms a call", "Fréchet distance") if lines else None


def pareto_plot(table: Pareto) -> Plot:
    """Distance to the converged images by latency: fitted plans, and a line a textbook solver; hollow is dominated."""
    measured = [each for each in table if each.rmse is not None]
    solvers = list(dict.fromkeys(each.plan.solver for each in measured))
    lines = []
    for label, (role, marker) in _marks(solvers, "fitted").items():
        shown = [each for each in measured if each.plan.solver == label]
        if shown:
            points = [(each.p50_ms, each.rmse or 0.0) for each in shown]
            steps = [str(each.plan.steps) for each in shown]
            lines.append(Line(label, role, marker, points, [each.dominated for each in shown], steps))
    title = f"Quality against latency at batch {table.batch_size}"
    return Plot("pareto", title, lines, "ms a call", "RMSE to the converged image", log_y=True)


def _marks(names: Sequence[str], ours: str | None) -> dict[str, tuple[str, str]]:
    """Role and marker of each name: ours stands out, the textbook loop is grey."""
    fixed = {ours: ("ours", "o"), REFERENCE: ("reference", "s")}
    others = [name for name in names if name not in fixed]
    return {name: fixed.get(name) or (f"s{others.index(name) + 1}", "^Dv<>p"[others.index(name)]) for name in names}


def plot_settings(colours: Mapping[str, str]) -> dict[Any, Any]:
    """Matplotlib's settings for every plot of the project."""
    muted = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        "svg.fonttype": "none",  # Text stays text: it takes the page's font and can be searched.
        "svg.hashsalt": "skipstep",
        "text.parse_math": False,  # Names come from files; a dollar sign in one is no formula.
        "font.family": "DejaVu Sans",
        "text.color": colours["ink"],
        **dict.fromkeys(muted, colours["muted"]),
        **dict.fromkeys(("font.size", "axes.labelsize"), 8.5),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **dict.fromkeys(("axes.axisbelow", "axes.grid"), True),
        **dict.fromkeys(("xtick.minor.size", "ytick.minor.size"), 0),
        **dict.fromkeys(("figure.constrained_layout.w_pad", "figure.constrained_layout.h_pad"), 0.07),
        "grid.color": colours["line"],
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
    }


def to_svg(plot: Plot) -> str:
    """The plot as an SVG element without a size; its colours are variables, and its ids begin with its name."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(_draw(plot, _PLACEHOLDERS, format="svg", transparent=True, metadata={"Date": None}))
    for parent in root.iter():
        for child in list(parent):
            # Matplotlib's own style sheet would apply to the whole page.
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    variables = {colour: f"var(--{role})" for role, colour in _PLACEHOLDERS.items()}
    for each in root.iter():
        for key, value in each.attrib.items():
            if key == "id":
                value = f"{plot.name}-{value}"
            elif key.endswith("href") and value.startswith("#"):
                value = f"#{plot.name}-{value[1:]}"
            value = value.replace("url(#", f"url(#{plot.name}-")
            if key in ("style", "fill", "stroke"):
                value = re.sub(r"#01\w\wfe", lambda match: variables[match[0]], value)
            each.attrib[key] = value
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": printable(plot.alt), "class": "plot"})
    return ElementTree.tostring(root, encoding="unicode")


def to_png(plot: Plot) -> bytes:
    """The plot on white, with title and legend."""
    return _draw(plot, LIGHT, format="png", dpi=200, metadata={"Software": None})


def _draw(plot: Plot, colours: Mapping[str, str], **options: Any) -> bytes:
    buffer, legend = io.BytesIO(), options["format"] == "png"
    with mpl.rc_context(plot_settings(colours)):
        # The page has title and legend in its own text; in the PNG they must not take the plot's room.
        height = 2.6 + (0.3 + 0.18 * math.ceil(len(plot.lines) / 2) if legend else 0)
        figure = Figure(figsize=(4.0, height), layout="constrained", facecolor=colours["surface"])
        axes = figure.add_subplot(facecolor="none")
        if plot.rule is not None:
            axes.axhline(plot.rule, color=colours["reference"], linewidth=1.4, linestyle=(0, (4, 3)))
        for line in plot.lines:
            ours, colour = line.role == "ours", colours[line.role]
            xs, ys = zip(*line.points, strict=True)
            axes.plot(xs, ys, color=colour, linewidth=2.4 if ours else 1.3, zorder=4 if ours else 3)
            faces = [colours["surface"] if hollow else colour for hollow in line.hollow] or colour
            size, order = (30, 5) if ours else (18, 4)
            axes.scatter(xs, ys, s=size, c=faces, edgecolors=colour, marker=line.marker, zorder=order)
            look: dict[str, Any] = {
                "textcoords": "offset points",
                "fontsize": 10,
                "fontweight": "bold",
                "color": colour,
            }
            for text, place in zip(line.labels, line.points, strict=False):
                axes.annotate(text, place, (4, 5), **look)
        axes.set(xlabel=plot.x, ylabel=plot.y, xscale="log", yscale="log" if plot.log_y else "linear")
        axes.margins(x=0.08, y=0.12)
        for axis in (axes.xaxis, axes.yaxis) if plot.log_y else (axes.xaxis,):
            axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
            axis.set_minor_locator(ticker.NullLocator())
        if plot.ticks:
            axes.set_xticks(plot.ticks, [str(tick) for tick in plot.ticks])
        if legend:
            axes.set_title(_short(plot.title, 60), fontsize=9, loc="left", pad=10)
            marks = [Line2D([], [], color=colours[each.role], marker=each.marker) for each in plot.lines]
            names = [_short(each.label, 36) for each in plot.lines]
            figure.legend(marks, names, loc="outside lower left", ncols=2, fontsize=7.5)
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _short(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"
