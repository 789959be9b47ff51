"""The report page: what it shows, that it is safe whatever a file says, and how it looks in a browser."""

from __future__ import annotations

import itertools
import re

import pytest
from bench_results import MACHINE, write_result
from PIL import Image
from report_pages import DARK, Page, small

from skipstep.bench.page.numbers import Panel, panels
from skipstep.bench.page.plots import LIGHT
from skipstep.bench.result_files import read_runs


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


def test_quality_is_joined_by_plan_key(report, evaluation):
    page = report(small(), evaluation=evaluation)
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


def test_an_evaluation_of_other_plans_has_no_section(report, evaluation):
    result = small()
    for each in result["benchmarks"]:
        each["extra_info"]["plan"]["key"] = f"another {each['extra_info']['plan']['steps']}"
    assert "Choose a plan" not in report(result, evaluation=evaluation).text


def test_for_a_deadline_it_takes_the_most_steps_that_fit(report, evaluation):
    result = small(steps=(5, 10))
    times = {5: [0.020, 0.024], 10: [0.040, 0.060]}
    for each in result["benchmarks"]:
        each["stats"]["data"] = times[each["extra_info"]["plan"]["steps"]]
    rows = report(result, evaluation=evaluation).rows("The most steps for each deadline")
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


def test_the_same_inputs_make_the_same_files(report, tmp_path):
    first = report(small(), out=tmp_path / "a")
    second = report(small(), out=tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.folder.iterdir()} == {
        p.name: p.read_bytes() for p in second.folder.iterdir()
    }


# In a real browser: what a stylesheet does is only known there.
