"""What a call costs the host is measured on the real engine: it draws, and takes no new host memory."""

import pytest

from skipstep.bench.host_work import CASES, IdleDevice, idle_engine, microseconds


@pytest.mark.parametrize("case", CASES)
def test_calls_are_measured_as_they_are(case, monkeypatch):
    arguments, varies = CASES[case]
    with idle_engine(3) as engine:
        assert {report.loop for report in engine.captures} == {"captured"}
        taken = []
        monkeypatch.setattr(IdleDevice, "staging", lambda self, num_bytes: taken.append(num_bytes))
        assert microseconds(engine, {"steps": 3, **arguments}, varies, calls=3) > 0
    assert taken == []
