from __future__ import annotations

import builtins
import dataclasses
import html
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_runs import MACHINE, PLANS, a_run, environment
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipstep.bench.page.document import write_report
from skipstep.bench.page.html import element, plain, prose, table
from skipstep.bench.page.inputs import read_inputs
from skipstep.bench.page.numbers import contender_names, panels, time_parts
from skipstep.bench.page.style import DARK, LIGHT
from skipstep.bench.results import Case, Contender, Run, write_run
from skipstep.errors import InputError, MissingDependencyError, StorageError

ROOT = Path(__file__).parents[2]
EVALUATION = ROOT / "bench" / "results" / "evaluation"
GPU = "gpu NVIDIA H200"
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'--><svg onload=alert(1)>]]>",
    "$\\frac{",
    "a\x00b\x1b[31m",
    "\u202egnp.exe",
    "../../../etc/passwd",
    "_hidden",
    "%s {0} {x!r}",
    "x" * 400,
)


class Page(HTMLParser):
    """The elements of a page, with their ids, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def plots(self):
        return [attributes for attributes in self.all("svg") if attributes.get("role") == "img"]


@pytest.fixture
def report(tmp_path):
    """Write runs and other results as files, make the report, and return its page."""

    def make(*contents, evaluation=None, out=tmp_path / "out"):
        paths = []
        for number, each in enumerate(contents):
            path = tmp_path / f"{number}.json"
            if isinstance(each, Run):
                write_run(path, each)
            else:
                path.write_text(json.dumps(each))
            paths.append(path)
        page, notes = write_report(paths, out, evaluation=evaluation)
        parsed = Page(page.read_text(encoding="utf-8"))
        parsed.notes = notes
        parsed.folder = page.parent
        return parsed

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page with every plot: two commits, evaluation, cold start, and kernels."""
    folder = tmp_path_factory.mktemp("whole")
    runs = [a_run("a1e2d45"), a_run("011de5f", seed=1, slower=1.16)]
    for number, run in enumerate(runs):
        write_run(folder / f"{number}.json", run)
    others = [ROOT / "bench" / "results" / name for name in ("cold-start.json", "step-codegen.json")]
    page, _ = write_report([*sorted(folder.glob("*.json")), *others], folder / "out", evaluation=EVALUATION)
    return page


def small_run(commit="011de5f", **options):
    return a_run(commit, models=("fashion-mnist",), **{"steps": (1, 10, 20), "batches": (1,), **options})


def with_contenders(run, *contenders):
    cases = tuple(dataclasses.replace(case, contenders=contenders) for case in run.cases)
    return dataclasses.replace(run, cases=cases, measurements={})


def test_the_page_needs_nothing_else(whole):
    page = Page(whole.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "foreignobject", "base", "form"}
    links = [
        value for _, attrs in page.elements for key, value in attrs.items() if key in ("href", "xlink:href", "src")
    ]
    assert links
    assert all(link.startswith("#") for link in links)
    assert set(re.findall(r"url\(.", page.source)) == {"url(#"}
    assert "@import" not in page.source
    policy = next(each for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_ids_are_of_one_element_each_and_every_reference_has_one(whole):
    page = Page(whole.read_text(encoding="utf-8"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {
        target.lstrip("#")
        for _, attrs in page.elements
        for key, target in attrs.items()
        if key in ("href", "xlink:href", "aria-labelledby")
    } | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert wanted <= set(ids)


def test_it_can_be_read_aloud(whole):
    page = Page(whole.read_text(encoding="utf-8"))
    assert page.all("html")[0]["lang"] == "en"
    assert "cpu x86_64 avx2" in page.text[:200]
    assert page.plots
    assert all(len(plot["aria-label"]) > 30 for plot in page.plots)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    boxes = [attrs for attrs in page.all("div") if attrs.get("class") == "scroll"]
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert len(boxes) == len(page.all("table"))


def test_every_plot_of_the_page_lies_beside_it_as_a_picture(whole):
    page = Page(whole.read_text(encoding="utf-8"))
    pictures = sorted(whole.parent.glob("*.png"))
    assert len(pictures) == len(page.plots)
    names = {picture.stem for picture in pictures}
    assert {"quality-fashion-mnist", "latency-fashion-mnist-batch-1", "ratio-cifar10-architecture-batch-64"} <= names
    assert {"time-fashion-mnist", "commits-fashion-mnist", "roofline-model"} <= names
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width >= 700
            assert image.getpixel((0, 0))[:3] == (255, 255, 255)
            assert image.convert("L").getextrema()[0] < 100


def test_plots_take_their_colours_from_the_page(whole):
    svgs = re.findall(r"<svg [^>]*role=\"img\".*?</svg>", whole.read_text(encoding="utf-8"), re.DOTALL)
    assert svgs
    for svg in svgs:
        assert set(re.findall(r"var\(--([a-z0-9]+)\)", svg)) <= set(LIGHT)
        assert "var(--muted)" in svg
        assert not re.findall(r"(?:fill|stroke): ?#", svg)
        assert "<style" not in svg


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_colours_can_be_told_from_their_ground(palette):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        light, dark = sorted((luminance(a), luminance(b)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for ground in ("page", "surface"):
        for text in ("ink", "muted", "ours", "s7"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
        for line in ("reference", "s1", "s2", "s3", "s4", "s5", "s6"):
            assert contrast(palette[line], palette[ground]) >= 3, (line, ground)
    assert contrast(palette["s1"], palette["band"]) >= 3
    assert set(LIGHT) == set(DARK)


def test_the_summary_opens_with_the_machine_and_the_ratio(report):
    run = with_contenders(
        small_run(),
        Contender("textbook", "ok", seconds=(0.2, 0.2, 0.2), ratio=1.0),
        Contender("diffusers", "ok", seconds=(0.25, 0.25, 0.25), ratio=0.8),
        Contender("skipstep-onnx", "ok", seconds=(0.05, 0.05, 0.06), ratio=4.0),
    )
    page = report(run)
    start = page.text[: page.text.index("Choose a plan", page.text.index("AMD EPYC"))]
    assert "AMD EPYC, 2 cores, commit 011de5f" in start
    assert "4.00×as fast as the textbook PyTorch loop" in start
    assert "5.00× against diffusers" in start
    assert "Ours is skipstep-onnx" in start


def test_tables_hold_percentiles_by_nearest_rank(report):
    seconds = tuple(0.001 * (10 + i) for i in range(20))
    run = with_contenders(small_run(steps=(10,)), Contender("textbook", "ok", seconds=seconds, ratio=1.0, error=2e-7))
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", report(run).source)
    row = cells[cells.index("textbook") :][:7]
    assert row == ["textbook", "19.5", "27.0", "29.0", "1.00×", "–", "20"]


def test_contenders_without_a_number_are_named_with_the_reason(report):
    run = small_run()
    cases = list(run.cases)
    failed = Contender("mine", "failed", reason="RuntimeError: no luck")
    cases[0] = dataclasses.replace(cases[0], contenders=(*cases[0].contenders, failed))
    page = report(dataclasses.replace(run, cases=tuple(cases)))
    assert "no package openvino: pip install openvino" in page.text
    assert "off by 0.031, allowed 0.02" in page.text
    row = re.search(r"<tr><th[^>]*>mine</th>.*?</tr>", page.source).group()
    assert "failed" in row
    assert "fashion-mnist, 1 steps, batch 1, float32" in row
    assert "RuntimeError: no luck" in row


def test_a_run_in_which_nobody_finished_is_still_a_page(report):
    page = report(with_contenders(small_run(), Contender("textbook", "failed", reason="out of luck")))
    assert "has no numbers" in page.text
    assert "out of luck" in page.text
    assert [plot["aria-label"][:11] for plot in page.plots] == ["Step kernel"]


def test_a_run_without_cases_is_still_a_page(report):
    assert "No case was measured" in report(Run(environment(), {}, ())).text


def test_missing_plots_name_what_would_make_them(report):
    run = small_run()
    cases = tuple(dataclasses.replace(case, outside_network=None) for case in run.cases)
    page = report(dataclasses.replace(run, cases=cases))
    for what, remedy in (
        ("no curve of quality", "skipstep evaluate"),
        ("no such plot", "skipstep bench"),
        ("no course over commits", "takes two runs"),
        ("No point here is measured", "make gpu"),
    ):
        assert remedy in page.text[page.text.index(what) :][:250]


def test_quality_is_joined_by_plan_key(report):
    page = report(small_run(steps=(5, 10, 20)), evaluation=EVALUATION)
    label = next(plot["aria-label"] for plot in page.plots if plot["aria-label"].startswith("Quality"))
    ours = {case.steps: case.contender("skipstep-onnx") for case in small_run(steps=(5, 10, 20)).cases}
    middle = sorted(ours[10].seconds)[5]
    assert f"DDIM, η = 0, 10 steps: {1e3 * middle:.3g} ms, 10.2" in label
    # Estimates end where the measured step counts do, and are called so.
    assert "50 steps" not in label
    assert "Heun, 9 steps" in label
    assert re.search(r"Heun</th><td class=\"n\">9</td><td class=\"n\">≈ ", page.source)


def test_an_evaluation_of_other_plans_is_no_curve(report):
    run = small_run(steps=(10, 20))
    cases = tuple(dataclasses.replace(case, plan="another") for case in run.cases)
    page = report(dataclasses.replace(run, cases=cases), evaluation=EVALUATION)
    assert "no plan of the evaluation was timed here with fashion-mnist" in page.text
    assert set(PLANS.values()).isdisjoint(case.plan for case in cases)


def test_for_a_deadline_it_takes_the_most_steps_that_fit(report):
    run = small_run(steps=(5, 10))
    times = {5: (0.020, 0.024), 10: (0.040, 0.060)}
    cases = tuple(
        dataclasses.replace(case, contenders=(Contender("skipstep-onnx", "ok", seconds=times[case.steps]),))
        for case in run.cases
    )
    page = report(dataclasses.replace(run, cases=cases, measurements={}), evaluation=EVALUATION)
    box = re.search(r'aria-label="The most steps for each deadline".*?</div>', page.source).group()
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", box)[4:]
    assert [cells[i : i + 3] for i in range(0, len(cells), 4)] == [["25 ms", "5", "24.0"], ["100 ms", "10", "60.0"]]


def test_fits_are_the_recorded_ones_and_left_out_where_they_do_not_fit(report):
    run = small_run()
    points = [[1, 0.1], [10, 0.2], [20, 0.3]]
    of = {"model": "fashion-mnist", "batch_size": 1, "dtype": "float32", "points": points}
    fits = [
        {**of, "contender": "diffusers", "fixed_seconds": 0.0123, "per_step_seconds": 0.00456, "residual": 0.021},
        {**of, "contender": "textbook", "fixed_seconds": 0.0789, "per_step_seconds": 0.001, "residual": 0.4},
    ]
    page = report(dataclasses.replace(run, measurements={"fits": fits}))
    assert "diffusers12.304.562.1%" in page.text
    assert "78.90" not in page.text
    rows = re.search(r'aria-label="Fixed and per-step cost".*?</div>', page.source).group().count("<tr>")
    assert rows == 1 + len(contender_names(run.cases)) - 1


def test_machine_classes_are_never_mixed(report):
    other = dataclasses.replace(small_run(machine_class=GPU, seed=3), measurements={})
    other = dataclasses.replace(
        other, cases=tuple(dataclasses.replace(case, model="on-the-gpu") for case in other.cases)
    )
    page = report(small_run(), other, small_run(machine_class="cpu aarch64 scalar, 4 cores"))
    parts = re.split(r'<section id="m\d"', page.source)[1:]
    assert len(parts) == 3
    assert [name in part for name in (MACHINE, GPU, "aarch64") for part in parts].count(True) >= 3
    assert "on-the-gpu" not in parts[0] + parts[2]
    assert "fashion-mnist" not in parts[1]
    assert "no course over commits" in page.text


def test_a_course_over_commits_shows_what_left_the_band(report):
    page = report(small_run("aaaaaaa"), small_run("bbbbbbb"), small_run("ccccccc", slower=1.5))
    label = next(plot["aria-label"] for plot in page.plots if "over commits" in plot["aria-label"])
    assert "batch 1: 0.6" in label
    assert "3 of 3 cases are outside the band" in page.text
    runs = page.text[page.text.index("Runs, oldest first") :]
    assert runs.index("aaaaaaa") < runs.index("bbbbbbb") < runs.index("ccccccc")
    unchanged = report(small_run("aaaaaaa"), small_run("bbbbbbb", slower=1.05))
    assert "all 3 cases are within 10% of the first run" in unchanged.text


def test_runs_without_a_common_case_have_no_course(report):
    assert "no course over commits" in report(small_run(steps=(1, 5)), small_run(steps=(10, 20))).text


def test_runs_go_by_the_age_of_their_commits(tmp_path):
    log = subprocess.run(
        ["git", "log", "--format=%h", "-n", "3"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if len(log) < 3:
        pytest.skip("this copy of the repository has no history")
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    for path, commit in zip(paths, log, strict=True):
        write_run(path, small_run(commit))
    [group] = read_inputs(paths).groups
    assert [run.environment["commit"] for run in group.runs] == log[::-1]


def test_a_commit_reaches_git_only_as_a_hash(tmp_path):
    victim = tmp_path / "victim"
    for number, commit in enumerate((f"--output={victim}", "HEAD;touch x", "-1", "")):
        write_run(tmp_path / f"{number}.json", small_run(commit))
    inputs = read_inputs([tmp_path / f"{number}.json" for number in range(4)])
    assert len(inputs.groups[0].runs) == 4
    assert not victim.exists()


def test_time_is_split_by_what_the_network_leaves(tmp_path):
    contenders = [Contender("skipstep-onnx", "ok", seconds=(0.010 + 0.010 * s,)) for s in (1, 10, 100)]
    cases = tuple(
        Case("m", steps, 1, "float32", "k", (contender,), outside_network=share)
        for steps, contender, share in zip((1, 10, 100), contenders, (0.6, 0.2, -0.01), strict=True)
    )
    write_run(tmp_path / "run.json", Run(environment(), {}, cases))
    [group] = read_inputs([tmp_path / "run.json"]).groups
    [panel] = panels(group)
    one, ten, hundred = time_parts(group, panel, "skipstep-onnx")
    assert (one.network, one.once, one.around) == pytest.approx((0.008, 0.010, 0.002))
    assert (ten.network, ten.once, ten.around) == pytest.approx((0.088, 0.010, 0.012))
    assert (hundred.network, hundred.once, hundred.around) == pytest.approx((1.010, 0, 0))


def test_a_gpu_gives_its_roofline_measured_points_and_medians_against_diffusers(report):
    cases = tuple(
        Case(
            "cifar10-architecture", steps, 1, "float16", "",
            (
                Contender("diffusers", "ok", seconds=(0.02 * steps,) * 3),
                Contender("skipstep-captured", "ok", seconds=(0.001 * steps,) * 3),
            ),
        )
        for steps in (10, 20, 50)
    )  # fmt: skip
    networks = [{"model": "cifar10-architecture", "batch_size": 1, "seconds": 0.0009}]
    run = Run(environment(machine_class=GPU), {}, cases, {"networks": networks})
    kernel = {"dtype": "float16", "guided": False, "beyond_cache": True, "copy_gb_per_s": 4000.0}
    bandwidth = [
        {**kernel, "eta": 0.0, "state_bytes": 4096, "bytes": 12288, "beyond_cache": False, "step_gb_per_s": 9.0},
        {**kernel, "eta": 0.0, "state_bytes": 2**28, "bytes": 2**29, "step_gb_per_s": 3800.0},
        {**kernel, "eta": 0.0, "state_bytes": 2**30, "bytes": 2**31, "step_gb_per_s": 3840.0},
        {**kernel, "eta": 1.0, "state_bytes": 2**30, "bytes": 2**31, "reason": "out of memory", "step_gb_per_s": None},
    ]
    file = {"environment": environment(machine_class=GPU), "dry_run": False, "cases": bandwidth}
    page = report(run, file)
    assert "20.0×as fast as diffusers" in page.text
    label = next(plot["aria-label"] for plot in page.plots if plot["aria-label"].startswith("Step kernel"))
    assert f"0.92 FLOP a byte, {11 / 12 * 3840:,.0f} GFLOP/s" in label
    assert "reaches 96%" in page.text
    assert "not measured" not in page.text
    assert any("Share of the network: batch 1 float16, 10 steps: 90.0 %" in plot["aria-label"] for plot in page.plots)
    # A dry run, and another machine's file, are no measurement of this one.
    assert "Model, not measured" in report(run, {**file, "dry_run": True}).text
    assert "Model, not measured" in report(run, {**file, "environment": environment()}).text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_file_says_is_text_and_nothing_else(report, whole, hostile):
    plainly = Page(whole.read_text(encoding="utf-8"))
    run = small_run(steps=(5, 10, 20))
    cases = tuple(
        dataclasses.replace(
            case,
            model=hostile,
            dtype=hostile,
            contenders=tuple(
                dataclasses.replace(each, name=hostile + each.name, reason=hostile, backend=hostile, loop=hostile)
                if each.name not in ("textbook", "skipstep-onnx")
                else each
                for each in case.contenders
            ),
        )
        for case in run.cases
    )
    facts = {hostile: hostile, "commit": hostile, "cpu": hostile, "machine_class": hostile, "cores": hostile}
    measurements = {hostile: [{hostile: hostile}], "cold_start": {"median_seconds": hostile}, "fits": hostile}
    write = Run(facts, {hostile: hostile, "command": hostile}, cases, measurements)
    page = report(write, {"environment": facts, "kernels": [{"arch": hostile}, hostile]})
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plainly.elements} | {"pre"}
    assert not any(key.startswith("on") for _, attrs in page.elements for key in attrs)
    assert plain(hostile) in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page.source)
    assert all(
        path.parent == page.folder and re.fullmatch(r"[a-z0-9-]+\.(png|html)", path.name)
        for path in page.folder.iterdir()
    )


def test_a_lone_surrogate_from_json_does_not_stop_the_page(report, tmp_path):
    write_run(tmp_path / "good.json", small_run())
    text = (tmp_path / "good.json").read_text().replace('"AMD EPYC"', '"AMD \\ud800 EPYC"')
    (tmp_path / "bad.json").write_text(text)
    page, _ = write_report([tmp_path / "bad.json"], tmp_path / "out")
    assert "AMD \ufffd EPYC" in page.read_text(encoding="utf-8")


def test_the_same_inputs_make_the_same_files(report, tmp_path):
    first = report(small_run(), out=tmp_path / "a")
    second = report(small_run(), out=tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.folder.iterdir()} == {
        p.name: p.read_bytes() for p in second.folder.iterdir()
    }


def test_files_of_other_kinds_are_left_aside_and_named(report):
    page = report(small_run(), {"environment": {}, "bundles": []}, {"machine_info": {}, "benchmarks": []})
    assert len(page.notes) == 2
    assert all("is left aside" in note for note in page.notes)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": 1}', "[" * 100_000, '{"schema": 1}', "\ufeff{}"])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"result\.json"):
        write_report([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_no_file_and_no_run_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        write_report([tmp_path / "none.json"], tmp_path / "out")
    with pytest.raises(InputError, match="no result files"):
        write_report([], tmp_path / "out")
    with pytest.raises(InputError, match="none of them a benchmark run"):
        write_report([ROOT / "bench" / "results" / "cold-start.json"], tmp_path / "out")


def test_another_schema_is_refused_by_its_number(tmp_path):
    write_run(tmp_path / "run.json", dataclasses.replace(small_run(), schema=99))
    with pytest.raises(InputError, match="schema 99"):
        write_report([tmp_path / "run.json"], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"model": 3}, "model"),
        ({"steps": "10"}, "steps"),
        ({"steps": 0}, "steps"),
        ({"batch_size": True}, "batch_size"),
        ({"outside_network": "much"}, "outside_network"),
        ({"plan": None}, "plan"),
    ],
)
def test_cases_of_the_wrong_form_are_refused(tmp_path, change, where):
    write_run(tmp_path / "run.json", small_run())
    contents = json.loads((tmp_path / "run.json").read_text())
    contents["cases"][0].update(change)
    (tmp_path / "run.json").write_text(json.dumps(contents))
    with pytest.raises(InputError, match=where):
        write_report([tmp_path / "run.json"], tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"ratio": "fast"},
        {"ratio": -1},
        {"ratio": float("nan")},
        {"seconds": [0.1, float("inf")]},
        {"seconds": [0.0]},
        {"seconds": []},
        {"name": None},
        {"reason": ["why"]},
        {"error": "small"},
        {"peak_memory_bytes": "10 MB"},
        {"status": "absent"},
        {"status": "fine"},
    ],
)
def test_contenders_of_the_wrong_form_are_refused(tmp_path, change):
    write_run(tmp_path / "run.json", small_run())
    contents = json.loads((tmp_path / "run.json").read_text())
    contents["cases"][0]["contenders"][0].update(change)
    (tmp_path / "run.json").write_text(json.dumps(contents))
    with pytest.raises(InputError, match=r"run\.json"):
        write_report([tmp_path / "run.json"], tmp_path / "out")


@pytest.mark.parametrize(
    "rows", ["", "a,b\n1,2\n", "steps,eta,samples,proxy_frechet,agreement,plan_key\n5,0,32,nan,1,k\n"]
)
def test_a_damaged_evaluation_is_refused(tmp_path, rows):
    write_run(tmp_path / "run.json", small_run())
    (tmp_path / "quality.csv").write_text(rows)
    with pytest.raises(InputError, match=r"quality\.csv"):
        write_report([tmp_path / "run.json"], tmp_path / "out", evaluation=tmp_path)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    write_run(tmp_path / "run.json", small_run(steps=(1,)))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="out"):
        write_report([tmp_path / "run.json"], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    write_run(tmp_path / "run.json", small_run(steps=(1,)))
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"skipstep\[evaluate\]"):
        write_report([tmp_path / "run.json"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@given(st.text(), st.text())
def test_text_stays_text(content, value):
    page = Page(element("p", content, title=value))
    assert [tag for tag, _ in page.elements] == ["p"]
    assert page.elements[0][1] == {"title": plain(value)}
    assert page.text == plain(content)
    assert Page(prose(content)).text == plain(content).replace("`", "")


@given(st.lists(st.lists(st.text(max_size=8), min_size=3, max_size=3), min_size=1, max_size=4), st.text(max_size=8))
@settings(max_examples=50)
def test_tables_hold_their_cells(rows, label):
    page = Page(table(["a", "b", "c"], rows, label=label))
    assert len(page.all("tr")) == len(rows) + 1
    assert page.text == "abc" + "".join(plain(cell) for row in rows for cell in row)


# In a real browser: what a stylesheet does is only known there.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
# Everything that is wider than the window, but for what lies in a box that scrolls; then the same with all unfolded.
HARNESS = """<!doctype html><title>-</title><body style="margin:0">
<iframe id="f" style="border:0;width:WIDTHpx;height:740px" srcdoc="PAGE"></iframe>
<script>
document.getElementById("f").onload = function () {
  const page = this.contentDocument, found = [];
  function measure() {
    found.push(page.documentElement.scrollWidth);
    for (const each of page.querySelectorAll("body *"))
      if (!each.parentElement.closest(".scroll, svg") && each.getBoundingClientRect().right > WIDTH + 0.5)
        found.push(each.tagName + "." + each.className);
  }
  measure();
  page.querySelectorAll("details").forEach(each => each.open = true);
  measure();
  const text = page.querySelector("figure .plot text"), style = getComputedStyle(text);
  found.push("text " + Math.round(10 * parseFloat(style.fontSize) * text.getScreenCTM().a) / 10);
  found.push("scripts " + page.scripts.length);
  document.title = found.join(" | ");
};
</script>"""


def chromium(tmp_path, url, *options, timeout=120):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", *options, url,
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=timeout)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@browser
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(whole, tmp_path, width):
    page = html.escape(whole.read_text(encoding="utf-8"), quote=True)
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.replace("WIDTH", str(width)).replace("PAGE", page), encoding="utf-8")
    document = chromium(tmp_path, harness.as_uri(), "--dump-dom", "--virtual-time-budget=20000")
    found = html.unescape(re.search(r"<title>(.*?)</title>", document, re.DOTALL).group(1)).split(" | ")
    assert found[:2] == [str(width)] * 2, found
    size = float(found[2].removeprefix("text "))
    assert size >= 8.5, "the labels of plots are too small to read"
    assert found[3:] == ["scripts 0"]


@browser
@pytest.mark.parametrize(("scheme", "palette"), [(1, LIGHT), (0, DARK)], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 900)])
def test_it_follows_the_reader_from_light_to_dark(whole, tmp_path, scheme, palette, width, height):
    # Windows are no narrower than 500 pixels, frames are.
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<!doctype html><meta name="color-scheme" content="light dark"><body style="margin:0">'
        f'<iframe src="{whole.as_uri()}" style="border:0;width:{width}px;height:{height}px;display:block"></iframe>'
    )
    picture = tmp_path / "page.png"
    size = f"--window-size={max(width, 500)},{height}"
    chromium(
        tmp_path, frame.as_uri(), size, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={scheme}"
    )
    with Image.open(picture) as image:
        counted = image.convert("RGB").crop((0, 0, width, height)).getcolors(1 << 24)
        colours = {colour: count for count, colour in counted}

    def rgb(role):
        return tuple(int(palette[role][i : i + 2], 16) for i in (1, 3, 5))

    assert max(colours, key=colours.get) == rgb("page")
    assert colours.get(rgb("ink"), 0) > 100
    assert colours.get(rgb("ours"), 0) > 20
    if destination := os.environ.get("SKIPSTEP_SCREENSHOTS"):
        Path(destination).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, Path(destination) / f"report-{width}-{'dark' if palette is DARK else 'light'}.png")


@browser
def test_paper_shows_what_is_folded(whole, tmp_path):
    pypdf = pytest.importorskip("pypdf", reason="pypdf reads the printed page")
    chromium(tmp_path, whole.as_uri(), f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    text = " ".join(page.extract_text() for page in pypdf.PdfReader(tmp_path / "page.pdf").pages)
    assert text.count("onnxruntime-stepwise-python") > 40
