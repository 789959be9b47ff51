"""The shipped model: Fashion-MNIST clothes. The bundle is in every installation, the checkpoint in the repository."""

from __future__ import annotations

from pathlib import Path

from skipstep.errors import MissingDependencyError

SHIPPED_BUNDLE = Path(__file__).parent / "fashion-mnist.bundle"
# To train, to export and to measure. A wheel does not hold it.
SHIPPED_MODEL = Path(__file__).parent / "fashion-mnist"


def checked_model(model: Path) -> Path:
    """`model`. Raises MissingDependencyError if it is the shipped checkpoint and this installation does not hold it."""
    if model == SHIPPED_MODEL and not model.is_dir():
        raise MissingDependencyError(
            got="the shipped checkpoint, which this installation does not hold",
            expected="a checkout of skipstep's repository, or another model",
            remedy="pass --model FOLDER, run in a checkout (pip install -e .), or use the shipped bundle",
        )
    return model
