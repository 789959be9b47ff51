"""The plots of a report: latency, ratios, quality, shares of time, the roofline, and the course over commits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipstep.bench.page.canvas import Plot, Style, shorten, styles_of
from skipstep.bench.page.course import BAND, Course
from skipstep.bench.page.numbers import Choice, Fit, Panel, TimeParts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def latency_plot(name: str, panel: Panel, styles: Mapping[str, Style], fits: Mapping[str, Fit]) -> Plot:
    """Milliseconds of a call by steps, both logarithmic: dots are medians, lines the fit a + b·S where there is one."""
    lines = {contender: panel.medians(contender) for contender in styles}
    lines = {contender: points for contender, points in lines.items() if points}

    def draw(axes: Axes, colours: Mapping[str, str]) -> None:
        for contender, points in _ours_last(lines, styles):
            style, line = styles[contender], fits.get(contender)
            xs, ys = [steps for steps, _ in points], [1e3 * seconds for _, seconds in points]
            look = _look(style, colours)
            if line is None or min(line.seconds(x) for x in xs) <= 0:
                axes.plot(xs, ys, **look)
                continue
            fine = [xs[0] * (xs[-1] / xs[0]) ** (i / 40) for i in range(41)]
            axes.plot(fine, [1e3 * line.seconds(x) for x in fine], **{**look, "marker": ""})
            axes.plot(xs, ys, **{**look, "linestyle": ""})
        axes.set(xlabel="steps", ylabel="ms a call")
        _log_ticks(axes.xaxis, [steps for points in lines.values() for steps, _ in points])
        _log_decades(axes.yaxis, [1e3 * seconds for points in lines.values() for _, seconds in points])

    ends = "; ".join(
        f"{shorten(contender)}: {1e3 * points[0][1]:.3g} ms at {points[0][0]} steps, "
        f"{1e3 * points[-1][1]:.3g} ms at {points[-1][0]}"
        for contender, points in lines.items()
    )
    title = f"Latency: {panel.title}"
    return Plot(name, title, f"{title}. Medians. {ends}.", draw, [(each, styles[each]) for each in lines])


def ratio_plot(
    name: str,
    panel: Panel,
    styles: Mapping[str, Style],
    against: str,
    lines: Mapping[str, Sequence[tuple[int, float]]],
) -> Plot:
    """How many times as fast as another contender, by steps."""

    def draw(axes: Axes, colours: Mapping[str, str]) -> None:
        axes.axhline(1, color=colours["reference"], linewidth=1.4, linestyle=(0, (4, 3)))
        for contender, points in _ours_last(lines, styles):
            axes.plot(*zip(*points, strict=True), **_look(styles[contender], colours))
        axes.set(xlabel="steps", ylabel="times as fast")
        ratios = [1.0, *(ratio for points in lines.values() for _, ratio in points)]
        axes.set_ylim(min(0.8, 0.9 * min(ratios)), 1.1 * max(ratios))
        axes.locator_params(axis="y", nbins=6)
        _log_ticks(axes.xaxis, [steps for points in lines.values() for steps, _ in points])

    ranges = "; ".join(
        f"{shorten(contender)}: {min(r for _, r in points):.2f} to {max(r for _, r in points):.2f}"
        for contender, points in lines.items()
    )
    title = f"Times as fast as {against}: {panel.title}"
    return Plot(name, title, f"{title}. {ranges}.", draw, [(each, styles[each]) for each in lines])


def quality_plot(name: str, found: Sequence[Choice], styles: Mapping[str, Style], title: str) -> Plot:
    """Distance by latency, a line a sampler: filled where the very plan was timed, hollow where its time is the fit's.

    Distances beyond three times the best are left to the table: they would flatten all that matters.
    """
    limit = 3 * max(min(each.quality.distance for each in found), 1.0)
    shown = [each for each in found if each.quality.distance <= limit] or list(found)
    lines = {label: sorted((c for c in shown if c.label == label), key=lambda c: c.p50) for label in styles}
    lines = {label: points for label, points in lines.items() if points}

    def draw(axes: Axes, colours: Mapping[str, str]) -> None:
        for label, points in _ours_last(lines, styles):
            look = _look(styles[label], colours)
            xs, ys = [1e3 * each.p50 for each in points], [each.quality.distance for each in points]
            faces = [colours["surface"] if each.estimated else look["color"] for each in points]
            main = styles[label].role == "ours"
            axes.plot(xs, ys, **{**look, "marker": ""}, alpha=1 if main else 0.6)
            axes.scatter(
                xs, ys, s=34 if main else 20, c=faces, edgecolors=look["color"], marker=look["marker"], zorder=3
            )
            if main:
                for x, y, each in zip(xs, ys, points, strict=True):
                    axes.annotate(
                        f"{each.steps}", (x, y), (4, 5), textcoords="offset points", ha="left", va="bottom",
                        fontsize=10, fontweight="bold", color=look["color"],
                    )  # fmt: skip
        axes.set(xlabel="ms a call", ylabel="proxy Fréchet distance", xscale="log")
        axes.margins(x=0.1, y=0.14)
        _log_decades(axes.xaxis, [1e3 * each.p50 for each in shown])

    points = "; ".join(
        f"{shorten(each.label)}, {each.steps} steps: {1e3 * each.p50:.3g} ms, {each.quality.distance:.1f}"
        for each in shown
    )
    alt = f"{title}. Lower is better, and further left is sooner. {points}."
    return Plot(name, title, alt, draw, [(label, styles[label]) for label in lines], height=2.8)


def time_plot(name: str, title: str, rows: Sequence[tuple[str, TimeParts]]) -> Plot:
    """Shares of a call, a bar a case: network, the steps around it, and what is done once."""
    styles = {"network": Style("s2", "s"), "around it, each step": Style("s5", "s"), "once a call": Style("s1", "s")}

    def draw(axes: Axes, colours: Mapping[str, str]) -> None:
        left = [0.0] * len(rows)
        for style, part in zip(styles.values(), ("network", "around", "once"), strict=True):
            widths = [100 * getattr(parts, part) / parts.total for _, parts in rows]
            axes.barh(range(len(rows)), widths, left=left, height=0.62, color=colours[style.role])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, (_, parts) in enumerate(rows):
            outside = f"{100 * (parts.around + parts.once) / parts.total:.1f} %"
            axes.annotate(outside, (100, row), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(range(len(rows)), [shorten(label, 28) for label, _ in rows])
        axes.set(xlim=(0, 100), xlabel="% of a call; at the right: outside the network")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)

    bars = "; ".join(f"{shorten(label)}: {100 * parts.network / parts.total:.1f} %" for label, parts in rows)
    alt = f"{title}. Share of the network: {bars}."
    return Plot(name, title, alt, draw, list(styles.items()), height=0.9 + 0.24 * len(rows))


@dataclass(frozen=True, slots=True)
class RooflinePoint:
    """`intensity` in FLOP a byte, `rate` in GFLOP/s; None where only the model is known."""

    label: str
    intensity: float
    rate: float | None


def roofline_plot(
    name: str, title: str, *, bandwidth: float, peak: float | None, points: Sequence[RooflinePoint]
) -> Plot:
    """GFLOP/s by FLOP a byte, under a roof of `bandwidth` in GB/s and, if known, `peak` in GFLOP/s.

    A measured point is filled. One that is not lies hollow on the roof.
    """
    styles = styles_of([point.label for point in points], ours=points[0].label, reference="")

    def draw(axes: Axes, colours: Mapping[str, str]) -> None:
        low, high = 2.0**-3, 2.0 ** (math.ceil(math.log2(peak / bandwidth)) + 1) if peak else 16.0
        xs = [low, peak / bandwidth, high] if peak else [low, high]
        roof = [min(bandwidth * x, peak or math.inf) for x in xs]
        axes.plot(xs, roof, color=colours["muted"], linewidth=2)
        for point in points:
            look = {**_look(styles[point.label], colours), "linestyle": "", "markersize": 7}
            if point.rate is None:
                axes.plot([point.intensity], [point.intensity * bandwidth], **look, mfc=colours["surface"])
            else:
                axes.plot([point.intensity], [point.rate], **look)
        axes.set(xlabel="FLOP a byte", ylabel="GFLOP/s", yscale="log")
        _log_ticks(axes.xaxis, [0.125, 0.5, 2, 8, 32, 128], limits=(low, high))
        _log_decades(axes.yaxis, [roof[0], max(roof)])

    measured = any(point.rate is not None for point in points)
    rates = "; ".join(
        f"{point.label}: {point.intensity:.2f} FLOP a byte"
        + ("" if point.rate is None else f", {point.rate:,.0f} GFLOP/s")
        for point in points
    )
    memory = f"{'A copy moves' if measured else 'Memory moves, by the data sheet,'} {bandwidth:,.0f} GB/s"
    return Plot(name, title, f"{title}. {memory}. {rates}.", draw, list(styles.items()), height=2.8)


def course_plot(name: str, course: Course, contender: str) -> Plot:
    """Ratios to the reference over runs, each over the first run's, and the band in which they count as unchanged."""
    styles = styles_of([f"batch {batch}" for batch in course.by_batch], ours=None, reference="")
    places = range(len(course.commits))

    def draw(axes: Axes, colours: Mapping[str, str]) -> None:
        axes.axhspan(1 - BAND, 1 + BAND, color=colours["band"], linewidth=0)
        axes.axhline(1, color=colours["muted"], linewidth=0.9)
        for batch, values in course.by_batch.items():
            axes.plot(places, values, **_look(styles[f"batch {batch}"], colours))
        step = max(1, math.ceil(len(course.commits) / 6))
        axes.set_xticks(list(places)[::step], [shorten(commit, 9) for commit in course.commits][::step])
        every = [value for line in course.by_batch.values() for value in line]
        axes.set_ylim(min(0.8, min(every) - 0.05), max(1.2, max(every) + 0.05))
        axes.locator_params(axis="y", nbins=6)
        axes.set(xlabel="commit, oldest first", ylabel="ratio, first run = 1")
        axes.grid(visible=False, axis="x")

    title = f"{shorten(contender)} over commits: {course.model}"
    ends = "; ".join(f"batch {batch}: {values[-1]:.2f}" for batch, values in course.by_batch.items())
    alt = f"{title}. Ratio to the textbook loop, last run over first: {ends}. Unchanged is within {BAND:.0%}."
    return Plot(name, title, alt, draw, list(styles.items()))


def _look(style: Style, colours: Mapping[str, str]) -> dict[str, Any]:
    ours = style.role == "ours"
    return {
        "color": colours[style.role],
        "marker": style.marker,
        "linestyle": style.dash,
        "linewidth": 2.4 if ours else 1.4,
        "markersize": 5.5 if ours else 4.2,
        "zorder": 3 if ours else 2,
    }


def _ours_last(lines: Mapping[str, Any], styles: Mapping[str, Style]) -> list[tuple[str, Any]]:
    """What is drawn last lies on top."""
    return sorted(lines.items(), key=lambda item: styles[item[0]].role == "ours")


def _log_ticks(axis: Any, values: Sequence[float], *, limits: tuple[float, float] | None = None) -> None:
    """A logarithmic axis with a label at each of `values`, and at nothing else."""
    from matplotlib import ticker

    ticks = sorted(set(values))
    scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    scale("log")
    kept: list[float] = []
    for tick in reversed(ticks):  # Labels closer than a factor of 1.5 would run into each other.
        if not kept or kept[-1] / tick >= 1.5:
            kept.append(tick)
    axis.set_major_locator(ticker.FixedLocator(kept[::-1]))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())
    if limits is None and len(ticks) == 1:
        limits = (ticks[0] / 2, ticks[0] * 2)
    if limits is not None:
        (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(*limits)


def _log_decades(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with 1, 2 and 5 of each decade, or decades alone where there are many."""
    from matplotlib import ticker

    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    decades = math.log10(max(values) / min(values))
    subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(ticker.NullLocator())
