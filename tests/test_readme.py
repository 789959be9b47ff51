"""The READMEs: their Python runs as it stands, their links lead to files, and the files of a call are as listed."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import skipstep
from skipstep.demo import SHIPPED_BUNDLE

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "kernels", "export", "bench")
PAGES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in FOLDERS)]
MOST_BYTES = 10_240


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def run_blocks(page: Path) -> dict[str, Any]:
    """What the page's blocks leave behind, run in order in one namespace, as a reader would run them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(python_blocks(page), 1):
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), names)
    return names


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= MOST_BYTES


def test_the_first_pages_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(ROOT / "README.md")
    assert len(python_blocks(ROOT / "README.md")) == 3
    assert [image.size for image in names["images"]] == [(28, 28)] * 2
    assert names["latents"].shape == names["boots"].shape == (2, 1, 28, 28)
    assert len(names["between"]) == 10
    assert names["samples"].shape == (8, 1, 16, 16)
    assert (names["samples"] == names["again"]).all()
    assert names["x_0"].shape == (1, 1, 28, 28)
    assert names["buffer"].std(axis=(1, 2, 3)).all()
    printed = capsys.readouterr().out
    assert "onnxruntime on cpu" in printed
    assert printed.count("plan  ") == 6


# Of bench/ a whole run of its own, as in tests/bench/test_harness.py.
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.parent.name == "bench" else ()) for page in PAGES[1:]],
    ids=name_of,
)
def test_the_other_pages_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(page)
    assert bool(capsys.readouterr().out.strip()) == bool(python_blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    if page == PAGES[0]:
        assert {f"{folder}/README.md" for folder in FOLDERS} <= set(links)
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings], link


def test_the_engines_page_names_the_files_of_a_call():
    page = (ROOT / "engine" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"`([\w/]+\.py)`", page.partition("<!-- call -->")[2].partition("<!-- end call -->")[0])
    with skipstep.load(SHIPPED_BUNDLE, num_threads=1) as engine:
        executed = files_executed(
            lambda: engine.sample(steps=20, seeds=[0, 1], class_labels=[3, 7], guidance_scale=2.0)
        )
    assert sorted(listed) == sorted(executed)
    assert f"of {len(executed)} files" in page


def files_executed(call: Any) -> set[str]:
    """The files of this tree whose functions a call executes, on any thread that it starts."""
    executed: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            executed.add(frame.f_code.co_filename)

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    sources = {str(file.resolve()): file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    found = {sources.get(str(Path(name).resolve())) for name in executed}
    return {file.relative_to(ROOT).as_posix() for file in found if file is not None}
