"""A batcher over a small engine, and one that is held in the middle of its work."""

from __future__ import annotations

import pytest
from serving_cases import SECONDS, Gate, serving_engine

from skipstep.serving import Batcher


@pytest.fixture(scope="module")
def engine():
    with serving_engine() as made:
        yield made


@pytest.fixture
def batcher(engine):
    with Batcher(engine) as made:
        yield made


@pytest.fixture
def held(batcher):
    """A request that holds the batcher in the middle of its work, the gate that does it, and its arguments."""
    gate, arguments = Gate(), {"steps": 5, "seeds": 1, "class_labels": 0}
    future = batcher.submit(**arguments, callback=gate)
    assert gate.reached.wait(SECONDS)
    yield future, gate, arguments
    gate.opened.set()
