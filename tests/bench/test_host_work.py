"""What a call costs the host is measured on the real engine: it draws, and takes no new host memory."""

import sys

import pytest
import torch

from skipstep.bench.host_work import CASES, IdleDevice, idle_engine, microseconds


@pytest.mark.parametrize("case", CASES)
def test_calls_are_measured_as_they_are(case, monkeypatch):
    arguments, labels = CASES[case]
    with idle_engine(3) as engine:
        assert {report.loop for report in engine.captures} == {"captured"}
        taken = []
        monkeypatch.setattr(IdleDevice, "staging", lambda self, num_bytes: taken.append(num_bytes))
        assert microseconds(engine, {"steps": 3, **arguments}, labels, calls=3) > 0
    assert taken == []


def calls_of(engine, *, label=3, **arguments):
    """How many functions a call enters, Python's and C's, that has this label after one with another."""
    entered = 0

    def count(frame, event, argument):
        nonlocal entered
        entered += event in ("call", "c_call")

    out = torch.zeros(1, 3, 32, 32)
    for seed in range(4):
        engine.sample(seeds=[seed], out=out, class_labels=seed, **arguments)
    sys.setprofile(count)
    try:
        engine.sample(seeds=[3], out=out, class_labels=label, **arguments)
    finally:
        sys.setprofile(None)
    return entered


def test_the_host_does_little_and_no_more_for_more_steps():
    """Counted, since times differ between machines: some 270 functions were 75 microseconds."""
    entered = {}
    for steps in (10, 200):
        with idle_engine(steps) as engine:
            entered[steps] = calls_of(engine, steps=steps)
    assert entered[10] == entered[200]
    assert entered[10] <= 185


def test_a_label_that_comes_again_costs_next_to_nothing():
    with idle_engine(10) as engine:
        same, known, new = (calls_of(engine, steps=10, guidance_scale=2.0, label=label) for label in (3, 1, 7))
    assert known <= same + 10
    assert new > known + 20, "it is computed"
