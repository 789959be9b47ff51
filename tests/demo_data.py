"""A small data set in the files of Fashion-MNIST: random pictures with a bright bar that tells the label."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_idx(path: Path, array: NDArray[np.uint8], *, magic: bytes | None = None) -> None:
    header = magic or bytes([0, 0, 8, array.ndim])
    path.write_bytes(gzip.compress(header + np.array(array.shape, ">i4").tobytes() + array.tobytes()))


def write_fashion_mnist(folder: Path, *, train: int, test: int) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 2] = 255
        images[:, 0, 0] = 0
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
