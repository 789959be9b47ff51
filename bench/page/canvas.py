"""A plot that is drawn once and saved twice: as SVG for the inside of a page, and as PNG beside it.

A plot names roles ("ours", "muted", …), not colours. In the PNG a role is a colour on white. In the SVG it is a CSS
variable, so that the plot follows the page from light to dark without a second copy: Matplotlib gets a placeholder
colour for each role, and the finished SVG has the variable in its place.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal
from xml.etree import ElementTree

from skipstep.bench.page.html import Html, plain
from skipstep.bench.page.style import LIGHT
from skipstep.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLACEHOLDERS: Final = {role: f"#01{number:02x}fe" for number, role in enumerate(LIGHT)}
_SVG: Final = "http://www.w3.org/2000/svg"
_XLINK: Final = "http://www.w3.org/1999/xlink"
_WIDTH_INCHES: Final = 4.0
_PNG_DPI: Final = 200


@dataclass(frozen=True, slots=True)
class Style:
    """How one contender or plan is drawn everywhere on the page."""

    role: str
    marker: str = "o"
    dash: Literal["-", "--"] = "-"


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot that can be drawn. `alt` says in words what it shows; `legend` names its styles, in order."""

    name: str
    title: str
    alt: str
    draw: Callable[[Axes, Mapping[str, str]], None]
    legend: Sequence[tuple[str, Style]] = ()
    height: float = 2.6


def styles_of(names: Sequence[str], *, ours: str | None, reference: str) -> dict[str, Style]:
    """A style for each name: ours stands out, the reference stays grey, and no two share colour and marker."""
    styles = {}
    others = 0
    for name in names:
        if name == ours:
            styles[name] = Style("ours", "o")
        elif name == reference:
            styles[name] = Style("reference", "s")
        else:
            turn, number = divmod(others, 7)
            styles[name] = Style(f"s{number + 1}", "^Dv<>ph"[(number + turn) % 7], "--" if turn % 2 else "-")
            others += 1
    return styles


def to_svg(plot: Plot) -> Html:
    """The plot as an SVG element for the inside of a page: no size of its own, colours by variable, ids of its own."""
    buffer = io.BytesIO()
    with _figure(plot, _PLACEHOLDERS) as (figure, _):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in list(parent):
            # Matplotlib's own style sheet speaks of every element, which inside a page is all of the page.
            if child.tag == f"{{{_SVG}}}style" or child.tag.endswith("}metadata") or child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
    variables = {colour: f"var(--{role})" for role, colour in _PLACEHOLDERS.items()}
    for each in root.iter():
        for key, value in list(each.attrib.items()):
            each.attrib[key] = _page_value(key, value, plot.name, variables)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": plain(plot.alt), "class": "plot"})
    return Html(ElementTree.tostring(root, encoding="unicode"))


def to_png(plot: Plot) -> bytes:
    """The plot on white, with title and legend."""
    buffer = io.BytesIO()
    with _figure(plot, LIGHT) as (figure, axes):
        # The page has title and legend in its own text; here they must not take the plot's room.
        figure.set_figheight(plot.height + 0.3 + 0.18 * math.ceil(len(plot.legend) / 2))
        axes.set_title(shorten(plot.title, 60), fontsize=10, color=LIGHT["ink"], loc="left", pad=10)
        if plot.legend:
            from matplotlib.lines import Line2D

            handles = [
                Line2D([], [], color=LIGHT[s.role], marker=s.marker, linestyle=s.dash, markersize=4)
                for _, s in plot.legend
            ]
            labels = [shorten(name) for name, _ in plot.legend]
            figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=7.5)
        figure.savefig(buffer, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def shorten(text: str, length: int = 36) -> str:
    """A label that fits: printable, and cut with an ellipsis."""
    text = plain(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _page_value(key: str, value: str, name: str, variables: Mapping[str, str]) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style" or key in ("fill", "stroke"):
        for colour, variable in variables.items():
            value = value.replace(colour, variable)
    return value


@contextmanager
def _figure(plot: Plot, colours: Mapping[str, str]) -> Iterator[tuple[Any, Any]]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            got="no package matplotlib", expected="it, for the plots", remedy="pip install 'skipstep[evaluate]'"
        ) from error
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # Text stays text: it takes the page's font and can be searched.
        "svg.hashsalt": "skipstep",
        "figure.constrained_layout.w_pad": 0.07,
        "figure.constrained_layout.h_pad": 0.07,
        "text.parse_math": False,  # Names come from files; a dollar sign in one is no formula.
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": colours["ink"],
        "axes.edgecolor": colours["muted"],
        "axes.labelcolor": colours["muted"],
        "axes.labelsize": 8.5,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "lines.solid_capstyle": "round",
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(_WIDTH_INCHES, plot.height), layout="constrained", facecolor=colours["surface"])
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        axes.grid(color=colours["line"], linewidth=0.8)
        plot.draw(axes, colours)
        yield figure, axes
