"""What `skipstep evaluate` measures: how plans differ in quality, spread and invertibility, on one network.

A case is a plan under a guidance scale. Its samples have the seeds 0, 1, 2, …, the same in each case, and classes in
turn where the network knows classes. Its row holds, each with an interval (skipstep.bench.quality.statistics),

    frechet, kernel   distances between the samples and the reference images, in the features of a judge
    rmse              to where the same noises lead in many steps (skipstep.fitting.reference); for plans without noise
    recognised        the share of samples that the judge takes for the class asked for

The distances are not comparable with any published FID unless the judge is Inception. Rows are kept in OUT/rows.json
and half-measured ones in OUT/cache: a stopped evaluation goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from skipstep import Engine, Plan
from skipstep.bench.quality.statistics import (
    Estimate,
    FrechetDistance,
    estimate,
    kernel_distance,
    root_mean,
    share,
)
from skipstep.bench.record import environment, write_json
from skipstep.errors import InputError, PlanError, check_integer
from skipstep.fitting.judge import Floats, Judge
from skipstep.fitting.reference import Denoiser, conditions_of, grid_of, integrate
from skipstep.plans.fit import Fit
from skipstep.plans.solvers import SOLVERS
from skipstep.plans.update_weights import SolverOptions
from skipstep.storage.atomic import atomic_write

CHUNK = 100
MAX_CONVERGED = 1000
SHORT = 20  # Evaluations; cases of more are measured after everything else.
LONG = 100  # Evaluations above which `num_long` samples are drawn.

# Reconstruction MSE on CIFAR-10 (Song, Meng, Ermon 2021, arXiv 2010.02502, table 2): theirs.
PAPER_RECONSTRUCTION = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004}

Row = dict[str, Any]


TABLES = ("fitted-plans", "steps", "spacings", "solvers", "spread", "inversion", "pictures")


@dataclass(frozen=True, slots=True)
class Grid:
    """Which of TABLES are measured, and their cases. "sigma-hat" is DDPM with the larger of its fixed variances."""

    tables: tuple[str, ...] = TABLES
    fitted_beside: tuple[int, ...] = (10, 20, 50)
    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 1000)
    etas: tuple[float | str, ...] = (0.0, 0.5, 1.0, "sigma-hat")
    spacings: tuple[str, ...] = ("quadratic", "paper_quadratic")
    spacing_steps: tuple[int, ...] = (5, 10, 20)
    solvers: tuple[str, ...] = ("dpm_solver_pp_2m", "unipc_2", "ipndm", "heun", "dpm_solver_2", "rk4")
    evaluations: tuple[int, ...] = (10, 20)
    spread_etas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    spread_steps: int = 50
    spread_runs: int = 64
    inversion_steps: tuple[int, ...] = (10, 20, 50, 100)
    inversion_images: int = 50
    refinements: int = 3
    strip_steps: tuple[int, ...] = (2, 3, 5, 10, 20, 50, 100)
    picture_steps: int = 50


@dataclass(frozen=True, slots=True)
class Case:
    """A plan under a guidance scale, with what names it in its table."""

    table: str
    labels: tuple[str, ...]
    plan: Plan
    guidance: float = 1.0


class Evaluation:
    """One engine, judged by `judge` beside `reference` images `[N, C, H, W]`; `folder` keeps what was measured.

    num         samples of a case of up to 100 evaluations, `num_long` of a longer one.
    prompts     `[M, L, D]` for a network that takes prompts: sample i has the embedding i mod M.
    nodes       timesteps of the trajectories that lead to the converged images.

    Raises InputError for numbers that are too small, and for a folder with rows of another network or judge.
    """

    def __init__(
        self,
        engine: Engine,
        judge: Judge,
        reference: Floats,
        folder: Path,
        *,
        num: int = 2000,
        num_long: int = 500,
        grid: Grid | None = None,
        prompts: Floats | None = None,
        nodes: int = 56,
    ) -> None:
        if min(num, num_long) < 2 or num > len(reference):
            raise InputError(
                got=f"{num} samples, {num_long} of long plans, beside {len(reference)} reference images",
                expected="from 2 up to as many samples as reference images",
                remedy=f"pass --num {min(2000, len(reference))} --num-long 500, or more reference images",
            )
        self.engine, self.folder, self.num, self.num_long = engine, folder, num, num_long
        self.grid, self.reference, self._prompts = grid or Grid(), reference, prompts
        self._nodes = check_integer("nodes", nodes, low=8, high=1 << 12)
        self._judge = judge
        self._features, self._seen = judge(reference)
        self._frechet = FrechetDistance(self._features)
        self.identity = {
            "network": engine.plans.network_digest or "unknown",
            "judge": judge.digest,
            "reference": hashlib.sha256(reference.tobytes()).hexdigest(),
            "samples": [num, num_long],
        } | ({} if nodes == 56 else {"nodes": nodes})
        self._path = folder / "rows.json"
        self.rows: dict[str, Row] = {}
        if self._path.exists():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["of"] != self.identity:
                raise InputError(
                    got=f"{folder}, whose rows are of another network, judge, reference or number of samples",
                    expected="a folder of this evaluation, or a new one",
                    remedy="pass --out with another folder",
                )
            self.rows = kept["rows"]

    @property
    def num_classes(self) -> int:
        return self.engine.network.num_classes or 0

    def plan(self, **options: Any) -> Plan:
        return Plan(**{**self.engine.plan_defaults, **options})

    def cases(self) -> list[Case]:
        """All of them, table by table. Plans that the schedule does not have are left out."""
        grid, found = self.grid, list(self._fitted())
        for steps in grid.steps:
            # A thousand evaluations of each sample take hours: no noise and the most are enough there.
            etas = grid.etas if steps <= LONG else dict.fromkeys((grid.etas[0], grid.etas[-1]))
            for eta in etas:
                options = {"solver": "ddpm", "variance": "fixed_large"} if eta == "sigma-hat" else {"eta": eta}
                name = "σ̂" if eta == "sigma-hat" else f"{eta:g}"
                found += self._case("steps", (name, str(steps)), steps=steps, **options)
        for spacing in ("trailing", *grid.spacings):
            for steps in grid.spacing_steps:
                found += self._case("spacings", (spacing, str(steps)), steps=steps, spacing=spacing)
        for solver in ("ddim", *grid.solvers):
            for budget in grid.evaluations:
                steps = _steps_within(budget, solver)
                found += self._case("solvers", (solver, f"at most {budget}"), steps=steps, solver=solver)
        return [case for case in found if case.table in grid.tables]

    def measure(self, case: Case) -> Row:
        """The row of a case: as it was measured before, or now."""
        name = f"{case.plan.key}, guidance {case.guidance:g}"
        if name not in self.rows:
            features, right, squares = self._draw(case)
            row: Row = {
                "table": case.table,
                "key": case.plan.key,
                "solver": case.plan.solver,
                "eta": case.plan.eta,
                "guidance": case.guidance,
                "plan": repr(case.plan),
                "evaluations": case.plan.num_evaluations,
                "samples": len(features),
                "commit": environment()["commit"],
                "frechet": self._frechet.estimate(features),
                "kernel": kernel_distance(features, self._features),
                "rmse": root_mean(squares) if len(squares) else None,
                "recognised": share(right) if len(right) else None,
            }
            self._keep(name, row)
        return self.rows[name]

    def ends_of_the_scale(self) -> list[Row]:
        """Reference images beside other reference images (the floor), and pure noise."""
        count = min(self.num, len(self.reference) // 2)
        noise = np.random.default_rng(0).standard_normal((count, *self.reference.shape[1:])).astype(np.float32)
        floor = FrechetDistance(self._features[count:])
        return [
            {"what": "reference images", "frechet": floor.of(self._features[:count])},
            {"what": "pure noise", "frechet": self._frechet.of(self._judge(noise.clip(-1, 1))[0])},
        ]

    def spread(self) -> list[Row]:
        """Variance between runs from one x_T, per pixel; beside it the same for Gaussian data, exactly."""
        shape, runs = self.engine.network.sample_shape, self.grid.spread_runs

        def measured(eta: float) -> Row:
            plan = self.engine.add_plan(self.plan(steps=self.grid.spread_steps, eta=eta))
            x_T = np.repeat(np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32), runs, axis=0)
            given = self.conditions(np.zeros(runs, np.int64), 1.0)
            drawn = self.engine.sample(plan=plan, x_T=x_T, seeds=range(runs), **given)
            pixels = drawn.reshape(runs, -1)
            variance = estimate(lambda at: float(pixels[at].var(axis=0, ddof=1).mean()), runs)
            return {"eta": eta, "runs": runs, "variance": variance, "gaussian_data_exact": gaussian_spread(plan, eta)}

        return [self._kept(f"spread {eta:g}", functools.partial(measured, eta)) for eta in self.grid.spread_etas]

    def inversion(self) -> list[Row]:
        """Mean squared error of reconstructed reference images, pixels in [0, 1]."""
        count = min(self.grid.inversion_images, len(self.reference))
        images = self.reference[:count]
        labels = np.zeros(count, np.int64) if self._seen is None else self._seen[:count]

        def measured(steps: int) -> Row:
            row: Row = {"steps": steps, "images": count, "paper_cifar10": PAPER_RECONSTRUCTION.get(steps)}
            plan = self.engine.add_plan(self.plan(steps=steps))
            for name, refinements in (("plain", 0), ("refined", self.grid.refinements)):
                given = self.conditions(labels, 1.0)
                again = self.engine.reconstruct(images, plan=plan, refinements=refinements, **given)
                squares = np.mean(((again - images) / 2) ** 2, axis=(1, 2, 3))
                row[name] = estimate(lambda at, squares=squares: float(squares[at].mean()), count)  # type: ignore[misc]
            return row

        return [self._kept(f"inversion {n}", functools.partial(measured, n)) for n in self.grid.inversion_steps]

    def conditions(self, places: NDArray[np.int64], guidance: float) -> Any:
        """The arguments of the samples at these places: classes and prompts in turn."""
        given: Row = {"class_labels": (places % self.num_classes).tolist()} if self.num_classes else {}
        if self._prompts is not None:
            given["prompt_embeds"] = self._prompts[places % len(self._prompts)]
        return given | ({"guidance_scale": guidance} if guidance != 1.0 else {})

    def _case(self, table: str, labels: tuple[str, ...], guidance: float = 1.0, **options: Any) -> list[Case]:
        try:
            return [Case(table, labels, self.plan(**options), guidance)]
        except PlanError:
            return []

    def _fitted(self) -> Iterator[Case]:
        """The fitted plans that the engine holds, at their guidance scale, and textbook plans beside them."""
        held = sorted(self.engine.plans.values(), key=lambda plan: len(plan.timesteps))
        fitted = [(plan, plan.fit.guidance_scale) for plan in held if isinstance(plan.fit, Fit)]
        few = [len(plan.timesteps) for plan, _ in fitted]
        for plan, guidance in fitted:
            yield Case("fitted-plans", ("fitted", str(len(plan.timesteps))), plan, guidance)
        for guidance in dict.fromkeys(guidance for _, guidance in fitted):
            for solver, counts in (
                ("unipc_2", few),
                ("dpm_solver_pp_2m", few),
                ("ddim", (*few, *self.grid.fitted_beside)),
            ):
                for steps in dict.fromkeys(counts):
                    options: Row = {"steps": steps, "solver": solver, "spacing": "trailing"}
                    yield from self._case("fitted-plans", (solver, str(steps)), guidance, **options)

    def _draw(self, case: Case) -> tuple[Floats, NDArray[np.bool_], Floats]:
        """Features `[N, F]`; whether each sample is recognised, `[N]` or none; and the squares of its differences from
        the converged image, `[≤ N]`."""
        self.engine.add_plan(case.plan)
        num = self.num if case.plan.num_evaluations <= LONG else self.num_long
        folder = self.folder / "cache" / f"{case.plan.key}-{case.guidance:g}"
        parts: list[Mapping[str, NDArray[Any]]] = []
        for first in tqdm(range(0, num, CHUNK), desc=" ".join((case.table, *case.labels)), leave=False, disable=None):
            seeds = np.arange(first, min(num, first + CHUNK))

            def drawn(seeds: NDArray[np.int64] = seeds) -> dict[str, NDArray[Any]]:
                given = self.conditions(seeds, case.guidance)
                images = self.engine.sample(plan=case.plan, seeds=seeds.tolist(), **given)
                features, seen = self._judge(images)
                squares = np.zeros(0, np.float32)
                if not case.plan.adds_noise and seeds[0] < MAX_CONVERGED:
                    ends = self._converged(seeds, case.guidance)
                    squares = np.mean((images - ends) ** 2, axis=tuple(range(1, images.ndim)))
                right = np.zeros(0, bool)
                if self.num_classes and seen is not None:
                    right = np.equal(seen, seeds % self.num_classes)
                return {
                    "features": features,
                    "right": right,
                    "squares": squares,
                }

            parts.append(_stored(folder / f"{first}-{len(seeds)}.npz", drawn))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in ("features", "right", "squares")}
        return joined["features"], joined["right"], joined["squares"]

    def _converged(self, seeds: NDArray[np.int64], guidance: float) -> Floats:
        def drawn() -> dict[str, NDArray[Any]]:
            given = conditions_of(self.engine.network, len(seeds), self.conditions(seeds, guidance))
            denoiser = Denoiser.of(self.engine, seeds.astype(np.uint64), **given)
            return {"ends": integrate(denoiser, grid_of(denoiser.schedule, self._nodes)).ends}

        path = self.folder / "cache" / f"converged-{self._nodes}-{guidance:g}" / f"{seeds[0]}-{len(seeds)}.npz"
        ends: Floats = _stored(path, drawn)["ends"]
        return ends

    def _kept(self, name: str, measure: Callable[[], Row]) -> Row:
        if name not in self.rows:
            self._keep(name, {**measure(), "commit": environment()["commit"]})
        return self.rows[name]

    def _keep(self, name: str, row: Row) -> None:
        plain = {k: dataclasses.asdict(v) if isinstance(v, Estimate) else v for k, v in row.items()}
        self.rows[name] = plain
        write_json(self._path, {"of": self.identity, "rows": self.rows})


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


def _stored(path: Path, make: Callable[[], Mapping[str, NDArray[Any]]]) -> Mapping[str, NDArray[Any]]:
    """The arrays of the file, which is made where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **make())  # type: ignore[arg-type]
        atomic_write(path, buffer.getvalue())
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)
