"""The model of the server's Python backend, under the real server (make outside)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build/triton-server/bin/python"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON.exists(), reason="make outside installs the server into build/triton-server")
def test_the_real_server(tmp_path):
    """Its own assertions: images, loopback alone, refusals, metrics, a stop under load; here that it got there."""
    out = tmp_path / "triton.json"
    command = [PYTHON, ROOT / "tests/serving/triton_run.py", "--requests", "40", "--out", out]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=580)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [row[1] for row in json.loads(out.read_text())["rows"]] == ["40", "40", "40", "4"]
