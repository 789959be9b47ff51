from __future__ import annotations

import json
from pathlib import Path

import pytest

from skipstep.bench import report
from skipstep.bench.record import environment, write_json
from skipstep.errors import InputError

ROOT = Path(__file__).parents[2]
PAGE = "before\n<!-- table agreement -->\nold\n<!-- end agreement -->\nafter\n"


@pytest.fixture
def results(tmp_path):
    run = {"steps": 10, "agreement": 0.912, "agreement_by_class": {"bag": 0.95, "shirt": 0.7}}
    write_json(tmp_path / "class-agreement.json", {"results": [{**run, "num_samples": 40, "guidance_scale": 2.0}]})
    return tmp_path


def test_the_readme_shows_the_committed_results():
    page = (ROOT / "README.md").read_text()
    assert all(f"<!-- table {name} -->" in page for name in report.TABLES)
    assert report.main([str(ROOT / "README.md"), str(ROOT / "bench" / "results"), "--check"]) == 0


def test_a_table_replaces_what_stood_there(results):
    filled = report.fill(PAGE, results)
    assert "| 10 | 91.2% | 70% (shirt) |" in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")
    assert "old" not in filled
    assert report.fill(filled, results) == filled


def test_check_tells_a_stale_page_and_leaves_it(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert report.main([str(page), str(results), "--check"]) == 1
    assert page.read_text() == PAGE
    assert report.main([str(page), str(results)]) == 0
    assert report.main([str(page), str(results), "--check"]) == 0


@pytest.mark.parametrize(
    ("page", "name"),
    [("<!-- table speed -->\n<!-- end speed -->", "speed"), ("<!-- table agreement -->\n", "1 marks of which 0")],
)
def test_marks_that_mean_nothing_are_refused(results, page, name):
    with pytest.raises(InputError, match=name):
        report.fill(page, results)


def test_a_missing_result_names_the_command(tmp_path):
    with pytest.raises(InputError, match="make bench"):
        report.fill(PAGE, tmp_path)


def test_committed_results_say_where_they_come_from_but_not_whose_machine_it_was():
    files = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert files
    for file in files:
        text = file.read_text()
        assert '"commit"' in text
        assert '"cpu"' in text
        assert '"node"' not in text


def test_results_are_written_whole_with_their_environment(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"value": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"environment": environment(), "value": 1}
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"value": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text())["value"] == 1
