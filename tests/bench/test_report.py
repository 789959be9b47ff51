from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_results import a_result, write_result

from skipstep.bench import report
from skipstep.bench.record import environment, write_json
from skipstep.errors import InputError

ROOT = Path(__file__).parents[2]
PAGE = "before\n<!-- table guesses -->\nold\n<!-- end guesses -->\nafter\n"


@pytest.fixture
def results(tmp_path):
    (tmp_path / "findings").mkdir()
    finding = {"header": ["plan", "recognised"], "rows": [["fitted", "91.2%"]], "note": "Forty samples."}
    write_json(tmp_path / "findings" / "guesses.json", finding)
    return tmp_path


def test_the_readmes_show_the_committed_results():
    pages = sorted([ROOT / "README.md", *ROOT.glob("[a-z]*/README.md"), ROOT / "engine/networks/README.md"])
    text = "".join(page.read_text() for page in pages)
    assert all(f"<!-- table {name} -->" in text for name in report.TABLES)
    assert report.main([str(ROOT / "bench" / "results"), *map(str, pages), "--check"]) == 0


def test_a_finding_is_a_table_with_the_command_and_the_commit_that_made_it():
    files = sorted((ROOT / "bench" / "results" / "findings").glob("*.json"))
    text = (ROOT / "bench" / "results" / "README.md").read_text()
    for file in files:
        finding = json.loads(file.read_text())
        assert finding["command"]
        assert finding["commit"] == finding["environment"]["commit"]
        assert all(len(row) == len(finding["header"]) for row in finding["rows"])
        assert report.finding_table(file).startswith(f"| {finding['header'][0]} |")
        assert f"findings/{file.name}" in text
        assert f"`{finding['command']}`" in text
        assert finding["commit"] in text


def test_tables_of_benchmarks_compare_medians_of_ratios(tmp_path):
    result = a_result(models=("fashion-mnist",), steps=(5, 10), batches=(1, 4))
    ratios = {"textbook": [1.0, 1.0, 1.0], "diffusers": [0.5, 1.0, 1.0], "network": [4.0, 4.0, 4.0]}
    for each in result["benchmarks"]:
        each["extra_info"]["ratios"] = ratios.get(each["extra_info"]["contender"], [2.0, 3.0, 3.6])
        each["stats"]["data"] = [0.1, 0.2, 0.3]
    write_result(tmp_path / "runs" / "a.json", result)
    filled = report.fill("<!-- table sampling -->\n<!-- end sampling -->\n", tmp_path)
    assert "| fashion-mnist | 4 | 200 | 200 | 200 | 3.00× | **3.00×** | 25.0% |" in filled
    assert "AMD EPYC, 2 cores, torch 2.13.0+cpu, commit 011de5f." in filled
    filled = report.fill("<!-- table contenders -->\n<!-- end contenders -->\n", tmp_path)
    assert "| fashion-mnist | skipstep | 200 | 3.00× | 3e-06 of 0.001 |" in filled


def test_a_table_replaces_what_stood_there(results):
    filled = report.fill(PAGE, results)
    assert "| fitted | 91.2% |" in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")
    assert "old" not in filled
    assert report.fill(filled, results) == filled


def test_check_tells_a_stale_page_and_leaves_it(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert report.main([str(results), str(page), "--check"]) == 1
    assert page.read_text() == PAGE
    assert report.main([str(results), str(page)]) == 0
    assert report.main([str(results), str(page), "--check"]) == 0


@pytest.mark.parametrize(
    ("page", "name"),
    [("<!-- table speed -->\n<!-- end speed -->", "speed"), ("<!-- table guesses -->\n", "1 marks of which 0")],
)
def test_marks_that_mean_nothing_are_refused(results, page, name):
    with pytest.raises(InputError, match=name):
        report.fill(page, results)


def test_a_missing_result_names_the_command(tmp_path):
    with pytest.raises(InputError, match="make bench"):
        report.finding_table(tmp_path / "findings" / "guesses.json")


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
