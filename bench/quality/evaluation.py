"""What `skipstep evaluate` measures: how samplers differ in quality, spread, invertibility and time, on one model.

    quality       proxy Fréchet distance and classifier agreement, over step counts and eta, spacings, and solvers at
                  equal network evaluations
    spread        how far runs from one initial noise come apart, by eta, beside Gaussian data's closed form
    inversion     what is lost from image to noise and back
    ancestral     1000-step DDPM beside DDIM

The proxy Fréchet distance is that of Gaussians fitted to the features of our own small classifier, and is not
comparable with any published FID; it is biased upward at few samples, which is why the distance of as many training
images stands beside it. Samples are judged in chunks of seeds, and every chunk is kept in `cache/`, as the other parts
are: a stopped evaluation goes on where it was, and a larger one builds on a smaller.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from skipstep import Engine, Plan
from skipstep.bench.quality.classifier import NUM_FEATURES, load_classifier
from skipstep.bench.quality.data import CLASS_NAMES, DEFAULT_FOLDER, load_fashion_mnist
from skipstep.bench.record import write_json
from skipstep.errors import InputError, MissingDependencyError, PlanError
from skipstep.networks.checkpoint import read_checkpoint
from skipstep.plans.solvers import SOLVERS, SolverOptions
from skipstep.storage.atomic import atomic_write

CHUNK = 32
# CIFAR-10, FID, S = 10, 20, 50, 100, 1000 (Song, Meng, Ermon 2021, table 1) and reconstruction MSE (table 2): theirs.
PAPER_STEPS = (10, 20, 50, 100, 1000)
PAPER_FID: Mapping[float | str, tuple[float, ...]] = {
    0.0: (13.36, 6.84, 4.67, 4.16, 4.04),
    0.2: (14.04, 7.11, 4.77, 4.25, 4.09),
    0.5: (16.66, 8.35, 5.25, 4.46, 4.29),
    1.0: (41.07, 18.36, 8.01, 5.78, 4.73),
    "sigma-hat": (367.43, 133.37, 32.72, 9.99, 3.17),
}
PAPER_RECONSTRUCTION = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured: the cases of each table. "sigma-hat" is DDPM with the larger of its two fixed variances."""

    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 200, 1000)
    etas: tuple[float | str, ...] = (0.0, 0.2, 0.5, 1.0, "sigma-hat")
    evaluations: tuple[int, ...] = (10, 20, 40)
    spread_etas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    spread_steps: int = 50
    inversion_steps: tuple[int, ...] = (10, 20, 50, 100, 200)
    refinements: int = 3
    ancestral_steps: int = 1000
    compared_steps: tuple[int, ...] = (10, 50, 100)
    strip_steps: tuple[int, ...] = (2, 3, 5, 10, 20, 50, 100)
    picture_steps: int = 50


@dataclass(frozen=True, slots=True)
class SampleFeatures:
    """N samples in the classifier's features: `features` float32 `[N, 128]`, `right` bool `[N]`, seconds in all."""

    features: NDArray[np.float32]
    right: NDArray[np.bool_]
    seconds: float

    @property
    def agreement(self) -> float:
        return float(self.right.mean())


class Evaluation:
    """One model on one engine. `num_samples` is per case of the quality tables; the other parts scale with it."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        num_samples: int,
        backend: str = "auto",
        data: Path = DEFAULT_FOLDER,
        grid: Grid | None = None,
    ) -> None:
        if num_samples < 2:
            raise InputError(got=f"--num {num_samples}", expected="at least 2 samples", remedy="pass --num 64")
        checkpoint = read_checkpoint(model)
        if checkpoint.scheduler is None or checkpoint.num_classes != len(CLASS_NAMES):
            raise InputError(
                got=f"{model} with {checkpoint.num_classes} classes",
                expected=f"a class-conditional model of Fashion-MNIST's {len(CLASS_NAMES)} classes with its scheduler",
                remedy="evaluate the shipped model, or one of your own from skipstep.bench.quality.train_unet",
            )
        self.num_samples = num_samples
        self.grid = grid or Grid()
        self._options = checkpoint.scheduler.plan_options()
        self._classifier = load_classifier()
        self._test = load_fashion_mnist("test", data)
        self._train = load_fashion_mnist("train", data)
        # The parts run a whole, a half and a quarter of the samples.
        sizes = {max(1, min(num_samples, CHUNK) // share) for share in (1, 2, 4)}
        self.engine = Engine.build(model, plans=[], batch_sizes=sizes, backend=backend, compile_on_miss=True)
        # Of this very model: results of another model must not be used.
        self._cache = folder / "cache" / checkpoint.digest()[:16]
        self._reference = self._features(self._test[0])[0]

    def test_images(self, label: int, count: int) -> NDArray[np.float32]:
        """The first `count` images of a class in the test split."""
        chosen: NDArray[np.float32] = self._test[0][self._test[1] == label][:count]
        return chosen

    def plan(self, **options: Any) -> Plan:
        return Plan(**{**self._options, **options})

    def quality_by_steps_and_eta(self) -> list[Row]:
        cases = []
        for steps in self.grid.steps:
            for eta in self.grid.etas:
                plan = (
                    self.plan(steps=steps, solver="ddpm", variance="fixed_large")
                    if eta == "sigma-hat"
                    else self.plan(steps=steps, eta=eta)
                )
                cases.append(({"steps": steps, "eta": eta}, plan))
        return self._quality(cases, "steps and eta")

    def quality_by_spacing(self) -> list[Row]:
        cases = []
        for spacing in ("trailing", "quadratic", "paper_quadratic"):
            for steps in self.grid.steps:
                try:
                    plan = self.plan(steps=steps, spacing=spacing)
                except PlanError:  # So many distinct indices do not exist; the table leaves the place empty.
                    continue
                cases.append(({"spacing": spacing, "steps": steps}, plan))
        return self._quality(cases, "spacings")

    def quality_by_solver(self) -> list[Row]:
        cases = []
        for solver in ("ddim", "dpm_solver_pp_2m", "heun", "dpm_solver_2", "rk4"):
            for budget in self.grid.evaluations:
                plan = self.plan(steps=_steps_within(budget, solver), solver=solver)
                cases.append(({"solver": solver, "budget": budget, "evaluations": plan.num_evaluations}, plan))
        return self._quality(cases, "solvers")

    def ends_of_the_scale(self) -> list[Row]:
        """As many training images (the floor), of the same classes, and pure noise."""
        wanted = np.arange(self.num_samples) % len(CLASS_NAMES)
        places = [np.flatnonzero(self._train[1] == label) for label in range(len(CLASS_NAMES))]
        images = self._train[0][[places[label][i // len(CLASS_NAMES)] for i, label in enumerate(wanted)]]
        noise = np.random.default_rng(0).standard_normal(images.shape).astype(np.float32).clip(-1, 1)
        rows = []
        for name, pictures in (("training images", images), ("pure noise", noise)):
            features, seen = self._features(pictures)
            agreement = float(np.mean(seen == wanted))
            rows.append({"what": name, "proxy_frechet": self._frechet(features), "agreement": agreement})
        return rows

    def spread(self) -> list[Row]:
        return self._kept("spread", self._spread)

    def inversion(self) -> list[Row]:
        return self._kept("inversion", self._inversion)

    def ancestral(self) -> list[Row]:
        return self._kept("ancestral", self._ancestral)

    def _spread(self) -> list[Row]:
        """Variance between runs from one x_T, per pixel; beside it the same for Gaussian data, exactly."""
        runs = max(2, self.num_samples // 2)
        x_T = np.repeat(np.random.default_rng(0).standard_normal((1, 1, 28, 28)).astype(np.float32), runs, axis=0)
        rows: list[Row] = []
        for eta in tqdm(self.grid.spread_etas, desc="spread", unit="eta"):
            plan = self.plan(steps=self.grid.spread_steps, eta=eta)
            drawn = self.engine.sample(plan=plan, x_T=x_T, seeds=range(runs), class_labels=8)
            variance = float(drawn.var(axis=0, ddof=1).mean())
            exact = gaussian_spread(plan, eta)
            rows.append({"eta": eta, "runs": runs, "variance": variance, "gaussian_data_exact": exact})
        return rows

    def _inversion(self) -> list[Row]:
        """Mean squared error of reconstructed test images, pixels in [0, 1]."""
        count = max(2, self.num_samples // 2)
        images, labels = self._test[0][:count], self._test[1][:count]
        rows = []
        for steps in tqdm(self.grid.inversion_steps, desc="inversion", unit="plan"):
            row: Row = {"steps": steps, "images": count}
            plan = self.plan(steps=steps)
            for name, refinements in (("plain", 0), ("refined", self.grid.refinements)):
                again = self.engine.reconstruct(
                    images, plan=plan, class_labels=labels.tolist(), refinements=refinements
                )
                row[name] = float(np.mean(((again - images) / 2) ** 2))
            row["paper_cifar10"] = PAPER_RECONSTRUCTION.get(steps)
            rows.append(row)
        return rows

    def _ancestral(self) -> list[Row]:
        """DDPM beside DDIM: time, network evaluations, the difference of two runs from one x_T, quality."""
        count = max(2, self.num_samples // 4)
        x_T = np.random.default_rng(1).standard_normal((count, 1, 28, 28)).astype(np.float32)
        labels = [i % len(CLASS_NAMES) for i in range(count)]
        most = self.grid.ancestral_steps
        plans = {f"DDPM, {most} steps": self.plan(steps=most, solver="ddpm")}
        plans |= {f"DDIM, {steps} steps": self.plan(steps=steps) for steps in self.grid.compared_steps}
        rows = []
        for name, plan in tqdm(plans.items(), desc="DDPM and DDIM", unit="plan"):
            self.engine.add_plan(plan)
            started = time.perf_counter()
            runs = [
                self.engine.sample(plan=plan, x_T=x_T, class_labels=labels, seeds=range(first, first + count))
                for first in (0, count)
            ]
            seconds = (time.perf_counter() - started) / 2
            judged = self._judge(plan)
            rows.append(
                {
                    "sampler": name,
                    "evaluations": plan.num_evaluations,
                    "ms_per_image": seconds / count * 1e3,
                    "mse_between_two_runs": float(np.mean((runs[0] - runs[1]) ** 2) / 4),
                    "proxy_frechet": self._frechet(judged.features),
                    "agreement": judged.agreement,
                }
            )
        return rows

    def _kept(self, part: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """The rows of a part as they were measured before with as many samples, or now."""
        path = self._cache / f"{part}-{self.num_samples}.json"
        if not path.exists():
            write_json(path, {"rows": measure()})
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return rows

    def _quality(self, cases: Sequence[tuple[Row, Plan]], what: str) -> list[Row]:
        total = sum(plan.num_evaluations for _, plan in cases) * self.num_samples
        rows = []
        with tqdm(total=total, desc=what, unit="eval", unit_scale=True, disable=None) as progress:
            for case, plan in cases:
                judged = self._judge(plan, progress)
                quality = {"proxy_frechet": self._frechet(judged.features), "agreement": judged.agreement}
                rows.append({**case, "samples": len(judged.right), **quality, "plan_key": plan.key})
        return rows

    def _judge(self, plan: Plan, progress: Any = None) -> SampleFeatures:
        """Samples of seeds 0 … N-1, class i mod 10, without guidance; chunks that were judged before are read."""
        self.engine.add_plan(plan)
        parts = []
        for first, size in self._chunks():
            path = self._cache / plan.key / f"{first}-{size}.npz"
            if not path.exists():
                started = time.perf_counter()
                labels = np.arange(first, first + size) % len(CLASS_NAMES)
                images = self.engine.sample(plan=plan, seeds=range(first, first + size), class_labels=labels.tolist())
                seconds = time.perf_counter() - started
                features, seen = self._features(images)
                _save(path, features=features, right=seen == labels, seconds=seconds)
            with np.load(path, allow_pickle=False) as stored:
                parts.append(SampleFeatures(stored["features"], stored["right"], float(stored["seconds"])))
            if progress is not None:
                progress.update(size * plan.num_evaluations)
        return SampleFeatures(
            np.concatenate([part.features for part in parts]),
            np.concatenate([part.right for part in parts]),
            sum(part.seconds for part in parts),
        )

    def _chunks(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.num_samples, CHUNK):
            yield first, min(CHUNK, self.num_samples - first)

    def _features(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features `[N, 128]` and the labels seen `[N]`."""
        features, seen = [], []
        with torch.inference_mode():
            for part in torch.split(torch.from_numpy(images).clamp(-1, 1), 500):
                features.append(self._classifier.features(part))
                seen.append(self._classifier.head(features[-1]).argmax(dim=1))
        return torch.cat(features).numpy(), torch.cat(seen).numpy()

    def _frechet(self, features: NDArray[np.float32]) -> float:
        return proxy_frechet_distance(features, self._reference)


class _Features(nn.Module):
    """Features are what it is given: torchmetrics calls an extractor on images, and ours ran before."""

    num_features = NUM_FEATURES

    def forward(self, features: Tensor) -> Tensor:
        return features


def proxy_frechet_distance(features: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Fréchet distance between Gaussians fitted to features `[N, 128]`. Raises MissingDependencyError."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="torchmetrics, which computes the distance",
            remedy="pip install 'skipstep[evaluate]'",
        ) from error
    metric = FrechetInceptionDistance(feature=_Features())
    metric.update(torch.from_numpy(reference).double(), real=True)
    metric.update(torch.from_numpy(features).double(), real=False)
    return float(metric.compute())


def gaussian_spread(plan: Plan, eta: float, *, mean: float = 0.3, deviation: float = 0.7) -> float:
    """Variance between runs from one x_T for data N(mean, deviation²), exactly, over the plan's levels.

    Each step is affine in x for such data, x_s = g·x + const + sigma·z with eps = √(1-a)·(x - √a·mean)/v and
    v = a·deviation² + 1 - a, so variance goes by V ← g²·V + sigma².
    """
    weights = SOLVERS["ddim"].weights(plan.alpha_bars, SolverOptions(eta=eta))
    variance = 0.0
    for a, c_x0, c_eps, sigma in zip(weights.level, weights.c_x0, weights.c_eps, weights.sigma, strict=True):
        eps = np.sqrt(1 - a) / (a * deviation**2 + 1 - a)
        slope = c_x0 * (1 - np.sqrt(1 - a) * eps) / np.sqrt(a) + c_eps * eps
        variance = float(slope**2 * variance + sigma**2)
    return variance


def _steps_within(evaluations: int, solver: str) -> int:
    """The most steps whose evaluations do not exceed the budget; a last step that lands at 1 takes one."""
    per_step = {"heun": 2, "dpm_solver_2": 2, "rk4": 4}.get(solver, 1)
    return (evaluations - 1) // per_step + 1


def _save(path: Path, features: NDArray[np.float32], right: NDArray[np.bool_], seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, features=features, right=right, seconds=seconds)
    atomic_write(path, buffer.getvalue())
