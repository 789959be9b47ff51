"""Fixtures of this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bench_results import a_result, write_evaluation, write_result
from report_pages import Page

from skipstep.bench.page.document import write_report


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


@pytest.fixture
def evaluation(tmp_path):
    return write_evaluation(tmp_path / "evaluation")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page with every section: two commits, and an evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    results = [a_result("a1e2d45"), a_result("011de5f", day=2, slower=1.16)]
    paths = [write_result(folder / f"{number}.json", each) for number, each in enumerate(results)]
    return write_report(paths, folder / "out", evaluation=write_evaluation(folder / "evaluation"))[0]


@pytest.fixture(scope="session")
def dry_run(tmp_path_factory):
    """The whole gate, as make gpu runs it but for --dry-run."""
    folder = tmp_path_factory.mktemp("gate")
    command = [
        sys.executable,
        "-m",
        "skipstep.bench.gpu",
        "--dry-run",
        "--out",
        folder / "out",
        "--cache",
        folder / "c",
    ]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    return ended, folder / "out"
