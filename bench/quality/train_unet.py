"""Train a pixel-space UNet on Fashion-MNIST, by one of two recipes.

    x_t = sqrt(a)·x0 + sqrt(1-a)·eps,      v = sqrt(a)·eps - sqrt(1-a)·x0

fashion-mnist   the demonstration model, with classes: loss = |net(x_t, t, label) - v|² (v-prediction: Salimans & Ho
                2022, arXiv 2202.00512, section 4). The image that v implies stays bounded at high noise, where eps
                divides the network's error by sqrt(a): a small network trained for an hour then draws clean images in
                ten steps. A tenth of the labels is replaced by the null label, so that one network serves both halves
                of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).
unconditional   as most published DDPM networks are: no classes, loss = |net(x_t, t) - eps|², the predicted image
                clipped. Fitted plans are measured on it too.

Run it with `python -m skipstep.bench.quality.train_unet --out runs/fashion`; interrupt and repeat the command to
resume. Every random number is a function of (--seed, step), so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from skipstep.bench.quality.data import CLASS_NAMES, DEFAULT_FOLDER, load_fashion_mnist
from skipstep.storage.atomic import atomic_write

NULL_LABEL = len(CLASS_NAMES)
NUM_TIMESTEPS = 1000


@dataclass(frozen=True, slots=True)
class Recipe:
    """A network of three resolutions, 28² → 14² → 7², with attention where it is cheap (7²), and what it learns."""

    channels: tuple[int, int, int]
    prediction_type: Literal["v_prediction", "epsilon"]
    has_classes: bool

    def unet(self) -> UNet2DModel:
        return UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            block_out_channels=self.channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=32,
            num_class_embeds=NULL_LABEL + 1 if self.has_classes else None,
        )

    def scheduler(self) -> DDIMScheduler:
        """What the samplers of this model should do.

        Guided samples are not clipped: where the predicted image is clipped and the noise is not derived from it again
        (DDIMScheduler's way), they fall apart as steps are added, and v-prediction keeps the image in range without it.
        """
        return DDIMScheduler(
            num_train_timesteps=NUM_TIMESTEPS,
            beta_schedule="linear",
            prediction_type=self.prediction_type,
            timestep_spacing="trailing",
            clip_sample=not self.has_classes,
            set_alpha_to_one=True,
        )


RECIPES: Final = {
    "fashion-mnist": Recipe((24, 48, 128), "v_prediction", has_classes=True),  # 2.5 M parameters.
    "unconditional": Recipe((16, 32, 64), "epsilon", has_classes=False),  # 0.7 M.
}


def learning_rate(step: int, *, num_steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def training_batch(
    images: torch.Tensor,
    labels: torch.Tensor,
    alpha_bar: torch.Tensor,
    *,
    step: int,
    batch_size: int,
    seed: int,
    label_dropout: float,
    prediction_type: str = "v_prediction",
    null_label: int = NULL_LABEL,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_t, t, label, target) of one step, where the target is v or eps.

    A pure function of (seed, step): an epoch is one permutation of the data.
    """
    steps_per_epoch = len(images) // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    index = order[position * batch_size : (position + 1) * batch_size]
    rng = torch.Generator().manual_seed(seed * 1_000_003 + 1_000_000_007 + step)
    # One timestep from each of batch_size equal strata: the same expectation as uniform draws, less variance.
    u = (torch.rand(1, generator=rng) + torch.arange(batch_size) / batch_size) % 1.0
    t = (u * len(alpha_bar)).long().clamp_max(len(alpha_bar) - 1)[torch.randperm(batch_size, generator=rng)]
    x0 = images[index]
    eps = torch.randn(x0.shape, generator=rng)
    dropped = torch.rand(batch_size, generator=rng) < label_dropout
    label = torch.where(dropped, null_label, labels[index])
    a = alpha_bar[t].view(-1, 1, 1, 1)
    target = eps if prediction_type == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x0
    return a.sqrt() * x0 + (1 - a).sqrt() * eps, t, label, target


class Checkpoint:
    """Training state in one safetensors file: weights, EMA weights, Adam moments, step. Replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, step: int, unet: nn.Module, ema: nn.Module, optimizer: torch.optim.AdamW) -> None:
        tensors: dict[str, torch.Tensor] = {}
        moments = optimizer.state_dict()["state"]
        for index, (name, parameter) in enumerate(unet.named_parameters()):
            tensors[f"model/{name}"] = parameter.detach().contiguous()
            if index in moments:
                tensors[f"exp_avg/{name}"] = moments[index]["exp_avg"].contiguous()
                tensors[f"exp_avg_sq/{name}"] = moments[index]["exp_avg_sq"].contiguous()
        for name, parameter in ema.named_parameters():
            tensors[f"ema/{name}"] = parameter.detach().contiguous()
        atomic_write(self.path, save(tensors, metadata={"step": str(step)}))

    def load(self, unet: nn.Module, ema: nn.Module, optimizer: torch.optim.AdamW) -> int:
        """Fill the three objects from the file and return the step to go on with; 0 when there is no file."""
        if not self.path.exists():
            return 0
        with safe_open(self.path, framework="pt") as stored:
            step = int(stored.metadata()["step"])
            with torch.no_grad():
                for (name, parameter), averaged in zip(unet.named_parameters(), ema.parameters(), strict=True):
                    parameter.copy_(stored.get_tensor(f"model/{name}"))
                    averaged.copy_(stored.get_tensor(f"ema/{name}"))
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": stored.get_tensor(f"exp_avg/{name}").to(parameter.device),
                        "exp_avg_sq": stored.get_tensor(f"exp_avg_sq/{name}").to(parameter.device),
                    }
        return step


def write_diffusers_folder(unet: UNet2DModel, recipe: Recipe, folder: Path) -> None:
    """Write float16 weights and both configs in diffusers' layout; `id2label` follows its DiTPipeline."""
    copy.deepcopy(unet).half().save_pretrained(folder / "unet", safe_serialization=True)
    recipe.scheduler().save_pretrained(folder / "scheduler")
    index: dict[str, object] = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    if recipe.has_classes:
        index["id2label"] = {str(i): name for i, name in enumerate(CLASS_NAMES)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class Task:
    """A network called as `network(x_t, t, label)`, what it learns from, and how its averaged weights are written."""

    network: nn.Module
    images: Tensor
    labels: Tensor
    null_label: int
    scheduler: DDIMScheduler
    write: Callable[[nn.Module, Path], None]
    bfloat16: bool = False


def fit(task: Task, options: argparse.Namespace) -> None:
    """Train, or go on from the checkpoint in `options.out`."""
    device, images = torch.device(options.device), task.images
    network = task.network.to(device)
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = Checkpoint(options.out / "checkpoint.safetensors")
    options.out.mkdir(parents=True, exist_ok=True)
    start = checkpoint.load(network, ema, optimizer)
    num_steps = int(options.epochs * (len(images) // options.batch_size))
    stop = num_steps if options.stop_after is None else min(num_steps, options.stop_after)

    network.train()
    running_loss, started = 0.0, time.monotonic()
    saved = started
    progress = tqdm(range(start, stop), initial=start, total=num_steps, unit="step", mininterval=5.0)
    for step in progress:
        x_t, t, label, target = (
            tensor.to(device)
            for tensor in training_batch(
                images,
                task.labels,
                task.scheduler.alphas_cumprod,
                step=step,
                batch_size=options.batch_size,
                seed=options.seed,
                label_dropout=options.label_dropout,
                prediction_type=task.scheduler.config.prediction_type,
                null_label=task.null_label,
            )
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps=num_steps, peak=options.lr)
        with torch.autocast(device.type, torch.bfloat16, enabled=task.bfloat16):
            predicted = network(x_t, t, label)
        loss = (predicted.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # A short memory while the weights still move fast, then a long one.
        decay = min(options.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1.0 - decay)
        running_loss = loss.item() if step == start else 0.98 * running_loss + 0.02 * loss.item()
        progress.set_postfix(loss=f"{running_loss:.4f}", refresh=False)
        late = time.monotonic() - saved > options.save_seconds
        if (step + 1) % options.save_every == 0 or step + 1 == stop or late:
            saved = time.monotonic()
            checkpoint.save(step + 1, network, ema, optimizer)
            with (options.out / "log.jsonl").open("a") as log:
                log.write(
                    json.dumps({"step": step + 1, "loss": running_loss, "seconds": time.monotonic() - started}) + "\n"
                )
        if options.keep_every and (step + 1) % options.keep_every == 0:
            task.write(ema, options.out / f"model-{step + 1:06}")
    if stop < num_steps:
        print(f"stopped at step {stop} of {num_steps}; repeat the command to go on")
        return
    task.write(ema, options.out / "model")
    print(f"wrote {options.out / 'model'}")


class _Classes(nn.Module):
    """diffusers' network as `fit` calls it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.unet, self.has_classes = recipe.unet(), recipe.has_classes

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        predicted: Tensor = self.unet(x_t, t, label if self.has_classes else None).sample
        return predicted


def train(options: argparse.Namespace) -> None:
    recipe = RECIPES[options.recipe]
    torch.manual_seed(options.seed)
    images, labels = (torch.from_numpy(array) for array in load_fashion_mnist("train", options.data))

    def write(ema: nn.Module, folder: Path) -> None:
        write_diffusers_folder(ema.get_submodule("unet"), recipe, folder)

    fit(Task(_Classes(recipe), images, labels, NULL_LABEL, recipe.scheduler(), write), options)


def add_options(parser: argparse.ArgumentParser, *, epochs: float, batch_size: int, lr: float, average: float) -> None:
    """What `fit` reads; the arguments are the defaults of a recipe."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the log and model/")
    parser.add_argument("--epochs", type=float, default=epochs)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--average", type=float, default=average, help="decay of the averaged weights")
    parser.add_argument("--label-dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--save-seconds", type=float, default=300.0, help="and on a slow machine, between them")
    parser.add_argument("--keep-every", type=int, metavar="STEPS", help="also write model-STEP/ every so many steps")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop here, to go on later (default: the end)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with the four IDX files")
    parser.add_argument("--recipe", choices=RECIPES, default="fashion-mnist")
    add_options(parser, epochs=6.0, batch_size=64, lr=1e-3, average=0.999)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
