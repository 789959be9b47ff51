"""The judge of Fashion-MNIST, and the pictures that samples should be like.

For other pictures `skipstep evaluate` takes a feature network in an ONNX file (skipstep.fitting.judge).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from skipstep.bench.quality.classifier import SHIPPED_CLASSIFIER, load_classifier
from skipstep.calls.images import read_pictures
from skipstep.errors import InputError
from skipstep.fitting.judge import Floats

_PART = 500


class ShippedJudge:
    """The classifier of Fashion-MNIST that is in this repository (skipstep.bench.quality.classifier)."""

    def __init__(self) -> None:
        self._classifier = load_classifier()
        self.digest = hashlib.sha256(SHIPPED_CLASSIFIER.read_bytes()).hexdigest()

    def __call__(self, images: Floats) -> tuple[Floats, NDArray[np.int64] | None]:
        features, seen = [], []
        with torch.inference_mode():
            for part in torch.split(torch.from_numpy(images).clamp(-1, 1), _PART):
                features.append(self._classifier.features(part))
                seen.append(self._classifier.head(features[-1]).argmax(dim=1))
        return torch.cat(features).numpy(), torch.cat(seen).numpy()


def read_images(path: Path, shape: tuple[int, ...]) -> Floats:
    """Reference images `[N, *shape]` float32 in [-1, 1]: the pictures of a folder, or an array in a .npy file.

    The array is uint8 `[N, H, W, C]`, or float32 `[N, C, H, W]` in [-1, 1]. Raises InputError where they do not fit.
    """
    channels, height, width = shape
    try:
        array = read_pictures(path, shape) if path.is_dir() else np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _no_images(f"{path} ({error})", shape) from error
    if array.dtype == np.uint8 and array.shape[1:] == (height, width, channels):
        array = array.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
    if array.shape[1:] != shape or array.dtype != np.float32 or len(array) < 2 or not np.isfinite(array).all():
        raise _no_images(f"an array {list(array.shape)} of {array.dtype}", shape)
    return np.ascontiguousarray(array)


def _no_images(got: str, shape: tuple[int, ...]) -> InputError:
    channels, height, width = shape
    return InputError(
        got=got,
        expected=f"pictures of {width}x{height} pixels, or .npy: uint8 [N, {height}, {width}, {channels}] or finite "
        f"float32 [N, {channels}, {height}, {width}] in [-1, 1]",
        remedy="convert them first, and pass --reference FOLDER or FILE.npy",
    )
