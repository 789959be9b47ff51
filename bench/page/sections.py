"""The parts of a report about one class of machine: what stands first, latency, shares of time, course over commits.

A part without data says what would make it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from skipstep.bench.page.canvas import Style, styles_of
from skipstep.bench.page.course import BAND, Course, courses
from skipstep.bench.page.html import Html, element, join, prose, table
from skipstep.bench.page.inputs import MachineGroup
from skipstep.bench.page.numbers import (
    DIFFUSERS,
    WORST_FIT,
    Panel,
    TimeParts,
    cold_start,
    compared,
    contender_names,
    favourite,
    fit_of,
    geometric_mean,
    panels,
    speedups,
    time_parts,
)
from skipstep.bench.page.parts import Album, legend_of, listed, missing, section, spread, times
from skipstep.bench.page.plots import course_plot, latency_plot, ratio_plot, time_plot
from skipstep.bench.results import REFERENCE


def styles_for(group: MachineGroup) -> tuple[str | None, dict[str, Style]]:
    """Our default here, and how each contender is drawn."""
    names = contender_names(group.cases())
    ours = favourite(names)
    return ours, styles_of(names, ours=ours, reference=REFERENCE)


def summary(group: MachineGroup, ours: str | None) -> Html:
    """In plain words: where, what and how it was measured."""
    cases = group.cases()
    facts = group.runs[-1].environment
    names = contender_names(cases)
    machine = str(facts.get("gpu") or facts.get("cpu") or "an unnamed processor")
    said: list[object] = [
        f"{machine}, {facts.get('cores', '?')} cores, commit {facts.get('commit', 'unknown')}. ",
        f"{listed(dict.fromkeys(case.model for case in cases))} with {_numbers(c.steps for c in cases)} steps at batch "
        f"{_numbers(c.batch_size for c in cases)}; {len(names)} contender{'' if len(names) == 1 else 's'}. "
        if cases
        else "No case was measured. ",
        "Samples are checked first: who draws other ones gets no number. ",
    ]
    if ours is not None:
        said += [element("strong", "Ours"), " is ", element("code", ours), ", what skipstep runs by default here."]
    return element("p", join(said), class_="lede")


def _numbers(values: Iterable[int]) -> str:
    return listed(sorted(set(values)))


def cards(group: MachineGroup, ours: str | None) -> Html:
    """The numbers to take away: each model at its smallest and largest batch, and the first image of a process."""
    of_model: dict[tuple[str, str], list[Panel]] = {}
    for panel in panels(group):
        of_model.setdefault((panel.model, panel.dtype), []).append(panel)
    shown = [card for of in of_model.values() if ours and (card := _speed_card(of, ours)) is not None]
    if (start := cold_start(group)) is not None:
        seconds = start["median_seconds"]
        detail = (
            f"{start.get('steps', '?')} steps from a bundle; diffusers takes {seconds['diffusers']:.2g} s, "
            f"{start['ratio_to_diffusers']:.1f} times as long"
        )
        shown.append(_card(f"{1e3 * seconds['bundle']:,.0f} ms", "from process start to first image", detail))
    return element("div", *shown, class_="cards") if shown else Html("")


def _speed_card(of: list[Panel], ours: str) -> Html | None:
    found = []
    for panel in of:
        against, lines = compared(panel, [ours])
        if lines.get(ours):
            found.append((panel, against, [ratio for _, ratio in lines[ours]]))
    if not found:
        return None
    panel, against, ratios = found[0]
    counts = "1 step count" if len(ratios) == 1 else f"{len(ratios)} step counts"
    details = [f"{panel.title}: {spread(ratios)} over {counts}"]
    if len(found) > 1:
        details.append(f"{times(geometric_mean(found[-1][2]))} at batch {found[-1][0].batch_size}")
    if against == REFERENCE and (others := speedups(panel, ours, DIFFUSERS)):
        details.append(f"{times(geometric_mean(others))} against diffusers at batch {panel.batch_size}")
    return _card(times(geometric_mean(ratios)), f"as fast as {_called(against)}", "; ".join(details))


def _called(contender: str) -> str:
    return "the textbook PyTorch loop" if contender == REFERENCE else contender


def _card(number: str, what: str, detail: str) -> Html:
    return element("div", element("b", number), element("span", what), element("small", detail), class_="card")


def latency_section(group: MachineGroup, styles: Mapping[str, Style], album: Album, id_: str) -> Html:
    """Per model and batch size: milliseconds by steps, and ratios. The smallest and largest batch stand open."""
    blocks: list[object] = [
        element(
            "p",
            "Dots are medians of whole calls, lines the fits ",
            element("i", "a + b·S"),
            f": once a call, and each step; medians that stray from every line by more than {WORST_FIT:.0%} are joined "
            "instead. Ratios to the textbook loop, the dashed line, are formed within a turn: they hold on a machine "
            "whose speed wanders, where milliseconds do not.",
        )
    ]
    of_model: dict[str, list[Panel]] = {}
    for panel in panels(group):
        of_model.setdefault(panel.model, []).append(panel)
    rows: list[list[str]] = []
    for model, of in of_model.items():
        pairs = [_pair(group, panel, styles, album, several_dtypes=len({p.dtype for p in of}) > 1) for panel in of]
        used = [(name, style) for name, style in styles.items() if any(panel.measured(name) for panel in of)]
        ends = [*pairs[0], *(pairs[-1] if len(pairs) > 1 else [])]
        blocks += [element("h4", model), legend_of(used, shared=True), element("div", *ends, class_="plots")]
        if len(pairs) > 2:
            between = listed(panel.batch_size for panel in of[1:-1])
            inner = element("div", *(figure for pair in pairs[1:-1] for figure in pair), class_="plots")
            blocks.append(element("details", element("summary", f"Batch {between}"), inner))
        rows += [
            [panel.title, name, f"{1e3 * line.fixed:,.2f}", f"{1e3 * line.per_step:,.2f}", f"{line.residual:.1%}"]
            for panel in of
            for name in styles
            if (line := fit_of(group, panel, name)) is not None and panel.measured(name)
        ]
    if rows:
        header = ["case", "contender", "a: once a call, ms", "b: each step, ms", "medians off by"]
        fitted = table(header, rows, label="Fixed and per-step cost")
        blocks.append(element("details", element("summary", "Fixed and per-step cost of each contender"), fitted))
    return section("Latency against steps", *blocks, id_=id_)


def _pair(
    group: MachineGroup, panel: Panel, styles: Mapping[str, Style], album: Album, *, several_dtypes: bool
) -> list[Html]:
    """A panel's two plots, or what stands in their place."""
    size = f"Batch {panel.batch_size}{f', {panel.dtype}' if several_dtypes else ''}"
    fits = {name: line for name in styles if (line := fit_of(group, panel, name)) is not None}
    words = (panel.model, "batch", panel.batch_size, *((panel.dtype,) if several_dtypes else ()))
    latency = latency_plot(album.name("latency", *words), panel, styles, fits)
    if not latency.legend:
        return [missing(f"{size} has no numbers:", "no contender finished it. The reasons are below.")]
    figures = [album.figure(latency, caption=f"{size}: latency", legend=False)]
    against, lines = compared(panel, list(styles))
    if lines:
        ratio = ratio_plot(album.name("ratio", *words), panel, styles, against, lines)
        figures.append(album.figure(ratio, caption=f"{size}: times as fast as {against}", legend=False))
    return figures


def time_section(group: MachineGroup, ours: str | None, album: Album, id_: str) -> Html:
    """How much of a call is the network."""
    of_model: dict[str, list[tuple[str, TimeParts]]] = {}
    for panel in panels(group):
        parts = time_parts(group, panel, ours) if ours else []
        # Few, middle and many: more bars would say the same.
        kept = {0, len(parts) // 2, len(parts) - 1}
        label = f"batch {panel.batch_size}" + ("" if panel.dtype == "float32" else f" {panel.dtype}")
        for number, each in enumerate(parts):
            if number in kept:
                steps = f"{each.steps} step{'s' if each.steps > 1 else ''}"
                of_model.setdefault(panel.model, []).append((f"{label}, {steps}", each))
    figures = []
    for model, rows in of_model.items():
        plot = time_plot(album.name("time", model), f"Where the time goes: {model}", rows)
        figures.append(album.figure(plot, caption=f"{model}: shares of a call"))
    if not figures:
        remedy = prose("no case holds the time outside the network. Run `skipstep bench` with our default loop.")
        return section("Where the time goes", missing("There is no such plot:", remedy), id_=id_)
    lede = element(
        "p",
        "What as many runs of the network alone leave over of a call of ours is outside it. Of that, what the fit "
        "finds in every call, however many steps it has, is done once, and the rest around each step. Less than about "
        "one per cent is noise.",
    )
    return section("Where the time goes", lede, element("div", *figures, class_="plots"), id_=id_)


def course_section(group: MachineGroup, ours: str | None, album: Album, id_: str) -> Html:
    """Ratios over commits, with the band of the regression gate."""
    title = "Over commits"
    found = courses(group, ours) if ours else []
    if not found:
        note = prose(
            "it takes two runs of this machine class that share cases. Keep the results of `skipstep bench` at each "
            "release, and give all of them to `skipstep report`."
        )
        return section(title, missing("There is no course over commits:", note), id_=id_)
    figures, tables = [], []
    for course in found:
        plot = course_plot(album.name("commits", course.model), course, ours or "")
        band = f"ratio to {REFERENCE}, first run = 1; band ±{BAND:.0%}"
        figures.append(album.figure(plot, caption=course.model, note=band))
        tables += _moved(course)
    lede = element("p", "Geometric means over the step counts that all runs share, a line a batch size.")
    return section(title, lede, element("div", *figures, class_="plots"), *tables, id_=id_)


def _moved(course: Course) -> list[Html]:
    """In words how many cases left the band, and which."""
    if not course.moved:
        words = f"{course.model}: all {course.num_cases} cases are within {BAND:.0%} of the first run."
        return [element("p", words, class_="facts")]
    rows = [[name, times(a), times(b), f"{100 * (b / a - 1):+.0f} %"] for name, a, b in course.moved]
    summary = f"{course.model}: {len(rows)} of {course.num_cases} cases are outside the band"
    listing = table(["case", "first", "last", "change"], rows, label=f"Cases of {course.model} that moved")
    return [element("details", element("summary", summary), listing)]
