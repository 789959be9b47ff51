"""How often the pictogram model draws what its prompt names: `python -m skipstep.bench.quality.evaluate_pictograms`.

A sample is right if the training picture nearest to it, by the cosine of the features of a small network, carries the
name that was asked for. That network learns here to tell the names of moved, scaled, turned, recoloured and noisy
training pictures apart; how often it is right about such pictures is in the result beside the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from skipstep import Engine
from skipstep.bench.quality.pictograms import DEFAULT_FILE, Pictograms, load_pictograms
from skipstep.bench.quality.statistics import share
from skipstep.bench.record import environment, write_json

HEADER: Final = ["training steps", "guidance scale", "own name", "95 % interval", "all three seeds", "no seed"]
NUM_FEATURES: Final = 128


class NameNetwork(nn.Module):
    """Pictures `[N, 3, 32, 32]` in [-1, 1] to logits of names."""

    def __init__(self, num_names: int) -> None:
        super().__init__()

        def block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())

        sizes = [(3, 24, 1), (24, 48, 2), (48, 96, 2), (96, 128, 2), (128, 64, 1)]
        self.features = nn.Sequential(*(block(*size) for size in sizes), nn.Flatten(), nn.Linear(1024, NUM_FEATURES))
        self.head = nn.Linear(NUM_FEATURES, num_names)

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(pictures).relu())
        return logits


def varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each moved by up to 2 pixels, scaled and turned a little, recoloured and with noise."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(pictures), *shape, generator=generator) * (high - low) + low

    angle, scale, shift = uniform(-0.12, 0.12), uniform(0.88, 1.14), uniform(-2 / 16, 2 / 16, 2)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1)
    grid = nn.functional.affine_grid(rows.view(-1, 2, 3), list(pictures.shape), align_corners=False)
    moved = nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    noise = torch.randn(pictures.shape, generator=generator) * uniform(0.0, 0.2, 1, 1, 1)
    return (moved * uniform(0.85, 1.15, 3, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1) + noise).clamp(-1, 1)


class NearestName:
    """The names of the training pictures nearest to given ones. Trained once, and kept in `path`."""

    def __init__(self, found: Pictograms, path: Path, *, steps: int = 2000, batch_size: int = 128) -> None:
        names = found.distinct()
        self._names, self._network = np.array(found.names), NameNetwork(len(names))
        self._pictures = torch.from_numpy(found.pictures).float() / 127.5 - 1.0
        if path.exists():
            self._network.load_state_dict(load_file(path))
        else:
            self._train(torch.tensor([names.index(name) for name in found.names]), steps, batch_size)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self._network.state_dict(), path)
        self._network.eval()
        self._known = self._features(self._pictures)

    def _train(self, labels: Tensor, steps: int, batch_size: int) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(self._network.parameters(), weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for _ in tqdm(range(steps), unit="step", mininterval=5.0):
            index = torch.randint(0, len(labels), (batch_size,), generator=generator)
            logits = self._network(varied(self._pictures[index], generator))
            loss: Any = nn.functional.cross_entropy(logits, labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()

    @torch.inference_mode()
    def _features(self, pictures: Tensor) -> Tensor:
        parts = [self._network.features(part) for part in torch.split(pictures, 256)]
        return nn.functional.normalize(torch.cat(parts), dim=1)

    def __call__(self, pictures: Tensor) -> Any:
        return self._names[(self._features(pictures) @ self._known.T).argmax(dim=1)]

    def control(self) -> float:
        """The share of varied training pictures, with numbers that training had not, whose own name is found."""
        generator = torch.Generator().manual_seed(1 << 20)
        return float(np.mean(self(varied(self._pictures, generator)) == self._names))


def evaluate(engine: Engine, names: Sequence[str], nearest: NearestName, steps: int, guidance: float) -> list[str]:
    """A row of the table, but for its first column."""
    right = []
    for turn in range(3):
        seeds = range(turn * len(names), (turn + 1) * len(names))
        drawn = engine.sample(prompt=names, seeds=seeds, steps=steps, guidance_scale=guidance)
        right.append(nearest(torch.from_numpy(drawn)) == names)
    found = share(np.mean(right, axis=0))
    counts = [f"{100 * each.mean():.1f} %" for each in (np.all(right, axis=0), ~np.any(right, axis=0))]
    interval = f"{100 * found.low:.1f} to {100 * found.high:.1f} %"
    return [f"{guidance:g}", f"{100 * found.value:.1f} %", interval, *counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders that train_pictograms.py wrote")
    parser.add_argument("--data", type=Path, default=DEFAULT_FILE)
    parser.add_argument("--judge", type=Path, default=Path("out/pictograms/judge.safetensors"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    found = load_pictograms(options.data)
    nearest, names, table = NearestName(found, options.judge), found.common(), []
    for folder in options.models:
        with Engine.build(str(folder), plans=[options.steps], batch_sizes=[1, 16], device="cpu") as engine:
            for guidance in options.guidance:
                row = evaluate(engine, names, nearest, options.steps, guidance)
                table.append([folder.name.partition("-")[2].lstrip("0") or "all", *row])
                print(*table[-1], sep=", ", flush=True)
    facts = environment()
    contents = {
        "command": f"python -m skipstep.bench.quality.evaluate_pictograms {' '.join(map(str, options.models))} "
        f"--steps {options.steps} --guidance {' '.join(map(str, options.guidance))} --out {options.out.name}",
        "commit": facts["commit"],
        "environment": facts,
        "header": HEADER,
        "rows": table,
        "note": f"{len(names)} names, three seeds each, {options.steps} steps. Own name: the nearest training picture, "
        f"of {len(found.names)}, carries the prompt's name, of {len(found.distinct())}. Of training pictures varied as "
        f"the judge learnt them, {100 * nearest.control():.1f} % have their own name nearest.",
        "names": names,
    }
    write_json(options.out, contents)


if __name__ == "__main__":
    main()
