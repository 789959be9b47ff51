from __future__ import annotations

import json

import pytest
from bench_suite import nap_kind, save_model

from skipstep.bench import contenders
from skipstep.bench.results import read_run
from skipstep.commands.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def bench(model, capsys):
    def run(*arguments, folder=model):
        status = main(["bench", "--model", str(folder), "--threads", "1", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_prints_a_table_with_ratios_and_writes_the_run(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(contenders.CONTENDERS, "off", nap_kind("off", change=lambda x: x + 1))
    out = tmp_path / "new" / "results.json"
    status, text, err = bench(
        "--plans", "2,1", "--batch", "1", "--contenders", "skipstep-torch-stepwise,off", "--rounds", 3, "--out", out
    )
    assert status == 0, err
    assert "tiny, 1 steps, batch 1, float32" in text
    assert "× textbook" in text
    assert "off: wrong: samples are off by" in text
    run = read_run(out)
    assert [case.steps for case in run.cases] == [1, 2]
    assert run.options["command"].startswith("skipstep bench --model tiny --plans 2,1")
    assert str(tmp_path) not in run.options["command"]
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plans", "0"), "plans 0"),
        (("--batch", "-1"), "batch -1"),
        (("--contenders", "nobody"), "names among textbook"),
        (("--measure", "nothing"), "names among fits"),
        (("--resume",), "--resume without --out"),
    ],
)
def test_bad_input_is_explained(bench, arguments, message):
    status, _, err = bench(*arguments)
    assert status == 2
    assert message in err


def test_a_model_without_a_scheduler_says_what_to_write(bench, model, tmp_path):
    (tmp_path / "unet").symlink_to(model / "unet")
    status, _, err = bench("--plans", "1", folder=tmp_path)
    assert status == 2
    assert "without a scheduler configuration" in err
    assert "save_pretrained" in err


def test_a_journal_of_other_settings_is_refused(bench, tmp_path):
    out = tmp_path / "results.json"
    journal = tmp_path / "results.json.partial.json"
    journal.write_text(json.dumps({"schema": 1, "environment": {}, "options": {"steps": [7]}, "cases": []}))
    status, _, err = bench("--plans", "1", "--out", out, "--resume")
    assert status == 2
    assert "measured with other settings" in err
    assert not out.exists()
