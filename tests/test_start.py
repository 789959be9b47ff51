"""From the start of a process to its first image: what is imported, in which order, and what that costs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from skipstep.demo import SHIPPED_BUNDLE

FIRST_IMAGE = f"""
from skipstep import load
engine = load({str(SHIPPED_BUNDLE)!r}, backend="onnxruntime", allow_hard_links=True)
engine.sample(steps=10, seeds=1, class_labels=0)
"""
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


@pytest.fixture(scope="module")
def imported() -> dict[str, int]:
    """Microseconds of each module's own import, in the order in which they ended; the fewest of three processes."""
    runs = []
    for _ in range(3):
        command = [sys.executable, "-X", "importtime", "-c", FIRST_IMAGE]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        runs.append({name: int(microseconds) for microseconds, name in _LINE.findall(told)})
    return {name: min(run.get(name, cost) for run in runs) for name, cost in runs[0].items()}


def test_a_first_image_imports_only_what_draws_it(imported):
    unused = ("skipstep.editing", "skipstep.fitting", "skipstep.latency", "skipstep.saving", "skipstep.building")
    assert [name for name in imported if name.startswith(unused)] == []
    heavy = {"torch", "triton", "onnx", "openvino", "PIL", "tqdm", "numpy.polynomial", "statistics", "decimal"}
    assert heavy & imported.keys() == set()


def test_the_session_begins_before_what_only_a_call_needs(imported):
    order = list(imported)
    begins = order.index("onnxruntime")
    for later in ("skipstep.bundles.tables", "skipstep.calls.plan_set", "skipstep.loops.stepwise", "skipstep.engine"):
        assert begins < order.index(later), later


def test_our_imports_cost_less_than_those_of_numpy_and_onnx_runtime(imported):
    def seconds(*roots: str) -> float:
        return sum(cost for name, cost in imported.items() if name.split(".")[0] in roots) / 1e6

    assert 0 < seconds("skipstep") < seconds("numpy", "onnxruntime")


def test_methods_of_other_modules_are_the_class_s_own_once_asked_for():
    code = f"""
import sys, inspect
{FIRST_IMAGE}
assert "skipstep.editing.edit" not in sys.modules
from skipstep import Engine
assert callable(engine.edit) and "strength" in inspect.signature(engine.edit).parameters
from skipstep.editing.edit import edit
assert Engine.edit is edit and vars(Engine)["edit"] is edit and engine.edit.__self__ is engine
class Own(Engine):
    pass
assert Own.save is Engine.save and "save" not in vars(Own)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
