"""Small networks for tests: a trained-looking UNet that is fast to build, and modules with one odd behaviour each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def tiny_unet(**options: Any) -> nn.Module:
    """A diffusers UNet of 0.1 M parameters for 1×8×8, with the same random weights every time."""
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    sizes = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    return _unet("UNet2DModel", **{**sizes, **blocks, **options})


def tiny_text_unet(**options: Any) -> nn.Module:
    """A UNet2DConditionModel of 0.1 M parameters for 4×8×8, the same way."""
    sizes = {"in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "cross_attention_dim": 24}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return _unet("UNet2DConditionModel", **{**sizes, **blocks, **options})


def _unet(kind: str, **options: Any) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    common = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    unet: nn.Module = getattr(diffusers, kind)(**{**common, **options})
    return unet.eval()


class Small(nn.Module):
    """Two convolutions, with what follows from the timestep and the label between them; quick to load many times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.label, self.mix = nn.Embedding(4, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angles = t.to(x.dtype)[:, None] / 1000 * torch.arange(1, 9, dtype=x.dtype)
        told = self.mix(torch.sin(angles) + self.label(labels))
        hidden = nn.functional.silu(self.norm(self.first(x)) + told[:, :, None, None])
        return self.last(hidden) + x


class Labelled(nn.Module):
    """Predicts from the sample, the timestep and the label in closed form, so that a test can say what comes out.

    Multiplies by constants: torch divides by a scalar with its reciprocal on CUDA, and the bits would differ by device.
    """

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 0.1 * x + (labels.to(x.dtype) * 0.1 + t.to(x.dtype) * 0.001).view(-1, *[1] * (x.ndim - 1))


class Curve(nn.Module):
    """A smooth, bounded prediction that depends on x, t and position, and drives x0 beyond the clip."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t.to(x.dtype).view(-1, 1, 1, 1) * 0.001
        place = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.tanh(0.8 * x + phase) + 0.3 * torch.sin(5 * place + 3 * phase)


class GaussianEps(nn.Module):
    """The exact noise prediction for data N(mean, deviation²), with alpha_bar found from t as a plan finds t."""

    def __init__(self, alpha_bar: Any, *, mean: float = 0.3, deviation: float = 0.7) -> None:
        super().__init__()
        self._mean, self._deviation = mean, deviation
        level = torch.tensor(alpha_bar, dtype=torch.float64)
        self._log_snr = torch.log(level) - torch.log1p(-level)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        below = t.double().floor().long().clamp(0, len(self._log_snr) - 2)
        weight = t.double() - below
        log_snr = (1 - weight) * self._log_snr[below] + weight * self._log_snr[below + 1]
        a = torch.sigmoid(log_snr).view(-1, 1, 1, 1)
        v = a * self._deviation**2 + 1 - a
        return ((1 - a).sqrt() * (x - a.sqrt() * self._mean) / v).to(x.dtype)


class LearnedVariance(nn.Module):
    """Predicts the noise as `Curve` does, and between which variances the step's lies: a ramp from -1 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.curve = Curve()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.cat([self.curve(x, t), ramp.expand_as(x)], dim=1)


class Wide(nn.Module):
    """Takes the timestep's mean over the batch: a number that no row of a batch has for itself."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * (1.0 + t.to(x.dtype).mean() / 1000)


class Timeless(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)


class Running(nn.Module):
    """Mixes the rows of a batch without a trace in any shape."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + t.to(x.dtype).cumsum(0).view(-1, 1, 1, 1) / 1000


class Blind(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros(1, 4, 4) + t.to(torch.float32).view(-1, 1, 1, 1)
