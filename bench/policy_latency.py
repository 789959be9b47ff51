"""Milliseconds of a chunk of actions: LeRobot's own loop, and the same chunk here, in one run on the CPU.

python -m skipstep.bench.policy_latency [--repeats 9] [--down-dims 64 128] [--threads 2] [--neighbours 1] [--json FILE]

Images and state in, actions out, batch 1, DDIM-10 and DDPM-100, random weights. The two take turns, so that what else
the machine does meets both; `--neighbours` are processes that keep a core busy each meanwhile. A p99 needs a hundred
repeats to say more than the slowest call. Needs lerobot (0.4.4) and its torchvision.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from skipstep.bench.record import write_finding
from skipstep.robotics import PolicyEngine, from_policy

CASES = {"DDIM": 10, "DDPM": 100}
HEADER = [
    "case",
    "backend",
    "busy neighbours",
    "LeRobot",
    "skipstep",
    "times sooner",
    "LeRobot p99",
    "skipstep p99",
    "p99",
]


def import_lerobot(module: str) -> Any:
    """A module of lerobot's. Beside a torch without CUDA, PyPI's torchvision cannot load its own operators, which it
    only declares shapes for on import; they are declared first. Nothing calls them. The package of policies imports
    all of them, and some need releases of transformers of their own: it is entered bare."""
    found = importlib.util.find_spec("lerobot")
    if found is not None and found.origin is not None and "lerobot.policies" not in sys.modules:
        policies = ModuleType("lerobot.policies")
        policies.__path__ = [str(Path(found.origin).parent / "policies")]
        sys.modules["lerobot.policies"] = policies
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return importlib.import_module(f"lerobot.{module}")


def make_policy(scheduler: str, steps: int, *, cameras: int = 1, side: int = 96, **options: Any) -> Any:
    """A DiffusionPolicy with the same random weights every time: a state of 3, pictures, actions of 2."""
    modeling = import_lerobot("policies.diffusion.modeling_diffusion")
    types = import_lerobot("configs.types")
    torch.manual_seed(0)
    feature, kinds = types.PolicyFeature, types.FeatureType
    inputs = {"observation.state": feature(kinds.STATE, (3,))}
    inputs |= {f"observation.images.{i}": feature(kinds.VISUAL, (3, side, side)) for i in range(cameras)}
    if not cameras:
        inputs["observation.environment_state"] = feature(kinds.ENV, (5,))
    config = import_lerobot("policies.diffusion.configuration_diffusion").DiffusionConfig(
        input_features=inputs,
        output_features={"action": feature(kinds.ACTION, (2,))},
        noise_scheduler_type=scheduler,
        num_inference_steps=steps,
        device="cpu",
        **options,
    )
    return modeling.DiffusionPolicy(config).eval()


def batch_of(observations: dict[str, Any], config: Any) -> dict[str, torch.Tensor]:
    """Observations by name, [B, n_obs_steps, …], as generate_actions takes them: the cameras in one tensor."""
    batch = {name: torch.from_numpy(array) for name, array in observations.items()}
    cameras = [batch.pop(name) for name in config.image_features]
    return {**batch, "observation.images": torch.stack(cameras, 2)} if cameras else batch


def random_observations(policy: PolicyEngine, rng: np.random.Generator) -> dict[str, Any]:
    times = policy.spec.n_obs_steps
    return {each.name: rng.random((1, times, *each.shape), np.float32) for each in policy.spec.observations}


def take_turns(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each function: the fastest call, the median and p99, after one call that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if repeat:
                taken[name].append((time.perf_counter() - begun) * 1e3)
    return {
        name: {"fastest": min(each), "median": float(np.median(each)), "p99": float(np.quantile(each, 0.99))}
        for name, each in taken.items()
    }


@contextmanager
def busy_neighbours(num: int) -> Iterator[None]:
    """Meanwhile `num` processes compute without a pause."""
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(num)]
    try:
        yield
    finally:
        for each in spinning:
            each.kill()
            each.wait()


def measure(
    scheduler: str, steps: int, *, repeats: int, down_dims: tuple[int, ...], backend: str, neighbours: int
) -> dict[str, Any]:
    theirs, rng = make_policy(scheduler, steps, down_dims=down_dims), np.random.default_rng(0)
    with from_policy(theirs, device="cpu", backend=backend, num_threads=torch.get_num_threads()) as ours:
        observations, shape = random_observations(ours, rng), (1, *ours.engine.network.sample_shape)
        batch, noise = batch_of(observations, theirs.config), rng.standard_normal(shape, np.float32)

        def lerobot() -> Any:
            with torch.inference_mode():
                return theirs.diffusion.generate_actions(batch, noise=torch.from_numpy(noise)).numpy()

        def skipstep() -> Any:
            return ours.predict(observations, steps=steps, seeds=[0], x_T=noise)

        with busy_neighbours(neighbours):
            found: dict[str, Any] = take_turns({"lerobot": lerobot, "skipstep": skipstep}, repeats)
        if scheduler == "DDIM":
            found["largest_difference"] = float(np.abs(lerobot() - skipstep()).max())
    ratios = {kind: found["lerobot"][kind] / found["skipstep"][kind] for kind in ("fastest", "median", "p99")}
    return {
        "case": f"{scheduler}-{steps}",
        "backend": backend,
        "neighbours": neighbours,
        **found,
        "times_sooner": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of a chunk of actions beside LeRobot's own loop.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--down-dims", type=int, nargs="+", default=(512, 1024, 2048))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backends", nargs="+", default=("onnxruntime", "openvino"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0], help="processes that keep a core busy each")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for scheduler, backend, neighbours in product(chosen.cases, chosen.backends, chosen.neighbours):
        kinds = {"down_dims": tuple(chosen.down_dims), "backend": backend, "neighbours": neighbours}
        rows.append(measure(scheduler, CASES[scheduler], repeats=chosen.repeats, **kinds))
        print(json.dumps(rows[-1]), flush=True)
    if chosen.json is not None:
        command = f"python -m skipstep.bench.policy_latency {' '.join(sys.argv[1:])}"
        note = (
            f"Milliseconds, batch 1, {chosen.threads} threads, {list(chosen.down_dims)} wide, {chosen.repeats} turns."
        )
        write_finding(chosen.json, command=command, header=HEADER, rows=[as_row(each) for each in rows], note=note)


def as_row(found: dict[str, Any]) -> list[str]:
    times = [[f"{found[who][kind]:.0f}" for who in ("lerobot", "skipstep")] for kind in ("median", "p99")]
    ratios = [f"{found['times_sooner'][kind]:.2f}" for kind in ("median", "p99")]
    return [found["case"], found["backend"], str(found["neighbours"]), *times[0], ratios[0], *times[1], ratios[1]]


if __name__ == "__main__":
    main()
