"""The report page: what it shows, that it is safe whatever a file says, and how it looks in a browser."""

from __future__ import annotations

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
from bench_results import MACHINE, a_result, write_result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from skipstep.bench.page.document import write_report
from skipstep.bench.page.numbers import Panel, panels
from skipstep.bench.page.plots import LIGHT, STYLE_SHEET, printable
from skipstep.bench.result_files import read_runs
from skipstep.errors import InputError, StorageError

ROOT = Path(__file__).parents[2]
EVALUATION = ROOT / "bench" / "results" / "evaluation"
DARK = dict(re.findall(r"--(\w+):(#\w{6})", STYLE_SHEET.split("@media")[1]))
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'--><svg onload=alert(1)>]]>",
    "{{ 7 * 7 }}{% raw %}",
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

    def rows(self, label):
        """The cells of the table with that label, by row."""
        body = re.search(rf'aria-label="{re.escape(label)}".*?<tbody>(.*?)</tbody>', self.source, re.DOTALL).group(1)
        return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in body.split("</tr>")[:-1]]


@pytest.fixture
def report(tmp_path):
    """Write results as files, make the report, and return its page."""

    def make(*contents, evaluation=None, out=tmp_path / "out"):
        paths = [write_result(tmp_path / f"{number}.json", each) for number, each in enumerate(contents)]
        page, notes = write_report(paths, out, evaluation=evaluation)
        parsed = Page(page.read_text(encoding="utf-8"))
        parsed.notes = notes
        parsed.folder = page.parent
        return parsed

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page with every section: two commits, and an evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    results = [a_result("a1e2d45"), a_result("011de5f", day=2, slower=1.16)]
    paths = [write_result(folder / f"{number}.json", each) for number, each in enumerate(results)]
    return write_report(paths, folder / "out", evaluation=EVALUATION)[0]


def small(commit="011de5f", **options):
    return a_result(commit, models=("fashion-mnist",), **{"steps": (5, 10, 20), "batches": (1,), **options})


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
        if key in ("href", "xlink:href")
    } | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert wanted <= set(ids)


def test_it_can_be_read_aloud(whole):
    page = Page(whole.read_text(encoding="utf-8"))
    assert page.all("html")[0]["lang"] == "en"
    assert MACHINE in page.text[:200]
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
    assert len(pictures) == len(page.plots) == 1 + 2 * 2 * 3
    assert "m1-1-fashion-mnist-batch-1-latency.png" in {picture.name for picture in pictures}
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
        for text in ("ink", "muted", "ours"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
        for line in ("reference", "s1", "s2", "s3", "s4", "s5", "s6"):
            assert contrast(palette[line], palette[ground]) >= 3, (line, ground)
    assert set(LIGHT) == set(DARK)


def test_a_plot_has_at_most_four_lines_beside_ours_and_more_than_one_point_on_each(whole):
    page = Page(whole.read_text(encoding="utf-8"))
    for plot in page.plots:
        lines = plot["aria-label"].split("; ")
        assert 2 <= len(lines) <= 5
    assert "skipstep-torch" in {row[1] for row in page.rows("fashion-mnist, batch 1")}


def test_one_number_of_steps_is_no_plot_but_a_table(report):
    page = report(small(steps=(10,)))
    assert not page.plots
    assert "Latency against steps" not in page.text
    assert len(page.rows("fashion-mnist, batch 1")) == 8


def test_the_summary_opens_with_the_machine_and_the_ratio(report):
    result = small()
    speeds = {"textbook": 0.2, "diffusers": 0.25, "skipstep": 0.05}
    result["benchmarks"] = [each for each in result["benchmarks"] if each["extra_info"]["contender"] in speeds]
    for each in result["benchmarks"]:
        seconds = speeds[each["extra_info"]["contender"]]
        each["stats"]["data"], each["extra_info"]["ratios"] = [seconds] * 3, [0.2 / seconds] * 3
    page = report(result)
    assert "AMD EPYC, 2 cores, commit 011de5f" in page.text
    assert "4.00×as fast as the textbook PyTorch loop" in page.text
    assert "5.00× against diffusers" in page.text
    assert "Ours is skipstep," in page.text
    assert "200 msfrom process start to first image5 steps of fashion-mnist; diffusers takes 5 s" in page.text


def test_tables_hold_percentiles_by_nearest_rank_and_ratios_within_the_rounds(report):
    result = small(steps=(10,))
    for each in result["benchmarks"]:
        each["stats"]["data"] = [0.001 * (10 + i) for i in range(20)]
        each["extra_info"]["ratios"] = [2.0, 4.0, 3.0] if each["extra_info"]["contender"] == "skipstep" else [2.0] * 3
        each["extra_info"]["error"] = 2e-7
    rows = {row[1]: row for row in report(result).rows("fashion-mnist, batch 1")}
    assert rows["skipstep"] == ["10", "skipstep", "19.5", "27.0", "29.0", "1.50×", "1.50×", "20", "2.0e-07"]


def test_contenders_without_a_number_are_named_with_the_reason(report):
    result = small()
    one = {"model": "fashion-mnist", "contender": "openvino", "steps": 50, "batch_size": 1, "reason": "failed: no luck"}
    result["skipstep"]["absent"].append(one)
    measured = {**one, "steps": 10, "reason": "an older run"}
    result["skipstep"]["absent"].append(measured)
    rows = report(result).rows("Contenders without a number")
    assert ["skipstep-captured", "3 cases", "absent: no CUDA device"] in rows
    assert ["openvino", "fashion-mnist, 50 steps, batch 1", "failed: no luck"] in rows
    assert "an older run" not in str(rows)


@pytest.mark.parametrize("contenders", [(), ("textbook",)])
def test_without_ours_or_any_case_it_is_still_a_page(report, contenders):
    result = small()
    result["benchmarks"] = [each for each in result["benchmarks"] if each["extra_info"]["contender"] in contenders]
    result["skipstep"]["absent"] = []
    page = report(result)
    assert not page.plots
    assert "AMD EPYC" in page.text
    for section in ("Choose a plan", "Where the time goes", "Over commits", "Without a number", "Throughput"):
        assert section not in page.text


def test_quality_is_joined_by_plan_key(report):
    page = report(small(), evaluation=EVALUATION)
    label = next(plot["aria-label"] for plot in page.plots if plot["aria-label"].startswith("Quality"))
    assert "DDIM, η = 0: 15.7 at " in label
    rows = {(row[0], row[1]): row for row in page.rows("All plans")}
    assert rows["DDIM, η = 0", "10"][3] != "–"
    assert rows["Heun", "9"][2].startswith("≈ ")
    assert rows["Heun", "9"][3] == "–"
    # Estimates end where the measured step counts do.
    assert ("DDIM, η = 0", "50") not in rows
    best = [float(row[4]) for row in page.rows("Plans worth their time")]
    assert best == sorted(best, reverse=True)


def test_an_evaluation_of_other_plans_has_no_section(report):
    result = small()
    for each in result["benchmarks"]:
        each["extra_info"]["plan"]["key"] = f"another {each['extra_info']['plan']['steps']}"
    assert "Choose a plan" not in report(result, evaluation=EVALUATION).text


def test_for_a_deadline_it_takes_the_most_steps_that_fit(report):
    result = small(steps=(5, 10))
    times = {5: [0.020, 0.024], 10: [0.040, 0.060]}
    for each in result["benchmarks"]:
        each["stats"]["data"] = times[each["extra_info"]["plan"]["steps"]]
    rows = report(result, evaluation=EVALUATION).rows("The most steps for each deadline")
    assert [row[:3] for row in rows] == [["25 ms", "5", "24.0"], ["100 ms", "10", "60.0"]]


def test_a_fit_is_the_line_through_the_medians_and_left_out_where_they_stray(tmp_path):
    result = small(steps=(1, 10, 100))
    curve = {1: 0.01, 10: 0.02, 100: 5.0}
    for each in result["benchmarks"]:
        steps = each["extra_info"]["plan"]["steps"]
        straight = each["extra_info"]["contender"] == "skipstep"
        each["stats"]["data"] = [0.003 + 0.004 * steps] if straight else [curve[steps]]
    runs, _ = read_runs([write_result(tmp_path / "run.json", result)])
    [panel] = panels(runs)
    line = panel.fit("skipstep")
    assert (line.fixed, line.per_step) == pytest.approx((0.003, 0.004))
    assert panel.fit("textbook") is None
    assert Panel("m", 1, panel.entries[:2]).fit("skipstep") is None


def test_time_outside_the_network_is_formed_within_the_rounds(report):
    result = small(steps=(10,))
    ratios = {"skipstep": [1.8, 3.6, 2.7], "network": [2.0, 4.0, 3.0]}
    for each in result["benchmarks"]:
        each["extra_info"]["ratios"] = ratios.get(each["extra_info"]["contender"], [1.0] * 3)
    assert report(result).rows("Share of a call outside the network") == [
        ["fashion-mnist, batch 1, 10 steps", "10.0 %"]
    ]


def test_machines_are_never_mixed(report):
    other = small(machine="gpu NVIDIA H200", day=3)
    for each in other["benchmarks"]:
        each["extra_info"] |= {"model": "on-the-gpu", "device": "NVIDIA H200"}
    for each in other["skipstep"]["absent"]:
        each["model"] = "on-the-gpu"
    page = report(small(), other, small(machine="cpu aarch64 scalar, 4 cores"))
    parts = re.split(r'<section id="m\d"', page.source)[1:]
    assert len(parts) == 3
    assert sorted("on-the-gpu" in part for part in parts) == [False, False, True]
    assert not any("fashion-mnist" in part for part in parts if "on-the-gpu" in part)
    assert "on-the-gpu, NVIDIA H200, batch 1" in page.text
    assert "Over commits" not in page.text


def test_a_course_over_commits_goes_by_age_and_shows_the_change(report):
    page = report(small("ccccccc", day=9, slower=1.5), small("aaaaaaa", day=1), small("bbbbbbb", day=2, steps=(10, 20)))
    header = re.search(r'aria-label="Ratios over commits".*?</thead>', page.source, re.DOTALL).group()
    assert header.index("aaaaaaa") < header.index("bbbbbbb") < header.index("ccccccc")
    [row] = page.rows("Ratios over commits")
    assert row[0] == "fashion-mnist, batch 1"
    assert -36 <= int(row[-1].split()[0]) <= -30
    assert "Over commits" not in report(small(steps=(1, 5)), small(steps=(10, 20), day=2)).text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_file_says_is_text_and_nothing_else(report, whole, hostile):
    plainly = Page(whole.read_text(encoding="utf-8"))
    result = small()
    for each in result["benchmarks"]:
        each["extra_info"] |= {"model": hostile, "precision": hostile, "device": hostile}
        if each["extra_info"]["contender"] not in ("textbook", "skipstep"):
            each["extra_info"]["contender"] = hostile + each["extra_info"]["contender"]
    for each in result["skipstep"]["absent"]:
        each |= {"model": hostile, "contender": hostile, "reason": hostile}
    facts = dict.fromkeys(("commit", "machine", "note", "command"), hostile)
    result["skipstep"] |= {**facts, "versions": {hostile: hostile, "b": [hostile]}}
    result["machine_info"]["cpu"]["brand_raw"] = hostile
    page = report(result)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plainly.elements} | {"pre"}
    assert not any(key.startswith("on") for _, attrs in page.elements for key in attrs)
    assert printable(hostile) in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page.source)
    assert all(
        path.parent == page.folder and re.fullmatch(r"[a-z0-9-]+\.(png|html)", path.name)
        for path in page.folder.iterdir()
    )


@given(st.text())
def test_printable_text_can_be_written_and_keeps_its_length(text):
    assert len(printable(text).encode("utf-8").decode("utf-8")) == len(text)


def test_a_lone_surrogate_from_json_does_not_stop_the_page(tmp_path):
    text = json.dumps(small()).replace('"AMD EPYC"', '"AMD \\ud800 EPYC"')
    (tmp_path / "bad.json").write_text(text)
    page, _ = write_report([tmp_path / "bad.json"], tmp_path / "out")
    assert "AMD \ufffd EPYC" in page.read_text(encoding="utf-8")


def test_the_same_inputs_make_the_same_files(report, tmp_path):
    first = report(small(), out=tmp_path / "a")
    second = report(small(), out=tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.folder.iterdir()} == {
        p.name: p.read_bytes() for p in second.folder.iterdir()
    }


def test_files_of_other_kinds_are_named_and_not_used(report):
    page = report(small(), {"environment": {}, "bundles": []}, {"machine_info": {}, "benchmarks": []})
    assert len(page.notes) == 2
    assert all("is not used" in note for note in page.notes)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[" * 100_000, "\ufeff{}", '{"benchmarks": [], "skipstep": {}}', '{"benchmarks": 1, "skipstep": 2}'],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(InputError, match=r"result\.json"):
        write_report([tmp_path / "result.json"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_no_run_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        write_report([tmp_path / "none.json"], tmp_path / "out")
    with pytest.raises(InputError, match="0 files without a benchmark run"):
        write_report([], tmp_path / "out")
    with pytest.raises(InputError, match="1 files without a benchmark run"):
        write_report([ROOT / "bench" / "results" / "cold-start.json"], tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "where"),
    [
        ("skipstep", {"schema": 99}, "schema 99"),
        ("skipstep", {"machine": 3}, "machine"),
        ("skipstep", {"cores": 0}, "cores"),
        ("skipstep", {"absent": [{"model": "m"}]}, "contender"),
        ("skipstep", {"absent": {}}, "absent"),
        ("extra_info", {"schema": 99}, "schema 99"),
        ("extra_info", {"model": 3}, "model"),
        ("extra_info", {"contender": None}, "contender"),
        ("extra_info", {"batch_size": True}, "batch_size"),
        ("extra_info", {"plan": None}, "run.json"),
        ("extra_info", {"ratios": [-1.0]}, "ratios"),
        ("extra_info", {"ratios": ["fast"]}, "ratios"),
        ("extra_info", {"error": "small"}, "error"),
        ("extra_info", {"peak_bytes": float("inf")}, "peak_bytes"),
        ("extra_info", {"throughput": [{"callers": 1}]}, "calls_per_second"),
        ("plan", {"steps": "10"}, "steps"),
        ("plan", {"steps": 0}, "steps"),
        ("plan", {"key": None}, "key"),
        ("stats", {"data": []}, "not positive"),
        ("stats", {"data": [0.0]}, "not positive"),
        ("stats", {"data": [0.1, float("nan")]}, "data"),
        ("stats", {"data": 3}, "data"),
    ],
)
def test_a_part_of_the_wrong_form_is_refused(tmp_path, part, change, where):
    result = small()
    benchmark = result["benchmarks"][0]
    places = {"skipstep": result["skipstep"], "plan": benchmark["extra_info"]["plan"], **benchmark}
    places[part].update(change)
    with pytest.raises(InputError, match=where):
        write_report([write_result(tmp_path / "run.json", result)], tmp_path / "out")


@pytest.mark.parametrize(
    "rows", ["", "a,b\n1,2\n", "steps,eta,samples,proxy_frechet,agreement,plan_key\n5,0,32,nan,1,k\n"]
)
def test_a_damaged_evaluation_is_refused(tmp_path, rows):
    (tmp_path / "quality.csv").write_text(rows)
    with pytest.raises(InputError, match=r"quality\.csv"):
        write_report([write_result(tmp_path / "run.json", small())], tmp_path / "out", evaluation=tmp_path)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="out"):
        write_report([write_result(tmp_path / "run.json", small(steps=(1,)))], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


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
    assert text.count("diffusers-compile") > 30
