"""The shipped model of Fashion-MNIST clothes, and where one of pictograms from prompts goes once it is trained."""

from __future__ import annotations

from pathlib import Path

from skipstep.errors import MissingDependencyError

SHIPPED_BUNDLE = Path(__file__).parent / "fashion-mnist.bundle"
# To train, to export and to measure. A wheel does not hold it.
SHIPPED_MODEL = Path(__file__).parent / "fashion-mnist"
# Not shipped yet: `make pictograms` and `make pictograms-bundle` make it, tuned at this guidance scale.
PICTOGRAMS = Path(__file__).parent / "pictograms.bundle"
PICTOGRAMS_GUIDANCE = 3.0


def checked_model(model: Path) -> Path:
    """`model`. Raises MissingDependencyError if it is one of the two above that this installation does not hold."""
    if model in (SHIPPED_MODEL, PICTOGRAMS) and not model.is_dir():
        made = "one in which make pictograms and make pictograms-bundle have run" if model == PICTOGRAMS else "as it is"
        raise MissingDependencyError(
            got=f"no {model.name} in this installation",
            expected=f"a checkout of skipstep's repository, {made}, or another model",
            remedy="pass --model FOLDER, or run in such a checkout (pip install -e .)",
        )
    return model
