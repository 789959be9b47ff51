"""Ray's adapter: what needs no cluster here, and one run on a real one in an environment of its own (make outside)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from skipstep.errors import DeadlineError, InputError, MissingDependencyError, NonFiniteError, QueueFullError
from skipstep.serving import ray

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build/ray/bin/python"


def test_http_says_whose_error_it_was():
    words = {"got": "a", "expected": "b", "remedy": "c"}
    found = [ray.status_of(kind(**words)) for kind in (InputError, QueueFullError, DeadlineError, NonFiniteError)]
    assert found == [400, 503, 504, 500]


def test_without_ray_its_installation_is_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for call in (lambda: ray.workers("bundle", 1), lambda: ray.deployment("bundle"), ray.connect):
        with pytest.raises(MissingDependencyError, match=r"pip install 'skipstep\[ray\]'"):
            call()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PYTHON.exists(), reason="make outside installs Ray into build/ray")
def test_a_real_cluster(tmp_path):
    """Its own assertions: equal bits, a killed worker, going on, mixed rows, Ray Serve; here that it got there."""
    out = tmp_path / "ray.json"
    command = [PYTHON, ROOT / "tests/serving/ray_run.py", "--num", "200", "--workers", "1", "2", "--out", out]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=880)
    assert ran.returncode == 0, ran.stderr[-3000:]
    finding = json.loads(out.read_text())
    assert [row[0] for row in finding["rows"]] == [
        "one process",
        "Ray, 1 workers",
        "Ray, 2 workers",
        "Ray, 2 workers, one killed",
    ]
    assert {row[-1] for row in finding["rows"]} == {"yes"}
