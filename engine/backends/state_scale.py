"""The state at the scale that a network reads it in (skipstep.plans.parameterization), as part of its graph.

The scale follows from the time input alone, so what runs at every step is one multiplication.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipstep.networks.spec import NetworkSpec
from skipstep.plans.parameterization import FLOW_TIMESTEPS


class StateScale(nn.Module):
    """forward(sample [N, …], time float32 [N]) -> the sample times the scale of its level."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self._state, self._time, self._sigma_data = spec.state, spec.time_input, spec.sigma_data

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        scale = self.of(time.float()).to(sample.dtype)
        return sample * scale.reshape(-1, *[1] * (sample.ndim - 1))

    def of(self, time: Tensor) -> Tensor:
        """The scale `[N]`: sigma is noise/image, finite or not."""
        one = torch.ones_like(time)
        match self._time:
            case "sigma":
                image, noise = one, time
            case "c_noise":
                image, noise = one, torch.exp(4 * time)
            case "log_snr":
                image, noise = one, torch.exp(-time / 2)
            case "alpha_bar":
                image, noise = torch.sqrt(time), torch.sqrt(1 - time)
            case _:
                image, noise = 1 - time / FLOW_TIMESTEPS, time / FLOW_TIMESTEPS
        both = torch.sqrt(image * image + noise * noise)
        if self._state == "ve":
            return both / image
        if self._state == "edm":
            return both / torch.sqrt(noise * noise + (self._sigma_data or 0.0) ** 2 * image * image)
        return both / (image + noise)
