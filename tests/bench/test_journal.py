from __future__ import annotations

import pytest

from skipstep.bench.journal import Journal, journal_path
from skipstep.bench.results import Case, Contender
from skipstep.errors import InputError

FACTS = {"commit": "abc", "cores": 2}
OPTIONS = {"steps": (1, 10), "digests": {"net": "0f"}}
CASE = Case("net", 10, 1, "float32", "key", (Contender("textbook", "ok", seconds=(1.0, 1.1, 0.9), ratio=1.0),))


def journal(path, resume=True, **changes):
    return Journal(path, environment=FACTS, options={**OPTIONS, **changes}, resume=resume)


def test_what_was_measured_is_there_again(tmp_path):
    path = tmp_path / "journal.json"
    first = journal(path)
    first.keep(CASE)
    first.keep_measurement("fits", [{"fixed_seconds": 1.0}])
    second = journal(path)
    assert second.cases == {("net", 10, 1): CASE}
    assert second.measurements == {"fits": [{"fixed_seconds": 1.0}]}


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "journal.json"
    journal(path).keep(CASE)
    with pytest.raises(InputError, match=r"digests \{'net': '0f'\}, now \{'net': '10'\}.*leave --resume out"):
        journal(path, digests={"net": "10"})
    with pytest.raises(InputError, match="commit 'abc', now 'def'"):
        Journal(path, environment={**FACTS, "commit": "def"}, options=OPTIONS, resume=True)


def test_without_resume_it_begins_anew(tmp_path):
    path = tmp_path / "journal.json"
    journal(path).keep(CASE)
    assert journal(path, resume=False, steps=(5,)).cases == {}


def test_a_damaged_journal_is_refused(tmp_path):
    path = tmp_path / "journal.json"
    path.write_text('{"schema": 1, "cases"')
    with pytest.raises(InputError, match="no benchmark result"):
        journal(path)


def test_nothing_is_left_when_the_result_is_written(tmp_path):
    out = tmp_path / "results.json"
    kept = journal(journal_path(out))
    kept.keep(CASE)
    kept.discard()
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = journal(None)
    kept.keep(CASE)
    kept.discard()
    assert kept.run().cases == (CASE,)
    assert list(tmp_path.iterdir()) == []
