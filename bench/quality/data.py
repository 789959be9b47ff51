"""Fashion-MNIST in its IDX files (Xiao et al. 2017, arXiv 1708.07747): 60 000 + 10 000 grey 28x28 images, ten classes.

The data set is installed, not shipped: Debian and Ubuntu carry it as the package `dataset-fashion-mnist`.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import MissingDependencyError, ModelFormatError

CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_PREFIX = {"train": "train", "test": "t10k"}


def load_fashion_mnist(
    split: Literal["train", "test"], folder: Path = DEFAULT_FOLDER
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return one split: images `[N, 1, 28, 28]` float32 in [-1, 1], and labels `[N]` int64 in [0, 9].

    Raises MissingDependencyError when the files are not installed and ModelFormatError when one is not IDX.
    """
    prefix = _PREFIX[split]
    pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    return (pixels.astype(np.float32) / 127.5 - 1.0)[:, None], labels.astype(np.int64)


def _read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """IDX: two zero bytes, a type byte (8 = unsigned byte), the rank, then one big-endian int32 per dimension."""
    if not path.exists():
        raise MissingDependencyError(
            got=f"no file {path}",
            expected="the Fashion-MNIST IDX files",
            remedy="run `make data` and name the folder with --data, or `apt-get install dataset-fashion-mnist`",
        )
    expected = f"IDX: the header 000008{dimensions:02x} (unsigned bytes, rank {dimensions}), sizes, and as many pixels"
    remedy = "install the package dataset-fashion-mnist again"
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ModelFormatError(got=f"{path}, not a whole gzip file", expected=expected, remedy=remedy) from error
    if raw[:4] != bytes([0, 0, 8, dimensions]):
        raise ModelFormatError(got=f"the header {raw[:4].hex()} in {path}", expected=expected, remedy=remedy)
    shape = np.frombuffer(raw, ">i4", count=dimensions, offset=4).tolist()
    start = 4 + 4 * dimensions
    if len(raw) - start != math.prod(shape):
        raise ModelFormatError(got=f"{len(raw) - start} pixels for {shape} in {path}", expected=expected, remedy=remedy)
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
