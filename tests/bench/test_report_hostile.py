"""The report's page with files that are damaged, hostile or of other kinds, and in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from bench_results import write_result
from chromium import PROGRAM
from chromium import Page as Browser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_pages import DARK, ROOT, Page, small

from skipstep.bench.page.document import write_report
from skipstep.bench.page.plots import LIGHT, printable
from skipstep.errors import InputError, StorageError

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
        write_report([ROOT / "bench" / "results" / "host-work.json"], tmp_path / "out")


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


@pytest.mark.parametrize("rows", ["", "[]", '{"rows": {}}', '{"rows": {"a": {"table": "solvers", "guidance": 1.0}}}'])
def test_a_damaged_evaluation_is_refused(tmp_path, rows):
    (tmp_path / "rows.json").write_text(rows)
    with pytest.raises(InputError, match=r"rows\.json"):
        write_report([write_result(tmp_path / "run.json", small())], tmp_path / "out", evaluation=tmp_path)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="out"):
        write_report([write_result(tmp_path / "run.json", small(steps=(1,)))], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("browser") / "profile", options=("--hide-scrollbars",)) as browser:
        yield browser


def show(browser, page, **options):
    browser.open(page.as_uri(), **options)
    browser.wait(f"location.href == {page.as_uri()!r} && document.readyState == 'complete'")


# Everything that is wider than the window, but for what lies in a box that scrolls; then the same with all unfolded.
MEASURE = """(width => {
  const wide = [];
  function measure() {
    wide.push(document.documentElement.scrollWidth);
    for (const each of document.querySelectorAll("body *"))
      if (!each.parentElement.closest(".scroll, svg") && each.getBoundingClientRect().right > width + 0.5)
        wide.push(each.tagName + "." + each.className);
  }
  measure();
  document.querySelectorAll("details").forEach(each => each.open = true);
  measure();
  const text = document.querySelector("figure .plot text");
  const size = parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a;
  return {wide, size, scripts: document.scripts.length};
})"""


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(browser, whole, width):
    show(browser, whole, width=width, height=740)
    found = browser.evaluate(f"{MEASURE}({width})")
    assert found["wide"] == [width] * 2
    assert found["size"] >= 8.5, "the labels of plots are too small to read"
    assert found["scripts"] == 0


@pytest.mark.parametrize(("dark", "palette"), [(False, LIGHT), (True, DARK)], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 900)])
def test_it_follows_the_reader_from_light_to_dark(browser, whole, tmp_path, dark, palette, width, height):
    show(browser, whole, width=width, height=height, dark=dark)
    browser.screenshot(picture := tmp_path / "page.png")
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
        shutil.copy(picture, Path(destination) / f"report-{width}-{'dark' if dark else 'light'}.png")


def test_paper_shows_what_is_folded(browser, whole):
    pypdf = pytest.importorskip("pypdf", reason="pypdf reads the printed page")
    show(browser, whole)
    printed = base64.b64decode(browser.send("Page.printToPDF")["data"])
    text = " ".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(printed)).pages)
    assert text.count("diffusers-compile") > 30
