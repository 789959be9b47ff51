"""The C++ example: compiled against the CUDA toolkit's headers, and run on a stand-in for TensorRT in host memory."""

from __future__ import annotations

import shutil
import subprocess
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from engines import SCHEDULE, build
from tiny_networks import Labelled

from skipstep import Plan

LOOP = Path(__file__).parents[2] / "export" / "examples" / "loop.cpp"
STUB = Path(__file__).parents[1] / "tensorrt_stub"
COMPILER = shutil.which("c++")
PLANS = [
    Plan(schedule=SCHEDULE, steps=5),
    Plan(schedule=SCHEDULE, steps=4, eta=1.0),
    Plan(schedule=SCHEDULE, steps=3, solver="rk4"),
    Plan(schedule=SCHEDULE, steps=6, solver="unipc_3"),
]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="apt-get install g++")


def compile_loop(*options: object) -> None:
    command = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", *map(str, options), str(LOOP)]
    subprocess.run(command, check=True, timeout=120)


def include_with(header: str, *folders: Path) -> Path:
    for folder in folders:
        if (folder / header).exists():
            return folder
    pytest.skip(f"no {header} on this machine")


def cuda_include() -> Path:
    triton = util.find_spec("triton")
    places = [Path(triton.origin).parent / "backends/nvidia/include"] if triton and triton.origin else []
    return include_with("cuda_runtime_api.h", Path("/usr/local/cuda/include"), *places)


def test_it_fits_cudas_headers(tmp_path):
    (tmp_path / "NvInfer.h").write_text((STUB / "NvInfer.h").read_text())
    # The toolkit's own headers are not ours to warn of.
    compile_loop("-fsyntax-only", "-isystem", cuda_include(), f"-I{tmp_path}")


def test_it_fits_tensorrts_headers():
    places = (
        "/usr/include/x86_64-linux-gnu",
        "/usr/include/aarch64-linux-gnu",
        "/usr/include",
        "/opt/tensorrt/include",
    )
    tensorrt = include_with("NvInfer.h", *map(Path, places))
    compile_loop("-fsyntax-only", "-isystem", cuda_include(), "-isystem", tensorrt)


@pytest.fixture(scope="module")
def engine():
    return build(
        Labelled(),
        plans=PLANS,
        batch_sizes=[2],
        sample_shape=(1, 4, 4),
        num_classes=4,
        null_label=1,
        fractional_timesteps=True,
    )


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory):
    made = tmp_path_factory.mktemp("cpp")
    engine.save(made / "bundle", license="MIT", targets=["trtexec"])
    found = made / "bundle" / "trtexec"
    compile_loop("-O2", f"-I{STUB}", "-o", found / "loop")
    (name,) = {path.stem for path in found.glob("plan_*/inputs/*.npy")}
    for size in (2, 4):
        (found / f"{size}.engine").write_text(f"{size} 1 4 4 {name}")
    return found


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.options()["solver"])
@pytest.mark.parametrize("guidance", [None, 2.5])
def test_it_draws_the_engines_samples(engine, folder, plan, guidance):
    words = ["./loop", f"{2 if guidance is None else 4}.engine", f"plan_{plan.steps}-{plan.key}", "3"]
    words += [] if guidance is None else [str(guidance)]
    run = subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=60)
    expected = engine.sample(plan=plan, seeds=[0, 0], class_labels=3, guidance_scale=guidance)
    found = np.frombuffer(run.stdout, np.float32).reshape(expected.shape)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_it_says_what_is_missing(folder):
    for words, said in (([], "arguments: ENGINE"), (["2.engine", "plan_9", "0"], "plan_9/coefficients.npy")):
        run = subprocess.run(["./loop", *words], cwd=folder, capture_output=True, timeout=60, check=False)
        assert run.returncode == 1
        assert said in run.stderr.decode()
