from __future__ import annotations

import gzip

import numpy as np
import pytest
from demo_data import write_fashion_mnist, write_idx

from skipstep.bench.quality.data import load_fashion_mnist
from skipstep.errors import MissingDependencyError, ModelFormatError


@pytest.fixture
def folder(tmp_path):
    write_fashion_mnist(tmp_path, train=12, test=5)
    return tmp_path


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("test", 5)])
def test_reads_pixels_in_the_range_of_the_network(folder, split, count):
    images, labels = load_fashion_mnist(split, folder)
    assert (images.shape, images.dtype) == ((count, 1, 28, 28), np.float32)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)
    assert (images.min(), images.max()) == (-1.0, 1.0)


def test_rows_are_rows(tmp_path):
    array = np.zeros((1, 28, 28), np.uint8)
    array[0, 2, 5] = 255
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", array)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(1, np.uint8))
    images, _ = load_fashion_mnist("train", tmp_path)
    assert np.argwhere(images == 1).tolist() == [[0, 0, 2, 5]]


def test_missing_files_name_the_package(tmp_path):
    with pytest.raises(MissingDependencyError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist("train", tmp_path)


def test_another_format_is_refused(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    write_idx(path, np.zeros((2, 28, 28), np.uint8), magic=b"\0\0\x0d\3")
    with pytest.raises(ModelFormatError, match="00000d03"):
        load_fashion_mnist("train", folder)
    path.write_bytes(b"not gzip")
    with pytest.raises(ModelFormatError, match="train-images"):
        load_fashion_mnist("train", folder)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + np.array([9, 28, 28], ">i4").tobytes() + bytes(100)))
    with pytest.raises(ModelFormatError, match="train-images"):
        load_fashion_mnist("train", folder)
