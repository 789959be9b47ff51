"""onnxruntime-web as the demo pins it, and the demo's folder; both once a run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from skipstep import Engine
from skipstep.demo.browser import WEB, write_site

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def packages():
    if shutil.which("npm") is None:
        pytest.skip("npm, which brings onnxruntime-web, is not installed")
    subprocess.run(["make", "--silent", "build/demo/node_modules"], cwd=ROOT, check=True, timeout=280)
    return ROOT / "build" / "demo" / "node_modules"


@pytest.fixture(scope="session")
def prompted(tmp_path_factory):
    """A bundle as the pictograms' is, of a small network with random weights."""
    pytest.importorskip("transformers")
    from skipstep.bench.quality.train_pictograms import make_task

    folder = tmp_path_factory.mktemp("prompted")
    names = ["red apple", "blue heart", "naïve café", "crescent moon", "猫", "the cat and the dog"]
    pictures = np.random.default_rng(0).integers(0, 256, (len(names), 3, 32, 32), np.uint8)
    np.savez(folder / "data.npz", pictures=pictures, names=names, categories=["Objects"] * len(names))
    task = make_task(folder / "data.npz", widths=(8, 16))
    task.write(task.network, folder / "model")
    with Engine.build(str(folder / "model"), plans=[2, 10], device="cpu", backend="onnxruntime") as engine:
        engine.save(folder / "tiny.bundle", license="Apache-2.0", notice=folder / "model" / "model_index.json")
    return folder / "tiny.bundle"


@pytest.fixture(scope="session")
def site(packages, prompted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_site(folder, packages, prompted=prompted)
    assert {each.name for each in WEB.iterdir() if each.suffix != ".json" and each.suffix != ".md"} < {
        each.name for each in folder.iterdir()
    }
    return folder
