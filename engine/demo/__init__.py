"""The shipped models: clothes of Fashion-MNIST by their class, and pictograms by their name."""

from __future__ import annotations

from pathlib import Path

from skipstep.errors import MissingDependencyError

SHIPPED_BUNDLE = Path(__file__).parent / "fashion-mnist.bundle"
# To train, to export and to measure. A wheel does not hold it.
SHIPPED_MODEL = Path(__file__).parent / "fashion-mnist"
# Tuned at this guidance scale; `make pictograms-bundle` makes it of the folder beside it. A wheel holds neither.
PICTOGRAMS = Path(__file__).parent / "pictograms.bundle"
PICTOGRAMS_GUIDANCE = 3.0
SHIPPED_BUNDLES = (SHIPPED_BUNDLE, PICTOGRAMS)


def checked_model(model: Path) -> Path:
    """`model`. Raises MissingDependencyError if it is one that this installation does not hold."""
    if model in (SHIPPED_MODEL, PICTOGRAMS) and not model.is_dir():
        raise MissingDependencyError(
            got=f"no {model.name} in this installation",
            expected="a checkout of skipstep's repository, or another model",
            remedy="pass --model FOLDER, or run in such a checkout (pip install -e .)",
        )
    return model
