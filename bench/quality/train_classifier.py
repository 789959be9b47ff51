"""Train the classifier of samples: `python -m skipstep.bench.quality.train_classifier --out classifier.safetensors`.

Cross-entropy on the training split, shifted by up to two pixels, with a one-cycle learning rate (Smith & Topin 2017,
arXiv 1708.07120). Deterministic for a seed; a few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from skipstep.bench.quality.classifier import Classifier, classify
from skipstep.bench.quality.data import DEFAULT_FOLDER, load_fashion_mnist
from skipstep.storage.atomic import atomic_write


def load_split(split: str, folder: Path) -> tuple[Tensor, Tensor]:
    images, labels = load_fashion_mnist("train" if split == "train" else "test", folder)
    return torch.from_numpy(images), torch.from_numpy(labels)


def shifted(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Each image moved by up to `pixels` in both directions, black beyond the border."""
    padded = nn.functional.pad(images, [pixels] * 4, value=-1.0)
    offsets = torch.randint(0, 2 * pixels + 1, (len(images), 2), generator=generator)
    rows = offsets[:, 0, None] + torch.arange(28)
    columns = offsets[:, 1, None] + torch.arange(28)
    index = torch.arange(len(images))
    return padded[index[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    classifier.eval()
    return (classify(classifier, images) == labels).float().mean().item()


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    images, labels = load_split("train", options.data)
    test_images, test_labels = load_split("test", options.data)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.02)
    steps_per_epoch = len(images) // options.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, total_steps=options.epochs * steps_per_epoch
    )
    with tqdm(total=options.epochs * steps_per_epoch, unit="step", mininterval=2.0) as progress:
        for epoch in range(options.epochs):
            classifier.train()
            order = torch.randperm(len(images), generator=generator)
            for index in torch.split(order, options.batch_size)[:steps_per_epoch]:
                logits = classifier(shifted(images[index], generator))
                loss = nn.functional.cross_entropy(logits, labels[index])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress.update()
            reached = accuracy(classifier, test_images, test_labels)
            progress.write(f"epoch {epoch + 1}: test accuracy {reached:.4f}")
    halved = Classifier()
    halved.load_state_dict(classifier.state_dict())
    stored = halved.half().state_dict()
    # What is claimed is what the file holds: the float16 weights, measured again.
    reached = accuracy(halved.float(), test_images, test_labels)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"test_accuracy": f"{reached:.4f}", "epochs": str(options.epochs), "seed": str(options.seed)}
    atomic_write(options.out, save({name: tensor.contiguous() for name, tensor in stored.items()}, metadata=facts))
    print(f"wrote {options.out}: test accuracy {reached:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with the four IDX files")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
