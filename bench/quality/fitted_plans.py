"""How good the shipped bundle's fitted plans are: `python -m skipstep.bench.quality.fitted_plans --out FILE`.

Every plan draws the same noises, which no fit has seen, under guidance 2. Three numbers, each with the interval that
holds 95 % of resampled sets of these noises: the root mean square distance to the converged images (the trajectories of
skipstep.fitting.reference), the Fréchet distance to them in the features of the shipped classifier, and the share of
images that the classifier sees as the class asked for. What was drawn is kept: interrupt the command and repeat it to
go on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skipstep import Engine, Plan, load
from skipstep.bench.quality.classifier import load_classifier
from skipstep.bench.record import environment, write_json
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.fitting.reference import Denoiser, conditions_of, grid_of, integrate
from skipstep.fitting.tune import frechet

_NODES = 56
_GUIDANCE = 2.0
_RESAMPLED = 200
_PART = 250


def plans_of(engine: Engine) -> dict[str, Plan]:
    """The fitted plans that the engine holds, and textbook plans beside them, by name."""
    fitted = sorted(
        (plan for plan in engine.plans.values() if plan.solver == "fitted"), key=lambda plan: len(plan.timesteps)
    )
    few = sorted({len(plan.timesteps) for plan in fitted})
    found = {f"fitted, {len(plan.timesteps)} steps": plan for plan in fitted}
    for name, solver, counts in (
        ("DPM-Solver++ 2M", "dpm_solver_pp_2m", few),
        ("DDIM", "ddim", [*few, 10, 20, 50]),
    ):
        for steps in counts:
            plan = Plan(**{**engine.plan_defaults, "steps": steps, "spacing": "trailing", "solver": solver})
            found[f"{name}, {steps} steps"] = plan
    return found


def drawn(engine: Engine, plan: Plan | None, num: int, cache: Path) -> NDArray[np.float32]:
    """The images of seeds 0 … num - 1 by one plan, or the converged ones; parts that were drawn before are read."""
    parts = []
    for start in range(0, num, _PART):
        path = cache / f"{'converged' if plan is None else plan.key}-{start}.npy"
        if not path.exists():
            seeds = np.arange(start, min(num, start + _PART), dtype=np.uint64)
            labels = [int(seed) % 10 for seed in seeds]
            if plan is None:
                given = conditions_of(engine.network, len(seeds), {"class_labels": labels, "guidance_scale": _GUIDANCE})
                denoiser = Denoiser.of(engine, seeds, **given)
                images = integrate(denoiser, grid_of(denoiser.schedule, _NODES)).ends
            else:
                images = engine.sample(plan=plan, seeds=seeds.tolist(), class_labels=labels, guidance_scale=_GUIDANCE)
            cache.mkdir(parents=True, exist_ok=True)
            np.save(path, images)
        parts.append(np.load(path))
    return np.concatenate(parts)


def judged(images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The classifier's features `[N, F]`, and whether it sees the class asked for."""
    classifier = load_classifier()
    with torch.inference_mode():
        given = torch.from_numpy(images).clamp(-1, 1)
        features = classifier.features(given)
        right = classifier.head(features).argmax(dim=1).numpy() == np.arange(len(images)) % 10
    return features.double().numpy(), right


def interval(statistic: Callable[[NDArray[np.int64]], float], num: int) -> tuple[float, float, float]:
    """A statistic of the samples at given places: of all, and the bounds of 95 % of resampled sets."""
    rng = np.random.default_rng(0)
    resampled = [statistic(rng.integers(0, num, num)) for _ in range(_RESAMPLED)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return statistic(np.arange(num)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bundle", type=Path, default=SHIPPED_BUNDLE, help="with fitted plans (default: the shipped one)"
    )
    parser.add_argument("--num", type=int, default=1000, help="noises (default: 1000)")
    parser.add_argument("--cache", type=Path, default=Path("out/fitted-plans"), help="folder for what was drawn")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    engine = load(options.bundle, allow_hard_links=True, compile_on_miss=True)
    converged = drawn(engine, None, options.num, options.cache)
    wanted, _ = judged(converged)
    rows: list[Any] = []
    for name, plan in plans_of(engine).items():
        engine.add_plan(plan)
        images = drawn(engine, plan, options.num, options.cache)
        features, right = judged(images)
        squares = np.mean((images - converged) ** 2, axis=(1, 2, 3))

        # Bound now: each plan has its own.
        def error(at: NDArray[np.int64], squares: Any = squares) -> float:
            return float(np.sqrt(squares[at].mean()))

        def distance(at: NDArray[np.int64], features: Any = features) -> float:
            return frechet(features[at], wanted[at])

        def share(at: NDArray[np.int64], right: Any = right) -> float:
            return float(right[at].mean())

        columns = (
            ("{:.4f}", interval(error, options.num)),
            ("{:.2f}", interval(distance, options.num)),
            ("{:.1%}", interval(share, options.num)),
        )
        cells = [
            f"{form.format(value)} ({form.format(low)} … {form.format(high)})" for form, (value, low, high) in columns
        ]
        rows.append([name, str(plan.num_evaluations), *cells])
        print(*rows[-1], sep="  ", flush=True)
    note = (
        f"{options.num} noises that no fit has seen, guidance {_GUIDANCE:g}, trailing spacing; in brackets 95 % of "
        f"resampled sets of noises. Converged images: {_NODES} steps at third order."
    )
    header = ["plan", "evaluations", "RMSE to the converged image", "Fréchet distance to them", "recognised"]
    command = f"python -m skipstep.bench.quality.fitted_plans --num {options.num}"
    write_json(
        options.out,
        {"commit": environment()["commit"], "command": command, "header": header, "rows": rows, "note": note},
    )


if __name__ == "__main__":
    main()
