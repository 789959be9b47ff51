"""onnxruntime-web as the demo pins it, and the demo's folder; both once a run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from skipstep.demo.browser import WEB, write_site

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def packages():
    if shutil.which("npm") is None:
        pytest.skip("npm, which brings onnxruntime-web, is not installed")
    subprocess.run(["make", "--silent", "build/demo/node_modules"], cwd=ROOT, check=True, timeout=280)
    return ROOT / "build" / "demo" / "node_modules"


@pytest.fixture(scope="session")
def site(packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_site(folder, packages)
    assert {each.name for each in WEB.iterdir() if each.suffix != ".json" and each.suffix != ".md"} < {
        each.name for each in folder.iterdir()
    }
    return folder
