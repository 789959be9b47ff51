"""The shipped models: Fashion-MNIST clothes, in every installation, and pictograms from prompts, in the repository."""

from __future__ import annotations

from pathlib import Path

from skipstep.errors import MissingDependencyError

SHIPPED_BUNDLE = Path(__file__).parent / "fashion-mnist.bundle"
# To train, to export and to measure. A wheel does not hold it.
SHIPPED_MODEL = Path(__file__).parent / "fashion-mnist"
# What `make pictograms-bundle` makes, and the guidance scale that it is tuned at. A wheel does not hold its 11 MB.
PICTOGRAMS = Path(__file__).parent / "pictograms.bundle"
PICTOGRAMS_GUIDANCE = 3.0


def checked_model(model: Path) -> Path:
    """`model`. Raises MissingDependencyError if it is a shipped one that this installation does not hold."""
    if model in (SHIPPED_MODEL, PICTOGRAMS) and not model.is_dir():
        raise MissingDependencyError(
            got=f"{model.name}, a shipped model that this installation does not hold",
            expected="a checkout of skipstep's repository that holds it, or another model",
            remedy="pass --model FOLDER, or run in such a checkout (pip install -e .)",
        )
    return model
