"""What fitted plans save in time: `python -m skipstep.bench.quality.equal_quality --out FILE`.

Whole guided calls on the shipped model, ours and diffusers' (eager, float32), taking turns in one process; medians of
the rounds, and of the ratios within a round. The quality beside them is what skipstep evaluate measured for the plan,
with its intervals; diffusers' DDIM and UniPC walk the same plans.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from skipstep import Engine, Plan, load
from skipstep.bench.record import write_finding
from skipstep.demo import SHIPPED_BUNDLE, SHIPPED_MODEL

GUIDANCE = 2.0
NULL = 10
BASE = "diffusers DDIM, 20 steps"
Call = Callable[[], Any]


def ours(engine: Engine, plan: Plan, batch: int) -> Call:
    plan = engine.add_plan(plan)
    arguments: dict[str, Any] = {"seeds": list(range(batch)), "class_labels": [i % 10 for i in range(batch)]}
    return lambda: engine.sample(plan=plan, guidance_scale=GUIDANCE, **arguments)


def theirs(unet: Any, scheduler: Any, steps: int, batch: int) -> Call:
    """diffusers' scheduler around its network, with both halves of the guided batch in one evaluation."""
    x_T = torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.cat([torch.arange(batch) % 10, torch.full((batch,), NULL)])

    @torch.inference_mode()
    def draw() -> Any:
        scheduler.set_timesteps(steps)
        x = x_T
        for t in scheduler.timesteps:
            conditional, without = unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
            x = scheduler.step(without + GUIDANCE * (conditional - without), t, x).prev_sample
        return x.numpy()

    return draw


def contenders(batch: int) -> dict[str, tuple[Call, int, str | None]]:
    """A call, its evaluations and its plan's key, by name."""
    engine = load(SHIPPED_BUNDLE, allow_hard_links=True, compile_on_miss=True)
    unet = diffusers.UNet2DModel.from_pretrained(SHIPPED_MODEL, subfolder="unet").eval()
    configuration = diffusers.DDIMScheduler.from_pretrained(SHIPPED_MODEL, subfolder="scheduler").config
    fitted = [plan for plan in engine.plans.values() if plan.solver == "fitted"]
    found = {f"skipstep, fitted, {len(p.timesteps)} steps": (ours(engine, p, batch), p) for p in fitted}
    for steps in (10, 20, 50):
        plan = Plan(**{**engine.plan_defaults, "steps": steps})
        found[f"skipstep, DDIM, {steps} steps"] = (ours(engine, plan, batch), plan)
    for name, scheduler, solver, steps in (
        ("DDIM", diffusers.DDIMScheduler, "ddim", 20),
        ("UniPC", diffusers.UniPCMultistepScheduler, "unipc_2", 10),
    ):
        plan = Plan(**{**engine.plan_defaults, "steps": steps, "solver": solver})
        draw = theirs(unet, scheduler.from_config(configuration), steps, batch)
        found[f"diffusers {name}, {steps} steps"] = (draw, plan)
    return {name: (draw, plan.num_evaluations, plan.key) for name, (draw, plan) in found.items()}


def measure(batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, one a round."""
    calls = {name: draw for name, (draw, *_) in contenders(batch).items()}
    for draw in calls.values():
        draw()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def qualities(evaluation: Path) -> dict[str, tuple[str, str]]:
    """The Fréchet distance, and that to the converged images, of each plan that was measured at this guidance scale, by
    key."""
    rows = json.loads((evaluation / "rows.json").read_text(encoding="utf-8"))["rows"].values()
    kept = [row for row in rows if row.get("guidance") == GUIDANCE and row.get("rmse")]
    return {row["key"]: (interval(row["frechet"], ".2f"), interval(row["rmse"], ".3f")) for row in kept}


def interval(estimate: dict[str, float], form: str) -> str:
    value, low, high = (format(estimate[name], form) for name in ("value", "low", "high"))
    return f"{value} ({low} … {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--evaluation", type=Path, default=Path("bench/results/evaluation"))
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    known = qualities(options.evaluation)
    seconds = {batch: measure(batch, options.rounds) for batch in (1, 16)}
    rows = []
    for name, (_, evaluations, key) in contenders(1).items():
        cells = [name, str(evaluations), *known.get(key or "", ("–", "–"))]
        for measured in seconds.values():
            ratios = np.array(measured[BASE]) / np.array(measured[name])
            cells.append(f"{1e3 * statistics.median(measured[name]):.0f} ({np.median(ratios):.1f}×)")
        rows.append(cells)
        print(*cells, sep="  ")
    header = ["call", "NFE", "Fréchet distance", "RMSE to the converged image", *(f"ms at batch {n}" for n in seconds)]
    command = f"python -m skipstep.bench.quality.equal_quality --rounds {options.rounds}"
    note = (
        f"Whole calls at guidance {GUIDANCE:g}, medians of {options.rounds} rounds; in brackets, times as fast as "
        f"{BASE}, and intervals of 95 % of resampled noises; the quality is that of bench/results/evaluation."
    )
    write_finding(options.out, command=command, header=header, rows=rows, note=note)


if __name__ == "__main__":
    main()
