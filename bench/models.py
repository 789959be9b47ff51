"""The networks that benchmarks run: the shipped one, and two architectures with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from skipstep.checkpoint import load_unet, read_checkpoint
from skipstep.demo import SHIPPED_MODEL


class FixedLabelUNet(UNet2DModel):  # type: ignore[misc]
    """A class-conditional UNet2DModel as unconditional callers know it: `labels` are those of every call."""

    labels: torch.Tensor

    def forward(self, sample, timestep, class_labels=None, return_dict=True):  # type: ignore[no-untyped-def]
        # diffusers' DDIMPipeline has no argument for labels.
        return super().forward(sample, timestep, self.labels if class_labels is None else class_labels, return_dict)


@dataclass(frozen=True)
class BenchModel:
    """A network, its scheduler, whether it takes labels, and the prompts that it takes."""

    name: str
    unet: UNet2DModel | UNet2DConditionModel
    scheduler: DDIMScheduler
    conditional: bool
    prompt_shape: tuple[int, int] | None = None


def shipped_model() -> BenchModel:
    """The Fashion-MNIST model that the package carries: 2.5 M parameters, 1×28×28."""
    checkpoint = read_checkpoint(SHIPPED_MODEL)
    unet = FixedLabelUNet.from_config(dict(checkpoint.unet_config))
    unet.load_state_dict(load_unet(checkpoint).state_dict())
    return BenchModel(
        "fashion-mnist", unet.eval(), DDIMScheduler.from_pretrained(SHIPPED_MODEL, subfolder="scheduler"), True
    )


def cifar10_model() -> BenchModel:
    """The architecture of Ho et al.'s CIFAR-10 model, 35.7 M parameters, 3×32×32, random weights.

    Channels 128/256/256/256, two blocks a level, attention at 16×16. Speed does not depend on the weights.
    """
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=True)
    return BenchModel("cifar10-architecture", unet.eval(), scheduler, False)


def text_model() -> BenchModel:
    """A small text-conditional UNet for 4×32×32 latents and prompts of 77×256, random weights."""
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
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    return BenchModel("text-architecture", unet.eval(), scheduler, False, prompt_shape=(77, 256))


MODELS = {"fashion-mnist": shipped_model, "cifar10-architecture": cifar10_model}
ALL_MODELS = {**MODELS, "text-architecture": text_model}
