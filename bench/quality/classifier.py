"""The judge of samples: a small convolutional classifier of Fashion-MNIST, and the features before its last layer.

It answers one question about a drawn picture, which class it looks like, and gives distances between sets of pictures
something to be measured in. Neither is a published metric: results that use it say so.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from skipstep.bench.quality.data import CLASS_NAMES
from skipstep.errors import InputError, ModelFormatError

SHIPPED_CLASSIFIER = Path(__file__).parent / "classifier.safetensors"
NUM_FEATURES = 128


class Classifier(nn.Module):
    """Images float32 `[N, 1, 28, 28]` in [-1, 1] to logits `[N, 10]`; 0.24 M parameters."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())

        self.body = nn.Sequential(
            block(1, 32, 1), block(32, 32, 2), block(32, 64, 1), block(64, 64, 2), block(64, 128, 1), nn.Dropout2d(0.1)
        )
        self.project = nn.Sequential(nn.Linear(128, NUM_FEATURES), nn.ReLU())
        self.head = nn.Linear(NUM_FEATURES, len(CLASS_NAMES))

    def features(self, images: Tensor) -> Tensor:
        """The activations before the last layer, `[N, NUM_FEATURES]`. Raises InputError for another image shape."""
        if images.ndim != 4 or images.shape[1:] != (1, 28, 28) or not images.is_floating_point():
            raise InputError(
                got=f"images of shape {list(images.shape)}, {images.dtype}",
                expected="floating-point [N, 1, 28, 28] in [-1, 1]",
                remedy="this classifier knows Fashion-MNIST pictures alone",
            )
        features: Tensor = self.project(self.body(images).mean(dim=(2, 3)))
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def load_classifier(path: Path = SHIPPED_CLASSIFIER) -> Classifier:
    """The trained classifier in eval mode, float32. Raises ModelFormatError for a file that is not its weights."""
    classifier = Classifier()
    try:
        classifier.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelFormatError(
            got=f"{path}, which does not load ({error})",
            expected="the weights that skipstep.bench.quality.train_classifier writes",
            remedy="train it again: python -m skipstep.bench.quality.train_classifier --out classifier.safetensors",
        ) from error
    return classifier.float().eval().requires_grad_(False)


def classify(classifier: Classifier, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """The most likely label of each image, int64 `[N]`."""
    with torch.inference_mode():
        return torch.cat([classifier(part).argmax(dim=1) for part in torch.split(images, batch_size)])
