"""Small networks for tests: a trained-looking UNet that is fast to build, and modules with one odd behaviour each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def tiny_unet(**options: Any) -> nn.Module:
    """A diffusers UNet of 0.1 M parameters for 1×8×8, with the same random weights every time."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet: nn.Module = UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            **options,
        }
    )
    return unet.eval()


class Labelled(nn.Module):
    """Predicts from the sample, the timestep and the label in closed form, so that a test can say what comes out."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 0.1 * x + (labels.to(x.dtype) / 10 + t.to(x.dtype) / 1000).view(-1, 1, 1, 1)


class Curve(nn.Module):
    """A smooth, bounded prediction that depends on x, t and position, and drives x0 beyond the clip."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t.to(x.dtype).view(-1, 1, 1, 1) / 1000
        place = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.tanh(0.8 * x + phase) + 0.3 * torch.sin(5 * place + 3 * phase)
