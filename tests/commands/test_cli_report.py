from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bench_runs import a_run

from skipstep.bench.results import write_run
from skipstep.commands.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    write_run(folder / "run.json", a_run(models=("fashion-mnist",), steps=(5, 10, 20), batches=(1,)))
    return folder


def test_writes_the_page_and_says_where(results, tmp_path, capsys):
    assert main(["report", str(results / "run.json"), "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote {tmp_path / 'out' / 'report.html'}\n"
    assert captured.err == ""
    assert list((tmp_path / "out").glob("*.png"))


def test_takes_all_of_a_results_folder_and_notes_what_it_leaves_aside(results, tmp_path, capsys):
    for path in (ROOT / "bench" / "results").glob("*.json"):
        shutil.copy(path, results)
    paths = sorted(map(str, results.glob("*.json")))
    assert main(["report", *paths, "--out", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert "bundles.json is left aside" in err
    assert "partition.json is left aside" in err
    assert "cold-start.json" not in err


def test_finds_the_evaluation_beside_the_results(results, tmp_path):
    shutil.copytree(ROOT / "bench" / "results" / "evaluation", results / "evaluation", ignore=lambda *_: ["cache"])
    assert main(["report", str(results / "run.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "quality-fashion-mnist.png").exists()
    other = ["--evaluated-model", "another", "--out", str(tmp_path / "other")]
    assert main(["report", str(results / "run.json"), *other]) == 0
    assert "timed here with another" in (tmp_path / "other" / "report.html").read_text()


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
