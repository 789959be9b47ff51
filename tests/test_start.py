"""From the start of a process to its first image: what is imported, in which order, and what that costs."""

from __future__ import annotations

import os
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
# What `skipstep sample` may import, above what it does with Python 3.11, NumPy 2.4, ONNX Runtime 1.31 and Pillow 13
# (356 modules): other versions have more or fewer of their own. With tqdm, which it needs only where drawing takes
# long, it was 414.
MAX_MODULES = 380
NEVER = {"torch", "triton", "onnx", "openvino", "tqdm", "numpy.polynomial", "statistics", "importlib.metadata"}
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A function that runs Python and returns (module, microseconds) in the order in which imports ended.

    Compiled modules are kept, as they are for users: without, our own modules alone would be compiled each time.
    """
    kept = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("compiled"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(*command: str) -> list[tuple[str, int]]:
        result = subprocess.run(
            [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True, env=kept
        )
        return [(name, int(microseconds)) for microseconds, name in _LINE.findall(result.stderr)]

    return run


@pytest.fixture(scope="module")
def imported(told) -> dict[str, int]:
    """Microseconds of each module's own import, in the order in which they ended; the fewest of four processes.

    The first has no graph that was kept: a thread that makes one imports, too, and their lines may mix.
    """
    runs = [dict(told("-c", FIRST_IMAGE)) for _ in range(4)]
    return {name: min(run.get(name, cost) for run in runs) for name, cost in runs[-1].items()}


def test_a_first_image_imports_only_what_draws_it(imported):
    unused = ("skipstep.editing", "skipstep.fitting", "skipstep.latency", "skipstep.saving", "skipstep.building")
    assert [name for name in imported if name.startswith(unused)] == []
    heavy = {"torch", "triton", "onnx", "openvino", "PIL", "tqdm", "numpy.polynomial", "statistics", "decimal"}
    heavy |= {"concurrent.futures", "logging", "tempfile"}
    assert heavy & imported.keys() == set()


def test_the_command_imports_only_what_draws_and_writes_pictures(told, tmp_path):
    command = ["-m", "skipstep", "sample", "--steps", "4", "--num", "1", "--out", str(tmp_path)]
    names = {name for name, _ in told(*command, "--backend", "onnxruntime")}
    assert NEVER & names == set()
    unused = ("skipstep.editing", "skipstep.fitting", "skipstep.saving", "skipstep.building", "skipstep.export")
    assert [name for name in names if name.startswith((*unused, "email", "multiprocessing", "asyncio"))] == []
    assert "skipstep.calls.images" in names
    assert len(names) < MAX_MODULES
    assert list(tmp_path.rglob("*.png"))


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
