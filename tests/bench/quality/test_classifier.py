from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from demo_data import write_fashion_mnist
from safetensors import safe_open
from safetensors.torch import save_file

from skipstep.bench.quality.classifier import SHIPPED_CLASSIFIER, Classifier, classify, load_classifier
from skipstep.bench.quality.data import DEFAULT_FOLDER, load_fashion_mnist
from skipstep.bench.quality.train_classifier import shifted
from skipstep.errors import InputError, ModelFormatError


def test_the_shipped_classifier_is_good_enough_to_judge():
    with safe_open(SHIPPED_CLASSIFIER, framework="np") as stored:
        assert float(stored.metadata()["test_accuracy"]) >= 0.91


@pytest.mark.skipif(not DEFAULT_FOLDER.exists(), reason="the package dataset-fashion-mnist is not installed")
def test_its_accuracy_is_what_its_file_claims():
    images, labels = load_fashion_mnist("test")
    seen = classify(load_classifier(), torch.from_numpy(images))
    with safe_open(SHIPPED_CLASSIFIER, framework="np") as stored:
        claimed = float(stored.metadata()["test_accuracy"])
    assert np.mean(seen.numpy() == labels) == pytest.approx(claimed, abs=5e-4)


def test_a_picture_is_judged_alone_as_in_a_batch():
    classifier = load_classifier()
    images = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = classifier.features(images)
    torch.testing.assert_close(together[3:4], classifier.features(images[3:4]), rtol=1e-4, atol=1e-5)
    assert torch.equal(classify(classifier, images, batch_size=2), classify(classifier, images))


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (1, 1, 32, 32), (28, 28)])
def test_other_images_are_refused(shape):
    with pytest.raises(InputError, match=r"\[N, 1, 28, 28\]"):
        Classifier()(torch.zeros(shape))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "classifier.safetensors"
    for write in (
        lambda: None,
        lambda: path.write_bytes(b"junk"),
        lambda: save_file({"other": torch.zeros(1)}, path),
    ):
        write()
        with pytest.raises(ModelFormatError, match="train_classifier"):
            load_classifier(path)


def test_shifts_move_whole_pixels_and_keep_them_all():
    image = torch.full((200, 1, 28, 28), -1.0)
    image[:, 0, 10, 12] = 1.0
    moved = shifted(image, torch.Generator().manual_seed(0))
    places = {tuple(place) for place in (moved[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in range(8, 13) for column in range(10, 15)}
    assert (moved == 1).sum() == 200


@pytest.mark.slow
def test_the_training_script_writes_what_the_loader_reads(tmp_path):
    write_fashion_mnist(tmp_path / "data", train=256, test=64)
    out = tmp_path / "classifier.safetensors"
    data = tmp_path / "data"
    command = [sys.executable, "-m", "skipstep.bench.quality.train_classifier", "--out", out, "--data", data]
    subprocess.run([*command, "--epochs", "1", "--batch-size", "64"], check=True, capture_output=True, timeout=120)
    assert classify(load_classifier(out), torch.zeros(2, 1, 28, 28)).shape == (2,)
