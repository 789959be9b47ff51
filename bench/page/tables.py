"""The tables of a report: every number, who has none and why, what else was measured, and where it ran."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any, Final

from skipstep.bench.page.html import Html, element, table
from skipstep.bench.page.inputs import MachineGroup, is_finite
from skipstep.bench.page.numbers import DIFFUSERS, median, panels
from skipstep.bench.page.parts import milliseconds, section, times, words
from skipstep.bench.results import REFERENCE, Case
from skipstep.latency.calibration import nearest_rank

_MEASUREMENTS: Final = {
    "build": "From a checkpoint to an engine and a bundle",
    "throughput": "Throughput under concurrent callers",
    "accuracy": "Accuracy by precision",
    "cold_start": "Cold start",
    "peak_memory": "Peak memory of a process",
    "captures": "Captured graphs",
    "jitter": "Jitter",
    "networks": "The network alone",
}


def numbers_section(group: MachineGroup, ours: str | None, id_: str) -> Html:
    """Every number, a table a panel, folded up."""
    blocks = []
    for panel in panels(group):
        rows: list[list[str]] = []
        marked = []
        for case in panel.cases:
            other = case.contender(DIFFUSERS)
            for each in case.contenders:
                if each.status != "ok":
                    continue
                if each.name == ours:
                    marked.append(len(rows))
                against = each.ratio / other.ratio if other and other.ratio and each.ratio else None
                rows.append(
                    [
                        str(case.steps),
                        each.name,
                        milliseconds(median(each)),
                        milliseconds(nearest_rank(each.seconds, 90)),
                        milliseconds(nearest_rank(each.seconds, 99)),
                        "–" if each.ratio is None else times(each.ratio),
                        "–" if against is None else times(against),
                        str(len(each.seconds)),
                        "–" if each.error is None else f"{each.error:.1e}" if each.error else "0",
                    ]
                )
        if not rows:
            continue
        header = [
            "steps",
            "contender",
            "p50, ms",
            "p90, ms",
            "p99, ms",
            f"× {REFERENCE}",
            "× diffusers",
            "turns",
            "off by",
        ]
        blocks.append(
            element(
                "details",
                element("summary", panel.title, element("small", f"{len(rows)} rows")),
                table(header, rows, label=f"Numbers of {panel.title}", marked=marked),
            )
        )
    lede = element(
        "p",
        "Percentiles by nearest rank over the turns: with fewer than 100 turns, p99 is the slowest. “× textbook” is "
        "how many times as fast. “Off by” is the largest difference from the float32 reference's samples, over their "
        "largest magnitude.",
    )
    return section("All numbers", lede, *blocks, *_costs(group), id_=id_)


def _costs(group: MachineGroup) -> list[Html]:
    """What contenders need besides time, from the smallest case of each model."""
    rows = []
    seen: set[tuple[str, str]] = set()
    for panel in panels(group):
        for case in panel.cases:
            for each in case.contenders:
                facts = (each.build_seconds, each.warmup_seconds, each.peak_memory_bytes, each.nodes_per_step)
                if each.status != "ok" or (panel.model, each.name) in seen or all(fact is None for fact in facts):
                    continue
                seen.add((panel.model, each.name))
                rows.append(
                    [
                        each.name,
                        panel.model,
                        ", ".join(text for text in (each.backend, each.loop) if text) or "–",
                        _number(each.build_seconds, "{:.1f}"),
                        _number(each.warmup_seconds, "{:.2f}"),
                        _number(each.peak_memory_bytes, "{:,.0f}", 1e-6),
                        _number(each.nodes_per_step, "{:,.0f}"),
                        _number(each.bytes_per_step, "{:,.1f}", 1e-6),
                    ]
                )
    if not rows:
        return []
    header = ["contender", "model", "runs in", "build, s", "warm-up, s", "peak memory, MB", "nodes a step", "MB a step"]
    return [element("h4", "What each contender takes"), table(header, rows, label="Build time, memory and nodes")]


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "–" if value is None else form.format(value * factor)


def absent_section(group: MachineGroup, id_: str) -> Html | None:
    """Contenders without a number, and why; None if all have theirs."""
    where: dict[tuple[str, str, str], list[Case]] = {}
    for case in group.cases():
        for each in case.contenders:
            if each.status != "ok":
                where.setdefault((each.name, each.status, each.reason), []).append(case)
    if not where:
        return None
    total = len(group.cases())
    rows = [
        [
            name,
            element("span", status, class_=f"badge {status}"),
            "all cases" if len(of) == total else of[0].name if len(of) == 1 else f"{len(of)} of {total} cases",
            element("div", reason or "no reason given", class_="why"),
        ]
        for (name, status, reason), of in where.items()
    ]
    lede = element(
        "p",
        "Absent: this machine lacks what it needs. Wrong: its samples are off by more than its tolerance, so its speed "
        "means nothing. Failed: it raised an error. Skipped: it would have taken longer than a case may.",
    )
    reasons = table(["contender", "state", "where", "why"], rows, label="Contenders without a number")
    return section("Without a number", lede, reasons, id_=id_)


def measurements_section(group: MachineGroup, id_: str) -> Html | None:
    """What a run measured besides its cases, table by table, whatever it is called."""
    newest: dict[str, Any] = {}
    for run in group.runs:
        newest.update({str(name): value for name, value in run.measurements.items() if name != "fits"})
    blocks = [
        block
        for name, value in newest.items()
        for block in (element("h4", _MEASUREMENTS.get(name, words(name))), generic_table(value, label=words(name)))
    ]
    return section("Measured besides", *blocks, id_=id_) if blocks else None


def generic_table(value: Any, *, label: str) -> Html:
    """Any JSON as a table: a list of objects row by row, everything else name by name."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) and each for each in value):
        flat = [row for each in value for row in _rows(each)]
        keys = list(dict.fromkeys(key for each in flat for key in each))
        rows = [[cell(each.get(key)) for key in keys] for each in flat]
        return table([words(key) for key in keys], rows, label=label)
    facts = _flatten(value if isinstance(value, Mapping) else {label: value})
    return table(["", ""], [[words(key), cell(each)] for key, each in facts.items()], label=label)


def _rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row; or, where the record holds a list of records, one for each of those, with the rest in front."""
    flat = _flatten(record)
    for key, value in flat.items():
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            rest = {name: each for name, each in flat.items() if name != key}
            return [{**rest, **_flatten(each)} for each in value]
    return [flat]


def _flatten(value: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, each in value.items():
        name = f"{prefix}{key}"
        if isinstance(each, Mapping) and each and depth < 4:
            flat.update(_flatten(each, f"{name}, ", depth + 1))
        else:
            flat[name] = each
    return flat


def cell(value: Any) -> str:
    """A value of JSON in few characters."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**4 else f"{value:,}" if abs(value) < 10**15 else f"{value:.4g}"
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) > 6 and all(is_finite(each) for each in value):
        return f"{len(value)} values around {cell(float(statistics.median(value)))}"
    if isinstance(value, list) and len(value) <= 16 and all(isinstance(each, str | int | float) for each in value):
        return ", ".join(map(cell, value))
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:119]}…"


def environment_section(group: MachineGroup, id_: str) -> Html:
    """Where the runs came from, and how to make them again."""
    newest = group.runs[-1]
    facts = [[words(str(key)), cell(value)] for key, value in newest.environment.items()]
    options = [[words(str(key)), cell(value)] for key, value in newest.options.items() if key != "command"]
    halves = [element("div", element("h4", "Machine and versions"), table(["", ""], facts, label="Environment"))]
    if options:
        halves.append(
            element("div", element("h4", "Options"), table(["", ""], options, label="Options of the newest run"))
        )
    command = newest.options.get("command")
    blocks = [element("div", *halves, class_="plots tables")]
    if isinstance(command, str) and command:
        blocks.insert(0, element("pre", element("code", command)))
    if len(group.runs) > 1:
        rows = [[cell(run.environment.get("commit", "unknown")), str(len(run.cases))] for run in group.runs]
        blocks += [element("h4", "Runs, oldest first"), table(["commit", "cases"], rows, label="Runs")]
    return section("Where it ran, and how to run it again", *blocks, id_=id_)
