from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from bench_results import a_result, write_evaluation, write_result

from skipstep.commands.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path):
    result = a_result(models=("fashion-mnist",), steps=(5, 10, 20), batches=(1,))
    return write_result(tmp_path / "results" / "run.json", result).parent


def test_writes_the_page_says_where_and_names_what_it_does_not_use(results, tmp_path, capsys):
    shutil.copy(ROOT / "bench" / "results" / "host-work.json", results)
    assert main(["report", *sorted(map(str, results.glob("*.json"))), "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote {tmp_path / 'out' / 'report.html'}\n"
    assert captured.err == f"{results / 'host-work.json'} is not used: it is no result of skipstep bench\n"
    assert list((tmp_path / "out").glob("*.png"))


def test_finds_the_evaluation_beside_the_results(results, tmp_path):
    write_evaluation(results / "evaluation")
    assert main(["report", str(results / "run.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "m1-quality.png").exists()
    other = ["--evaluated-model", "another", "--out", str(tmp_path / "other")]
    assert main(["report", str(results / "run.json"), *other]) == 0
    assert "Choose a plan" not in (tmp_path / "other" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "InputError: got none.json, which cannot be read"),
        (["RUN", "--evaluation", "nowhere"], "InputError: got nowhere, which is no folder"),
        (["RUN", "--out", "RUN"], "StorageError"),
    ],
)
def test_mistakes_are_typed_errors(results, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(results / "run.json") if each == "RUN" else each for each in arguments]
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_no_file_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        main(["report"])
    assert "FILE" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_a_package_the_error_names_the_extra(results, tmp_path, monkeypatch, capsys, package):
    for name in [name for name in sys.modules if name.startswith("skipstep.bench.page")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["report", str(results / "run.json"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'skipstep[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
