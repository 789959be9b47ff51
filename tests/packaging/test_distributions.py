"""Four folders, one import root: in the wheel, in the source distribution, and in an editable install."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_IN_THE_WHEEL = (
    *("bench/suite/", "bench/results/", "bench/ci/", "bench/quality/"),
    *("engine/demo/fashion-mnist/", "engine/demo/pictograms"),
)
FOLDERS = {"engine": "skipstep", "kernels": "skipstep/kernels", "export": "skipstep/export", "bench": "skipstep/bench"}


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution of the tracked files, and the wheel built from that source distribution."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked_files():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_top_level_of_the_repository():
    top = {name.split("/")[0] for name in tracked_files()}
    assert {
        "engine",
        "kernels",
        "export",
        "bench",
        "tests",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
    } <= top
    assert top <= {
        *("engine", "kernels", "export", "bench", "tests"),
        *("pyproject.toml", "README.md", "LICENSE", "Makefile", ".ci", ".gitignore"),
    }


def test_no_large_file_is_tracked():
    assert max((ROOT / name).stat().st_size for name in tracked_files()) < 10 * 2**20


def test_wheel_holds_one_package_and_all_of_it(distributions):
    wheel, _ = distributions
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"skipstep"}
    for tracked in tracked_files():
        folder, _, rest = tracked.partition("/")
        if folder in FOLDERS and Path(tracked).name != "README.md" and not tracked.startswith(NOT_IN_THE_WHEEL):
            assert f"{FOLDERS[folder]}/{rest}" in names
    assert "skipstep/py.typed" in names
    assert {"skipstep/bench/page/report.html.j2", "skipstep/bench/page/style.css"} <= names
    assert [name for name in names if "test_" in name or "/tests/" in name] == ["skipstep/bench/test_sampling.py"]


def test_wheel_holds_the_demo_once_and_nothing_of_its_training(distributions):
    wheel, _ = distributions
    assert wheel.stat().st_size < 6e6
    names = zipfile.ZipFile(wheel).namelist()
    assert "skipstep/demo/fashion-mnist.bundle/manifest.json" in names
    assert not [name for name in names if "quality" in name or name.startswith("skipstep/demo/fashion-mnist/")]


def test_source_distribution_holds_what_a_build_needs(distributions):
    _, sdist = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "engine/plans/plan.py", "kernels/step_kernel.py"} <= names
    assert "engine/demo/fashion-mnist.bundle/manifest.json" in names
    assert "engine/demo/fashion-mnist/unet/diffusion_pytorch_model.safetensors" not in names


def test_a_wheel_says_what_is_only_in_the_repository(distributions, tmp_path):
    """Dependencies are those of this environment; the package itself is the wheel's."""
    wheel, _ = distributions
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import skipstep.demo as demo; from skipstep.commands.main import main;"
        "assert demo.__file__.startswith(TARGET), demo.__file__; assert demo.SHIPPED_BUNDLE.is_dir();"
        "print(main(['evaluate']), main(['export', '--license', 'x', '--out', 'b']))"
    ).replace("TARGET", repr(str(tmp_path)))
    # Without `site`, an editable installation's import hook does not run.
    packages = Path(importlib.import_module("numpy").__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(packages)])}
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "2 2\n"), result.stderr
    evaluated, exported = [line for line in result.stderr.splitlines() if "MissingDependencyError" in line]
    assert "skipstep's repository and not in its wheel" in evaluated
    assert "no fashion-mnist in this installation" in exported


def test_installed_wheel_shadows_no_other_package(distributions, tmp_path):
    """Beside Hugging Face's package of the name `kernels`, both are importable and each is itself."""
    wheel, _ = distributions
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    constraints = ROOT / ".ci" / "constraints.txt"
    subprocess.run([*install, str(wheel), "kernels", "--constraint", str(constraints)], check=True)
    code = (
        "import importlib.util as u, skipstep.kernels.layout as ours;"
        "print(u.find_spec('kernels').origin); print(ours.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    theirs, ours = (Path(line) for line in result.stdout.split())
    assert theirs.parent == tmp_path / "kernels"
    assert ours == tmp_path / "skipstep" / "kernels" / "layout.py"
    assert not (tmp_path / "engine").exists()


def test_editable_install_maps_the_folders():
    skipstep = importlib.import_module("skipstep")
    if not Path(skipstep.__file__).is_relative_to(ROOT):
        pytest.skip("skipstep is not installed in editable mode here")
    for folder, package in FOLDERS.items():
        module = importlib.import_module(package.replace("/", "."))
        assert Path(module.__file__) == ROOT / folder / "__init__.py"
