"""Run with lerobot on the path: compares LeRobot's own DiffusionPolicy with engines that are made of it.

python lerobot_checks.py FOLDER      prints one JSON object: the largest differences, by what was compared
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import step_noise

from skipstep.bench.policy_latency import batch_of, import_lerobot, make_policy, random_observations
from skipstep.robotics import PolicyRunner, from_policy, load_policy

SMALL: dict[str, Any] = {"down_dims": (16, 32), "n_groups": 4, "diffusion_step_embed_dim": 16, "side": 32}
SHAPE = (16, 2)
FORMS: dict[str, dict[str, Any]] = {
    "DDIM-10, two cameras, cropped": {"cameras": 2, "crop_shape": (24, 24)},
    "DDPM-100, an encoder for each camera": {"cameras": 2, "use_separate_rgb_encoder_per_camera": True},
    "DDIM-10, environment state, no scale": {"cameras": 0, "use_film_scale_modulation": False},
    "DDPM-100, predicts the sample, resized": {"resize_shape": (24, 24), "prediction_type": "sample"},
}


def chunk_difference(name: str, options: dict[str, Any], patch: pytest.MonkeyPatch) -> tuple[float, float]:
    """The largest difference of a chunk, and the share of its values that clipping did not decide."""
    scheduler, steps = name[:4], int(name[5:].split(",")[0])
    theirs, rng = make_policy(scheduler, steps, **{**SMALL, **options}), np.random.default_rng(0)
    steady(theirs)
    with from_policy(theirs, device="cpu", backend="onnxruntime", num_threads=1) as ours:
        observations, noise = random_observations(ours, rng), rng.standard_normal((1, *SHAPE), np.float32)
        step_noise(patch, [3], steps, SHAPE)
        with torch.no_grad():
            batch = batch_of(observations, theirs.config)
            expected = theirs.diffusion.generate_actions(batch, noise=torch.from_numpy(noise)).numpy()
        found = ours.predict(observations, seeds=[3], x_T=noise, steps=steps)
    return float(np.abs(found - expected).max()), float(np.mean(np.abs(expected) < 0.99))


def steady(policy: Any) -> None:
    """Random weights predict noise that is not there, and every value ends at a bound; this adds x to what they say."""
    unet, predicts_noise = policy.diffusion.unet, policy.config.prediction_type == "epsilon"
    if predicts_noise:
        forward = unet.forward

        def closer(x: Any, timestep: Any, global_cond: Any = None) -> Any:
            return x + 0.2 * forward(x, timestep, global_cond)

        unet.forward = closer


def rollout_difference(folder: Path) -> float:
    """Twenty actions of a policy that was saved by LeRobot, with its pre- and postprocessor, and of our runner on the
    folder that was saved here: the largest difference as a share of an action's range."""
    theirs = make_policy("DDIM", 10, cameras=1, **SMALL)
    rng = np.random.default_rng(1)
    width = np.array([4.0, 300.0], np.float32)
    tensors = {
        "observation.state": {"min": [-1.0, 0.0, 2.0], "max": [1.0, 4.0, 3.0]},
        "observation.images.0": {"mean": [[[0.4]], [[0.5]], [[0.6]]], "std": [[[0.2]], [[0.3]], [[0.4]]]},
        "action": {"min": [-2.0, 0.0], "max": [2.0, 300.0]},
    }
    statistics = {name: {key: torch.tensor(each) for key, each in own.items()} for name, own in tensors.items()}
    make = import_lerobot("policies.diffusion.processor_diffusion").make_diffusion_pre_post_processors
    before, after = make(theirs.config, statistics)
    theirs.save_pretrained(folder / "lerobot")
    before.save_pretrained(folder / "lerobot")
    with from_policy(folder / "lerobot", device="cpu", backend="onnxruntime", num_threads=1) as made:
        made.save(folder / "ours", license="none")
    worst = 0.0
    with load_policy(folder / "ours", num_threads=1) as ours:
        runner = PolicyRunner(ours)
        for _ in range(20):
            observation = {each.name: rng.random(each.shape, np.float32) for each in ours.spec.observations}
            noise = rng.standard_normal(SHAPE, np.float32)
            found = runner.select_action(observation, x_T=noise)
            batch = before({name: torch.from_numpy(array) for name, array in observation.items()})
            expected = after(theirs.select_action(batch, noise=torch.from_numpy(noise)[None]))[0].numpy()
            worst = max(worst, float((np.abs(found - expected) / width).max()))
    return worst


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"forms": {}}
    with pytest.MonkeyPatch.context() as patch:
        for name, options in FORMS.items():
            found["forms"][name] = chunk_difference(name, options, patch)
    found["rollout"] = rollout_difference(Path(sys.argv[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
