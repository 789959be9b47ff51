"""The shipped model: Fashion-MNIST clothes, as a checkpoint to compile and as a bundle to run."""

from __future__ import annotations

from pathlib import Path

SHIPPED_MODEL = Path(__file__).parent / "fashion-mnist"
SHIPPED_BUNDLE = Path(__file__).parent / "fashion-mnist.bundle"
