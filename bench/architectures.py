"""Networks to measure: the shapes of published models with random weights, and a tiny one for dry runs.

Speed does not depend on the weights. Sizes go from bound by launches (32×32) to bound by arithmetic (256×256).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

# A network and its scheduler, as diffusers saves them.
Architecture = tuple[Any, DDIMScheduler]


def cifar10() -> Architecture:
    """Ho et al.'s CIFAR-10 network, 35.7 M parameters: 3×32×32, channels 128/256/256/256, attention at 16×16."""
    return _unet(32, (128, 256, 256, 256), attention_level=1)


def celeba64() -> Architecture:
    """The DDIM paper's CelebA network: 3×64×64, channels 128/256/256/256/512, attention at 16×16."""
    return _unet(64, (128, 256, 256, 256, 512), attention_level=2)


def celebahq256() -> Architecture:
    """Ho et al.'s CelebA-HQ and LSUN network: 3×256×256, channels 128/128/256/256/512/512, attention at 16×16."""
    return _unet(256, (128, 128, 256, 256, 512, 512), attention_level=4)


def tiny() -> Architecture:
    """1×8×8 and some twenty thousand parameters: every code path in milliseconds on a CPU."""
    return _unet(8, (8, 16), attention_level=1, channels=1, layers_per_block=1, groups=4, head_dim=8)


def text() -> Architecture:
    """A small text-conditional UNet for 4×32×32 latents and prompts of 77×256."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 256),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=8,
    )
    return _calmed(unet), DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)


ARCHITECTURES: Mapping[str, Callable[[], Architecture]] = {
    "cifar10-architecture": cifar10,
    "celeba64-architecture": celeba64,
    "celebahq256-architecture": celebahq256,
    "text-architecture": text,
    "tiny-architecture": tiny,
}


def _unet(
    size: int,
    block_channels: tuple[int, ...],
    *,
    attention_level: int,
    channels: int = 3,
    layers_per_block: int = 2,
    groups: int = 32,
    head_dim: int | None = None,
) -> Architecture:
    torch.manual_seed(0)
    down = ["DownBlock2D"] * len(block_channels)
    up = ["UpBlock2D"] * len(block_channels)
    down[attention_level] = "AttnDownBlock2D"
    up[len(up) - 1 - attention_level] = "AttnUpBlock2D"
    unet = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=layers_per_block,
        block_out_channels=block_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        attention_head_dim=head_dim,
        norm_num_groups=groups,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    return _calmed(unet), DDIMScheduler(timestep_spacing="trailing", clip_sample=True)


def _calmed(unet: Any) -> Any:
    """The network with a last convolution near zero, as Ho et al. begin to train theirs.

    With random weights of full size a sampler is chaotic: clipping and 1/√ᾱ magnify the last bits of float32, after
    fifty steps into other images. Right samples could then not be told from wrong ones.
    """
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.01)
        unet.conv_out.bias.zero_()
    return unet.eval()
