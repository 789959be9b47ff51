"""Which plan to take: quality against latency, and the most steps for each deadline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from skipstep.bench.page.canvas import styles_of
from skipstep.bench.page.html import Html, element, prose, table
from skipstep.bench.page.inputs import MachineGroup
from skipstep.bench.page.numbers import Choice, choices, panels
from skipstep.bench.page.parts import Album, listed, milliseconds, missing, section
from skipstep.bench.page.plots import quality_plot
from skipstep.bench.page.quality import QualityPoint

TITLE: Final = "Choose a plan"
_DEADLINES_MS: Final = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)


def plan_section(
    group: MachineGroup, ours: str | None, quality: Sequence[QualityPoint], model: str, album: Album, id_: str
) -> Html:
    """The curve that a plan is chosen from, and tables of the same. `model` is what the runs call the evaluated one."""
    panel = next((panel for panel in panels(group) if panel.model == model), None)
    found = choices(group, panel, ours, quality) if panel is not None and ours is not None else []
    if panel is None or not found:
        return section(TITLE, _why_missing(quality, model), id_=id_)
    main = next(each.label for each in found if not each.estimated)
    drawn = [each for each in found if each.label == main or not each.quality.noisy]
    labels = list(dict.fromkeys([main, *(each.label for each in drawn)]))
    title = f"Quality against latency: {panel.title}"
    plot = quality_plot(album.name("quality", model), drawn, styles_of(labels, ours=main, reference=""), title)
    samples = listed(sorted({each.quality.samples for each in found}))
    explanation = element(
        "p",
        "Each point is a plan: lower is better, further left is sooner, and the numbers are steps. The proxy Fréchet "
        f"distance is between the features of {samples} samples and those of the test images, in this repository's own "
        "classifier. It is not FID, and differences of a few tenths are noise. Filled points were timed here; hollow "
        "ones take their time from the fit through those.",
    )
    figure = album.figure(plot, caption=f"{panel.title}, {ours}")
    side = element("div", *_deadlines(found))
    return section(TITLE, explanation, element("div", figure, side, class_="plots"), *_tables(found), id_=id_)


def _why_missing(quality: Sequence[QualityPoint], model: str) -> Html:
    why = (
        f"no plan of the evaluation was timed here with {model}. Run `skipstep bench` on that model with the "
        "evaluation's step counts."
        if quality
        else "it needs the evaluation's tables. Run `skipstep evaluate`, and name its folder with `--evaluation`."
    )
    return missing("There is no curve of quality against latency:", prose(why))


def _deadlines(found: Sequence[Choice]) -> list[Html]:
    """Rows of (deadline, steps) where more time buys more steps."""
    timed = [(each, each.p99) for each in found if each.p99 is not None]
    rows: list[list[str]] = []
    for limit in _DEADLINES_MS:
        fitting = [(each, p99) for each, p99 in timed if 1e3 * p99 <= limit]
        if not fitting:
            continue
        most, p99 = max(fitting, key=lambda pair: (pair[0].steps, -pair[0].quality.distance))
        if not rows or rows[-1][1] != str(most.steps):
            rows.append([f"{limit:,} ms", str(most.steps), milliseconds(p99), f"{most.quality.distance:.1f}"])
    if not rows:
        return []
    note = prose("The most steps whose p99 fits, as `deadline_ms=` picks them. A busy machine needs a margin.")
    return [
        element("h4", "If a call may take …", class_="first"),
        table(["at most", "steps", "p99, ms", "distance"], rows, label="The most steps for each deadline"),
        element("p", note, class_="facts"),
    ]


def _tables(found: Sequence[Choice]) -> list[Html]:
    """The plans that no quicker one beats, and all of them folded up."""
    efficient: list[Choice] = []
    for each in found:
        if not efficient or each.quality.distance < efficient[-1].quality.distance:
            efficient.append(each)
    header = ["sampler", "steps", "p50, ms", "p99, ms", "distance", "recognised"]
    return [
        element("h4", "Plans worth their time"),
        element("p", "None that is quicker has a smaller distance. ≈ is from the fit.", class_="facts"),
        table(header, [_row(each) for each in efficient], label="Plans that no quicker one beats"),
        element(
            "details",
            element("summary", "All plans that were judged", element("small", f"{len(found)}")),
            table(header, [_row(each) for each in found], label="All plans, with latency and quality"),
        ),
    ]


def _row(choice: Choice) -> list[str]:
    return [
        choice.label,
        str(choice.steps),
        ("≈ " if choice.estimated else "") + milliseconds(choice.p50),
        "–" if choice.p99 is None else milliseconds(choice.p99),
        f"{choice.quality.distance:.1f}",
        f"{choice.quality.recognised:.0%}",
    ]
