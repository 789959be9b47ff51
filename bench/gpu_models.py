"""The networks that a GPU is measured with: random weights in the shapes of published models, and one for dry runs.

Speed does not depend on the weights. Sizes go from bound by launches (32×32) to bound by arithmetic (256×256).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from diffusers import DDIMScheduler, UNet2DModel

from skipstep.bench.models import BenchModel, calmed, cifar10_model


def celeba64_model() -> BenchModel:
    """The DDIM paper's CelebA network: 3×64×64, channels 128/256/256/256/512, attention at 16×16."""
    return _random("celeba64-architecture", 64, (128, 256, 256, 256, 512), attention_level=2)


def celebahq256_model() -> BenchModel:
    """Ho et al.'s CelebA-HQ and LSUN network: 3×256×256, channels 128/128/256/256/512/512, attention at 16×16."""
    return _random("celebahq256-architecture", 256, (128, 128, 256, 256, 512, 512), attention_level=4)


def tiny_model() -> BenchModel:
    """1×8×8 and some twenty thousand parameters: every code path in milliseconds on a CPU."""
    return _random("tiny", 8, (8, 16), attention_level=1, channels=1, layers_per_block=1, groups=4, head_dim=8)


# By name, with the batch sizes that they are measured at.
GPU_MODELS: Mapping[str, tuple[Callable[[], BenchModel], tuple[int, ...]]] = {
    "cifar10-architecture": (cifar10_model, (1, 8, 64)),
    "celeba64-architecture": (celeba64_model, (1, 8)),
    "celebahq256-architecture": (celebahq256_model, (1,)),
}
DRY_RUN_MODELS: Mapping[str, tuple[Callable[[], BenchModel], tuple[int, ...]]] = {"tiny": (tiny_model, (1, 2))}


def _random(
    name: str,
    size: int,
    block_channels: tuple[int, ...],
    *,
    attention_level: int,
    channels: int = 3,
    layers_per_block: int = 2,
    groups: int = 32,
    head_dim: int | None = None,
) -> BenchModel:
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
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=True)
    return BenchModel(name, calmed(unet).eval(), scheduler, False)
