"""Install what a machine without a registry lacks: `python bench/gpu/wheels.py .gpu-wheels build/gpu-deps`.

Only distributions that the machine has in no version are taken, so nothing that is there is shadowed: not torch, and
not what torch works with. Runs before skipstep is installed, and needs nothing but pip.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def lacking(wheels: Sequence[Path]) -> list[Path]:
    """Those wheels whose distribution is not installed. A wheel's file name begins with its name, by its standard."""
    installed = {_normal(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    return [wheel for wheel in wheels if _normal(wheel.name.split("-", 1)[0]) not in installed]


def install(folder: Path, target: Path) -> list[Path]:
    """Install what is lacking of the wheels in `folder`, without their dependencies, and return it."""
    needed = lacking(sorted(folder.glob("*.whl")))
    if needed:
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *options, "--upgrade", "--target", str(target)]
        subprocess.run([*command, *map(str, needed)], check=True)
    return needed


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    folder, target = map(Path, sys.argv[1:])
    names = [wheel.name for wheel in install(folder, target)]
    print(f"installed from {folder}: {', '.join(names) or 'nothing, all is there'}")


if __name__ == "__main__":
    main()
