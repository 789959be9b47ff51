"""A policy of the form of LeRobot's DiffusionPolicy, small: FiLM-conditioned 1-D network, encoder, scheduler, queues.

Its loop is a statement of what that class does, on diffusers' schedulers: the tests compare the engine with it. The
class itself is compared in tests/robotics/test_lerobot.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STATE, IMAGES, ENVIRONMENT = "observation.state", "observation.images", "observation.environment_state"
CAMERAS = ("observation.images.front", "observation.images.wrist")


@dataclass
class Shape:
    shape: tuple[int, ...]


@dataclass
class Config:
    horizon: int = 8
    n_obs_steps: int = 2
    n_action_steps: int = 4
    robot_state_feature: Shape = field(default_factory=lambda: Shape((3,)))
    image_features: dict[str, Shape] = field(default_factory=lambda: {name: Shape((3, 8, 8)) for name in CAMERAS})
    env_state_feature: Shape | None = None
    action_feature: Shape = field(default_factory=lambda: Shape((2,)))
    normalization_mapping: dict[str, str] = field(
        default_factory=lambda: {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"}
    )


class FilmNetwork(nn.Module):
    """(x [B, T, A], timestep [B], global_cond [B, D]) -> [B, T, A].

    Its prediction stays close to x, as that of noise is: chunks do not all end at the bounds of clipping.
    """

    def __init__(self, actions: int, width: int, channels: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", 0.3 ** torch.arange(4.0))
        self.time = nn.Sequential(nn.Linear(8, 8), nn.Mish())
        self.film = nn.Linear(8 + width, 2 * channels)
        self.inner = nn.Conv1d(actions, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.outer = nn.Conv1d(channels, actions, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, global_cond: Tensor | None = None) -> Tensor:
        assert global_cond is not None
        angles = timestep.unsqueeze(-1) * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        scale, shift = self.film(torch.cat([time, global_cond], dim=-1)).unsqueeze(-1).chunk(2, dim=1)
        inner = self.norm(self.inner(x.transpose(1, 2)))
        out: Tensor = self.outer(nn.functional.mish(scale * inner + shift)).transpose(1, 2)
        return x + 0.2 * out


class TinyDiffusion(nn.Module):
    def __init__(self, config: Config, scheduler: Any, num_inference_steps: int) -> None:
        super().__init__()
        self.config, self.noise_scheduler, self.num_inference_steps = config, scheduler, num_inference_steps
        width = config.robot_state_feature.shape[0] + 6 * len(config.image_features)
        width += 0 if config.env_state_feature is None else config.env_state_feature.shape[0]
        self.rgb_encoder = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6))
        self.unet = FilmNetwork(config.action_feature.shape[0], width * config.n_obs_steps)

    def _prepare_global_conditioning(self, batch: dict[str, Tensor]) -> Tensor:
        features = [batch[STATE]]
        if self.config.image_features:
            images = batch[IMAGES]
            encoded = self.rgb_encoder(images.flatten(0, 2))
            features.append(encoded.reshape(images.shape[0], images.shape[1], -1))
        if self.config.env_state_feature is not None:
            features.append(batch[ENVIRONMENT])
        return torch.cat(features, dim=-1).flatten(start_dim=1)

    def generate_actions(self, batch: dict[str, Tensor], noise: Tensor) -> Tensor:
        condition = self._prepare_global_conditioning(batch)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        sample = noise
        for t in self.noise_scheduler.timesteps:
            predicted = self.unet(sample, torch.full(sample.shape[:1], int(t)), global_cond=condition)
            sample = self.noise_scheduler.step(predicted, t, sample).prev_sample
        start = self.config.n_obs_steps - 1
        return sample[:, start : start + self.config.n_action_steps]


class TinyPolicy(nn.Module):
    """`select_action` takes one moment of every observation as a batch of one, normalised, and gives [1, A]."""

    def __init__(self, scheduler: str = "DDIM", steps: int = 10, config: Config | None = None, **options: Any) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler

        super().__init__()
        torch.manual_seed(0)
        made = {"DDIM": DDIMScheduler, "DDPM": DDPMScheduler}[scheduler](
            **{"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", **options}
        )
        self.config = config or Config()
        self.diffusion = TinyDiffusion(self.config, made, steps)
        self.reset()
        self.eval()

    def reset(self) -> None:
        self._observations: deque[dict[str, Tensor]] = deque(maxlen=self.config.n_obs_steps)
        self._actions: deque[Tensor] = deque(maxlen=self.config.n_action_steps)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor) -> Tensor:
        if not self._observations:
            self._observations.extend([batch] * self.config.n_obs_steps)
        else:
            self._observations.append(batch)
        if not self._actions:
            self._actions.extend(self.diffusion.generate_actions(self.stacked(), noise).transpose(0, 1))
        return self._actions.popleft()

    def stacked(self) -> dict[str, Tensor]:
        return batch_of({name: torch.stack([each[name] for each in self._observations], 1) for name in
                         self._observations[0]}, self.config)  # fmt: skip


def batch_of(observations: dict[str, Any], config: Config) -> dict[str, Tensor]:
    """Observations [B, n_obs_steps, …] by name as LeRobot's generate_actions takes them: cameras in one array."""
    batch = {name: torch.as_tensor(value) for name, value in observations.items()}
    cameras = [batch.pop(name) for name in config.image_features]
    return {**batch, IMAGES: torch.stack(cameras, 2)} if cameras else batch


def random_observations(config: Any, rng: np.random.Generator, *lead: int) -> dict[str, np.ndarray[Any, Any]]:
    """Observations in [0, 1) by name: `[*lead, *shape]`."""
    shapes = {STATE: config.robot_state_feature.shape}
    shapes |= {name: each.shape for name, each in config.image_features.items()}
    if config.env_state_feature:
        shapes[ENVIRONMENT] = config.env_state_feature.shape
    return {name: rng.random((*lead, *shape), np.float32) for name, shape in shapes.items()}


def step_noise(monkeypatch: Any, seeds: list[int], steps: int, shape: tuple[int, ...]) -> None:
    """Have diffusers' DDPMScheduler add the noise that the engine draws for these seeds, step by step, chunk by chunk.

    `seeds` are those of the chunks that follow; of `steps` steps the last adds none.
    """
    from diffusers.schedulers import scheduling_ddpm

    from skipstep.calls.noise import StageNoise

    size = int(np.prod(shape))
    drawn = iter(
        [
            StageNoise(np.array([seed], np.uint64), size, steps)(stage).copy()
            for seed in seeds
            for stage in range(steps - 1)
        ]
    )
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda *_, **__: torch.from_numpy(next(drawn).reshape(1, *shape))
    )
