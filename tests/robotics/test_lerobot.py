"""LeRobot's own DiffusionPolicy, installed without its heavy extras beside our torch, and engines made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parents[1]
FOLDER = TESTS.parent / "build" / "lerobot-0.4.4"
# What its modules import on the way to this policy; nothing that brings another torch or NumPy.
PACKAGES = (
    *("lerobot==0.4.4", "torchvision", "draccus==0.10.0", "einops==0.8.2", "datasets<5", "pandas", "pyarrow"),
    *("accelerate", "av", "cachebox", "cloudpickle", "deepdiff", "dill", "Farama-Notifications", "gymnasium"),
    *("httpx", "aiohttp", "imageio", "jsonlines", "mergedeep", "multiprocess", "orderly-set", "pyserial", "pytz"),
    *("pyyaml-include", "six", "termcolor", "toml", "typing-inspect", "mypy-extensions", "python-dateutil", "xxhash"),
)
_TORCHVISION = {"2.11": "0.26.0", "2.12": "0.27.0", "2.13": "0.28.0"}


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Variables of a process that finds lerobot, the tests and skipstep. Installed once, under build/."""
    if not (FOLDER / "complete").exists():
        version = _TORCHVISION.get(".".join(torch.__version__.split(".")[:2]))
        if version is None:
            pytest.skip(f"no torchvision is known for torch {torch.__version__}")
        named = [f"torchvision=={version}" if name == "torchvision" else name for name in PACKAGES]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(FOLDER)]
        done = subprocess.run([*pip, *named], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"lerobot cannot be installed here: {done.stderr.strip()[-300:]}")
        (FOLDER / "complete").touch()
    return {**os.environ, "PYTHONPATH": f"{FOLDER}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def found(environment: dict[str, str], tmp_path_factory: Any) -> Any:
    command = [sys.executable, str(TESTS / "lerobot_checks.py"), str(tmp_path_factory.mktemp("policies"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chunks_equal_those_of_its_own_loop(found):
    assert len(found["forms"]) == 4
    for name, (difference, undecided) in found["forms"].items():
        assert difference <= 1e-5, name
        assert undecided > 0.5, f"{name}: clipping decided the values"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_actions_of_a_saved_policy_equal_its_own_with_its_processors(found):
    assert found["rollout"] <= 1e-5
