"""The judge of pictures: a network whose features are compared, and the pictures that samples should be like.

`skipstep evaluate` knows its own small classifier of Fashion-MNIST and any feature network in an ONNX file: one input
float32 `[N, C, H, W]` in [-1, 1], an output `[N, F]` of features, and, where it names classes, another of logits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from skipstep.bench.quality.classifier import SHIPPED_CLASSIFIER, load_classifier
from skipstep.errors import InputError

_PART = 500
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Floats = NDArray[np.float32]


class Judge(Protocol):
    """`digest` identifies its weights: results of two judges are not compared."""

    digest: str

    def __call__(self, images: Floats) -> tuple[Floats, NDArray[np.int64] | None]:
        """Features `[N, F]` of images `[N, C, H, W]`, and the classes seen `[N]` where it knows classes."""
        ...


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


class OnnxJudge:
    """A feature network in an ONNX file of its own, without external data. Raises InputError for another."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        try:
            contents = path.read_bytes()
            self._session: Any = ort.InferenceSession(contents, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class below Exception.
            raise _no_judge(f"{path} ({str(error).splitlines()[0]})") from error
        self.digest = hashlib.sha256(contents).hexdigest()
        self._inputs = [each.name for each in self._session.get_inputs()]
        if len(self._inputs) != 1:
            raise _no_judge(f"{path} with the inputs {', '.join(self._inputs)}")

    def __call__(self, images: Floats) -> tuple[Floats, NDArray[np.int64] | None]:
        parts = []
        for first in range(0, len(images), _PART):
            part = images[first : first + _PART].clip(-1, 1)
            try:
                outputs = self._session.run(None, {self._inputs[0]: part})
            except Exception as error:
                raise _no_judge(f"for images {list(part.shape)}: {str(error).splitlines()[0]}") from error
            if any(output.ndim != 2 or len(output) != len(part) for output in outputs[:2]):
                raise _no_judge(f"outputs {', '.join(str(list(output.shape)) for output in outputs)}")
            parts.append(outputs[:2])
        features, *logits = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return features.astype(np.float32), logits[0].argmax(axis=1) if logits else None


def read_images(path: Path, shape: tuple[int, ...]) -> Floats:
    """Reference images `[N, *shape]` float32 in [-1, 1]: the pictures of a folder, or an array in a .npy file.

    The array is uint8 `[N, H, W, C]`, or float32 `[N, C, H, W]` in [-1, 1]. Raises InputError where they do not fit.
    """
    channels, height, width = shape
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.suffix.lower() in _SUFFIXES)
        pictures = [np.asarray(Image.open(file).convert("L" if channels == 1 else "RGB")) for file in files]
        sizes = {picture.shape[:2] for picture in pictures}
        if sizes != {(height, width)} or channels not in (1, 3):
            raise _no_images(f"{path} with {len(files)} pictures of {sorted(sizes)} pixels", shape)
        array = np.stack(pictures).reshape(len(files), height, width, channels)
    else:
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise _no_images(f"{path} ({error})", shape) from error
    if array.dtype == np.uint8 and array.shape[1:] == (height, width, channels):
        array = array.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
    if array.shape[1:] != shape or array.dtype != np.float32 or len(array) < 2 or not np.isfinite(array).all():
        raise _no_images(f"an array {list(array.shape)} of {array.dtype}", shape)
    return np.ascontiguousarray(array)


def _no_judge(got: str) -> InputError:
    return InputError(
        got=f"a feature network {got}",
        expected="ONNX without external data, float32 [N, C, H, W] to features [N, F] and perhaps logits [N, K]",
        remedy="export one with torch.onnx.export and a dynamic batch, and pass --features FILE.onnx",
    )


def _no_images(got: str, shape: tuple[int, ...]) -> InputError:
    channels, height, width = shape
    return InputError(
        got=got,
        expected=f"pictures of {width}x{height} pixels, or .npy: uint8 [N, {height}, {width}, {channels}] or finite "
        f"float32 [N, {channels}, {height}, {width}] in [-1, 1]",
        remedy="convert them first, and pass --reference FOLDER or FILE.npy",
    )
