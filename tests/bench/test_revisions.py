"""Two revisions of a small package with the public API: the slower, larger one shows in every measurement."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from skipstep.bench.revisions import CASES, FIRST, main

_PACKAGE = """
import time
held = bytearray({held})
class Engine:
    def sample(self, *, steps, seeds, class_labels, guidance_scale=1.0):
        assert steps == 10 and len(seeds) == len(class_labels)
        time.sleep({nap})
def load(path, *, allow_hard_links):
    assert path.name == "fashion-mnist.bundle" and allow_hard_links
    time.sleep({nap})
    end = time.process_time() + {nap}
    while time.process_time() < end:
        pass
    return Engine()
"""
_PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "skipstep"
version = "1"
[tool.setuptools]
packages = ["skipstep"]
"""


def _commit(folder: Path, **facts: float) -> str:
    (folder / "skipstep").mkdir(parents=True, exist_ok=True)
    (folder / "skipstep" / "__init__.py").write_text(_PACKAGE.format(**facts), encoding="utf-8")
    (folder / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a revision"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()


@pytest.mark.slow
def test_what_is_slower_and_larger_shows_in_every_case(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    before = _commit(repository, nap=0.005, held=1)
    after = _commit(repository, nap=0.05, held=64 << 20)
    out = tmp_path / "comparison.json"
    main([before[:8], "--out", str(out), "--rounds", "2", "--seconds", "0.01", "--repository", str(repository)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["commits"] == {"before": before, "after": after}
    assert set(found["cases"]) == {*FIRST, *CASES}
    assert found["environment"]["cores"] >= 1
    for name, case in found["cases"].items():
        assert len(case["rounds"]) == len(case["ratios"]) == 2
        assert case["ratios"] == [late / early for early, late in case["rounds"]]
        assert case["median_ratio"] < 0.5 if name.startswith("throughput") else case["median_ratio"] > 1.1, name
