"""What the sections of a report are put together from: figures, legends, notes on what is missing, numbers in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from skipstep.bench.page.canvas import Plot, Style, to_svg
from skipstep.bench.page.html import Html, element


@dataclass(slots=True)
class Album:
    """The plots of a page in their order. Each gets a name of its own, which is that of its PNG and of its ids."""

    plots: list[Plot] = field(default_factory=list)

    def name(self, *words: object) -> str:
        letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in "-".join(map(str, words)).lower())
        name = "-".join(part for part in letters.split("-") if part)[:60] or "plot"
        taken = {plot.name for plot in self.plots}
        return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)

    def figure(self, plot: Plot, *, caption: object, note: object = "", legend: bool = True) -> Html:
        self.plots.append(plot)
        return element(
            "figure",
            element("figcaption", caption, element("small", note) if note else ""),
            to_svg(plot),
            legend_of(plot.legend) if legend else "",
        )


def legend_of(entries: Sequence[tuple[str, Style]], *, shared: bool = False) -> Html:
    """Names with their line and marker. It stands in the page and not in the plot, so that it can wrap."""
    marks = {
        "o": "M14 3.5a4.5 4.5 0 1 0 .01 0z",
        "s": "M10 4h8v8h-8z",
        "^": "M14 3l5 9h-10z",
        "v": "M14 13l5-9h-10z",
        "D": "M14 2.5l5.5 5.5-5.5 5.5-5.5-5.5z",
        "<": "M9 8l9-5v10z",
        ">": "M19 8l-9-5v10z",
        "p": "M14 3l5 4-2 6h-6l-2-6z",
        "h": "M14 3l4.5 2.5v5l-4.5 2.5-4.5-2.5v-5z",
    }
    items = []
    for name, style in entries:
        stroke = f"var(--{style.role})"
        dash = None if style.dash == "-" else "5 3"
        line = element("path", d="M1 8h26", stroke=stroke, stroke_width="2", stroke_dasharray=dash)
        mark = element("path", d=marks[style.marker], fill=stroke)
        swatch = element("svg", line, mark, viewBox="0 0 28 16", aria_hidden="true")
        items.append(element("li", swatch, name, class_="mine" if style.role == "ours" else None))
    return element("ul", *items, class_="legend shared" if shared else "legend")


def missing(what: str, remedy: object) -> Html:
    return element("p", element("strong", what), " ", remedy, class_="missing")


def section(title: str, *children: object, id_: str) -> Html:
    return element(
        "section", element("h3", title, id=f"{id_}-title"), *children, id=id_, aria_labelledby=f"{id_}-title"
    )


def milliseconds(seconds: float) -> str:
    """Three digits that count, in milliseconds."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def spread(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}×"
    return high if f"{low}×" == high else f"{low} to {high}"


def listed(values: Iterable[object]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last


def words(name: str) -> str:
    """A key of JSON as words; what is a name of its own (a package, a contender) has no underscore and stays."""
    return name.replace("_", " ")
