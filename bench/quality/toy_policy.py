"""A diffusion policy on a task of our own: how often it succeeds with few evaluations, fitted and not.

python -m skipstep.bench.quality.toy_policy [--iterations 1500] [--episodes 512] [--json FILE]

The task: a point in a square goes to a goal around a disc that lies between, which it must not touch. A scripted expert
passes on either side. The policy reads position, goal and disc, draws 16 positions ahead, carries out 8 and draws
again: Diffusion Policy's loop, with a 1-D network of FiLM blocks that is trained here, DDPM over 100 timesteps. Every
sampler meets the same episodes with the same noises. Intervals are Wilson's, of 95 %.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skipstep import Condition, Engine, NoiseSchedule, Plan
from skipstep.bench.record import write_finding

HORIZON, CARRIED_OUT, CHUNKS = 16, 8, 6
SPEED, RADIUS, MARGIN, REACHED = 0.1, 0.2, 0.15, 0.1
TIMESTEPS = 100
NOISES = 64  # To which plans are fitted, and as many on which they are compared.
HEADER = ["sampler", "evaluations", "success", "95 % interval", "touched the disc"]
Floats = NDArray[np.float32]


def tasks(rng: np.random.Generator, num: int) -> Floats:
    """Position, goal and centre of the disc, `[num, 6]`: from the left to the right, the disc near the middle."""
    low = [-0.9, -0.7, 0.7, -0.7, -0.15, -0.3]
    high = [-0.7, 0.7, 0.9, 0.7, 0.15, 0.3]
    return rng.uniform(low, high, (num, 6)).astype(np.float32)


def expert(task: Floats, side: Floats, steps: int) -> Floats:
    """The next positions `[N, steps, 2]`: straight to the goal, or past the disc on the `side`, +1 or -1."""
    at, goal, disc = task[:, :2].copy(), task[:, 2:4], task[:, 4:]
    positions = []
    for _ in range(steps):
        ahead, away = goal - at, disc - at
        far, near = np.linalg.norm(ahead, axis=1), np.linalg.norm(away, axis=1)
        along = np.clip((ahead * away).sum(1) / np.maximum(far, 1e-6) ** 2, 0, 1)
        clear = np.linalg.norm(at + along[:, None] * ahead - disc, axis=1) > RADIUS + MARGIN
        tangent = np.arcsin(np.clip((RADIUS + MARGIN) / np.maximum(near, 1e-6), 0, 1)) * side
        # Inside the margin the tangent would lead along the disc: there the way leads outwards, too.
        tangent += np.clip((RADIUS + MARGIN - near) / MARGIN, 0, 1) * side
        straight, past = np.arctan2(ahead[:, 1], ahead[:, 0]), np.arctan2(away[:, 1], away[:, 0]) + tangent
        angle = np.where(clear, straight, past)
        at += np.minimum(SPEED, np.where(clear, far, SPEED))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        positions.append(at.copy())
    return np.stack(positions, 1)


def demonstrations(rng: np.random.Generator, num: int) -> tuple[Floats, Floats]:
    """What the policy reads, and actions `[num, HORIZON, 2]` in [-1, 1]: the way from where it is.

    Half of them begin anywhere outside of the disc. The expert passes on the shorter side, or on either where the disc
    lies across the way.
    """
    task = tasks(rng, num)
    anywhere = rng.uniform(-1, 1, (num, 2)).astype(np.float32)
    outside = np.linalg.norm(anywhere - task[:, 4:], axis=1) > RADIUS
    task[:, :2] = np.where((outside & (rng.random(num) < 0.5))[:, None], anywhere, task[:, :2])
    ahead, away = task[:, 2:4] - task[:, :2], task[:, 4:] - task[:, :2]
    offset = (ahead[:, 0] * away[:, 1] - ahead[:, 1] * away[:, 0]) / np.linalg.norm(ahead, axis=1)
    side = np.where(np.abs(offset) < 0.08, rng.choice([-1.0, 1.0], num), -np.sign(offset)).astype(np.float32)
    return task, (expert(task, side, HORIZON) - task[:, None, :2]) / (SPEED * HORIZON)


class Block(nn.Module):
    """Two convolutions along the horizon; what is known of time and task scales and shifts between them."""

    def __init__(self, narrow: int, wide: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(narrow, wide, 5, padding=2), nn.GroupNorm(8, wide), nn.Mish())
        self.second = nn.Sequential(nn.Conv1d(wide, wide, 5, padding=2), nn.GroupNorm(8, wide), nn.Mish())
        self.film = nn.Linear(width, 2 * wide)
        self.skip = nn.Conv1d(narrow, wide, 1)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        scale, shift = self.film(known).unsqueeze(-1).chunk(2, dim=1)
        out: Tensor = self.second(self.first(x) * (1 + scale) + shift) + self.skip(x)
        return out


class PolicyNetwork(nn.Module):
    """(x [B, HORIZON, 2], timestep [B], global_cond [B, 6]) -> the noise in x."""

    frequencies: Tensor

    def __init__(self, channels: int = 32, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -math.log(1e3), 16)))
        self.known = nn.Sequential(nn.Linear(32 + 6, 2 * width), nn.Mish(), nn.Linear(2 * width, width), nn.Mish())
        self.inner = Block(2, channels, width)
        self.down = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Block(channels, 2 * channels, width), Block(2 * channels, 2 * channels, width)])
        self.up = nn.ConvTranspose1d(2 * channels, channels, 4, stride=2, padding=1)
        self.outer = Block(2 * channels, channels, width)
        self.last = nn.Conv1d(channels, 2, 1)

    def forward(self, x: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        angles = timestep.unsqueeze(-1) * self.frequencies
        known = self.known(torch.cat([angles.sin(), angles.cos(), global_cond], dim=-1))
        inner = middle = self.inner(x.transpose(1, 2), known)
        middle = self.down(middle)
        for block in self.middle:
            middle = block(middle, known)
        predicted: Tensor = self.last(self.outer(torch.cat([self.up(middle), inner], dim=1), known))
        return predicted.transpose(1, 2)


def train(schedule: NoiseSchedule, iterations: int, batch: int = 256) -> PolicyNetwork:
    """The average of the weights over the training, as such policies are used."""
    torch.manual_seed(0)
    rng, network = np.random.default_rng(0), PolicyNetwork()
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)  # type: ignore[no-untyped-call]
    averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=average)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-5)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=iterations, pct_start=0.05)
    alpha_bar = torch.tensor(schedule.alpha_bar.copy(), dtype=torch.float32)
    for iteration in range(iterations):
        known, actions = (torch.from_numpy(each.astype(np.float32)) for each in demonstrations(rng, batch))
        timestep = torch.randint(TIMESTEPS, (batch,))
        noise, share = torch.randn_like(actions), alpha_bar[timestep].reshape(-1, 1, 1)
        loss = (network(share.sqrt() * actions + (1 - share).sqrt() * noise, timestep, known) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        averaged.update_parameters(network)
        if iteration % 300 == 0:
            print(f"iteration {iteration}, loss {loss.item():.4f}", flush=True)
    trained = averaged.module.eval()
    assert isinstance(trained, PolicyNetwork)
    return trained


def rollout(engine: Engine, plan: Plan, task: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each episode whether it ends at the goal without a touch, and whether the disc was touched."""
    task = task.copy()
    touched, reached = np.zeros(len(task), bool), np.zeros(len(task), bool)
    for chunk in range(CHUNKS):
        seeds = [chunk * len(task) + i for i in range(len(task))]
        actions = engine.sample(plan=plan, seeds=seeds, conditions={"global_cond": task})
        start = task[:, :2].copy()
        for step in range(CARRIED_OUT):
            target = start + actions[:, step] * (SPEED * HORIZON)
            way = target - task[:, :2]
            far = np.linalg.norm(way, axis=1, keepdims=True)
            # The point is no faster than the expert's, but for a tenth, and stays where it has arrived.
            moved = way * np.minimum(1, 1.1 * SPEED / np.maximum(far, 1e-6))
            task[:, :2] += np.where(reached[:, None], 0, moved)
            touched |= np.linalg.norm(task[:, :2] - task[:, 4:], axis=1) < RADIUS
            reached |= np.linalg.norm(task[:, :2] - task[:, 2:4], axis=1) < REACHED
    return reached & ~touched, touched


def wilson(successes: int, num: int) -> tuple[float, float]:
    z, share = 1.96, successes / num
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, middle - half), min(1.0, middle + half)


def main() -> None:
    parser = argparse.ArgumentParser(description="Success of a toy policy with few evaluations.")
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    schedule, begun = NoiseSchedule.cosine(TIMESTEPS), time.perf_counter()
    network = train(schedule, chosen.iterations)
    print(f"trained in {time.perf_counter() - begun:.0f} s", flush=True)
    textbook = {f"DDIM-{steps}": Plan(steps=steps, solver="ddim", schedule=schedule) for steps in (10, 4, 3)}
    plans = {"DDPM-100": Plan(steps=100, solver="ddpm", schedule=schedule), **textbook}
    options: dict[str, Any] = {
        "sample_shape": (HORIZON, 2),
        "conditions": {"global_cond": Condition((6,), null="same")},
    }
    engine = Engine.build(
        network, plans=plans.values(), schedule=schedule, device="cpu", batch_sizes=[1, 64], num_threads=1, **options
    )
    known = demonstrations(np.random.default_rng(1), NOISES)[0]  # Where episodes begin, and anywhere.
    report = engine.tune(steps=(3, 4), noises=NOISES, held_out=NOISES, nodes=48, conditions={"global_cond": known})
    print(report, flush=True)
    for plan in report.plans:
        engine.add_plan(plan)
        plans[f"tuned-{plan.steps}"] = plan
    episodes, rows = tasks(np.random.default_rng(2), chosen.episodes), []
    for name, plan in plans.items():
        right, touched = rollout(engine, plan, episodes)
        low, high = wilson(int(right.sum()), len(right))
        success = f"{100 * right.mean():.1f} %"
        rows.append(
            [name, str(plan.num_evaluations), success, f"{100 * low:.1f} to {100 * high:.1f} %", str(touched.sum())]
        )
        print(*rows[-1], sep=" | ", flush=True)
    if chosen.json is not None:
        write_finding(
            chosen.json,
            command="python -m skipstep.bench.quality.toy_policy",
            header=HEADER,
            rows=rows,
            note=f"{chosen.episodes} episodes, the same for each sampler, with the same seeds; "
            f"{sum(each.numel() for each in network.parameters())} parameters.",
        )


if __name__ == "__main__":
    main()
