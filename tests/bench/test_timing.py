from __future__ import annotations

import time

import pytest

from skipstep.bench.timing import median_ratio, take_turns


def test_contenders_take_turns_and_warm_up_first():
    calls: list[str] = []
    seconds = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_who_is_warm_already_is_not_called_for_nothing():
    calls: list[str] = []
    take_turns({"a": lambda: calls.append("a")}, rounds=2, warm_up=False)
    assert calls == ["a", "a"]


def test_times_are_seconds():
    seconds = take_turns({"nap": lambda: time.sleep(0.02)}, rounds=2)
    assert all(0.02 <= each < 0.2 for each in seconds["nap"])


def test_the_ratio_is_taken_within_a_turn():
    assert median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == pytest.approx(2.0)
