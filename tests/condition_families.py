"""Networks of diffusers of all families, with all kinds of conditions, and how their own pipelines call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    Transformer2DModel,
    UNet1DModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection, get_timestep_embedding
from tiny_networks import tiny_text_unet, tiny_unet
from torch import Tensor, nn

from skipstep import Condition, NoiseSchedule, Plan
from skipstep.networks.graphs import Binding

SCHEDULE = NoiseSchedule.scaled_linear()
PLAN = Plan(schedule=SCHEDULE, steps=4, convention="paper", spacing="leading", clip=None)
PROMPT, LATENTS, SCALE = (7, 24), (4, 8, 8), 2.5
RNG = np.random.default_rng(0)


def rows(*shape: int, count: int = 2) -> np.ndarray:
    return RNG.standard_normal((count, *shape), dtype=np.float32)


@dataclass(frozen=True)
class Family:
    """A network, the options that complete its configuration, what a call passes, and how its own loop calls it.

    `given` and `without` have a row for each of two samples: with the conditions, and of the unconditional half, where
    a number is the null that the engine fills in itself.
    `from_file`: the engine is built from an .onnx file of the network.
    `told`: the names of conditions that the configuration told; `hoisted`: whose values cross into the loop.
    """

    network: Callable[[], nn.Module]
    call: Callable[..., Any]
    given: dict[str, Any]
    without: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    plan: Plan = PLAN
    from_file: bool = False
    shape: tuple[int, ...] = LATENTS
    from_guidance: bool = False
    hoisted: Binding = Binding.PROMPT

    @property
    def passed(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """conditions=, negative_conditions=: what guidance cannot find itself."""
        return self.given, {name: rows for name, rows in self.without.items() if not isinstance(rows, int)}


def controlnet_residuals() -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    control = ControlNetModel(
        in_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 16),
    ).eval()
    for parameter in control.parameters():  # Its output layers begin at zero.
        nn.init.normal_(parameter, std=0.05)
    state, hint = torch.from_numpy(rows(*LATENTS)), torch.from_numpy(rows(3, 16, 16))
    with torch.inference_mode():
        down, mid = control(state, 500, torch.from_numpy(rows(*PROMPT)), hint, return_dict=False)
    found = {f"down_block_additional_residuals_{i}": each.numpy() for i, each in enumerate(down)}
    return {**found, "mid_block_additional_residual": mid.numpy()}


def ip_adapter() -> nn.Module:
    unet: Any = tiny_text_unet()
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(12, 24, num_image_text_embeds=3)])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    processors = dict(unet.attn_processors)
    for name in processors:
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            processors[name] = IPAdapterAttnProcessor2_0(hidden, cross_attention_dim=24, num_tokens=(3,))
    unet.set_attn_processor(processors)
    return unet.eval()


def sequence() -> nn.Module:
    torch.manual_seed(0)
    return UNet1DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
        extra_in_channels=64,
    ).eval()


def transformer(kind: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    network = kind(**sizes, num_attention_heads=2, attention_head_dim=12, **options)
    for name, parameter in network.named_parameters():  # At their own scale the image hardly depends on conditions.
        if "norm1" in name or "caption" in name:
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def guidance_embedding(scale: float, count: int) -> Tensor:
    """As the pipelines of consistency models have it: sines before cosines, 1000·(scale - 1)."""
    return get_timestep_embedding(torch.full((count,), 1000 * (scale - 1)), 16, downscale_freq_shift=1)


RESIDUALS = controlnet_residuals()
PROMPTS = {"encoder_hidden_states": rows(*PROMPT)}
NEGATIVE = {"encoder_hidden_states": rows(*PROMPT)}
TEXT = {"prompt_shape": PROMPT}
MASK = np.arange(7) < np.array([[3], [6]])
FAMILIES = {
    "SDXL": Family(
        lambda: tiny_text_unet(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=68
        ),
        lambda unet, x, t, p, text_embeds, time_ids: unet(
            x, t, p, added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids}
        ),
        {**PROMPTS, "text_embeds": rows(20), "time_ids": np.float32([[8, 8, 0, 0, 8, 8], [8, 8, 2, 1, 8, 8]])},
        {**NEGATIVE, "text_embeds": rows(20)},
        TEXT,
        ("text_embeds", "time_ids"),
        hoisted=Binding.CALL,
    ),
    "LCM": Family(
        lambda: tiny_text_unet(time_cond_proj_dim=16),
        lambda unet, x, t, p: unet(x, t, p, timestep_cond=guidance_embedding(SCALE, len(x))),
        PROMPTS,
        {},
        TEXT,
        ("timestep_cond",),
        from_guidance=True,
        hoisted=Binding.CALL,
    ),
    "inpainting": Family(
        lambda: tiny_text_unet(in_channels=9),
        lambda unet, x, t, p, mask, masked_image: unet(torch.cat([x, mask, masked_image], 1), t, p),
        {**PROMPTS, "mask": (rows(1, 8, 8) > 0).astype(np.float32), "masked_image": rows(4, 8, 8)},
        NEGATIVE,
        {
            **TEXT,
            "conditions": {
                "mask": Condition((1, 8, 8), null="same", concat_to_state=True),
                "masked_image": Condition((4, 8, 8), null="same", concat_to_state=True),
            },
        },
    ),
    "super-resolution": Family(
        lambda: tiny_text_unet(in_channels=7, num_class_embeds=50),
        lambda unet, x, t, p, class_labels, image: unet(torch.cat([x, image], 1), t, p, class_labels),
        {**PROMPTS, "class_labels": np.array([20, 3]), "image": rows(3, 8, 8)},
        NEGATIVE,
        {**TEXT, "conditions": {"image": Condition((3, 8, 8), null="same", concat_to_state=True)}},
        hoisted=Binding.CALL,
    ),
    "ControlNet": Family(
        tiny_text_unet,
        lambda unet, x, t, p, *residuals: unet(
            x, t, p, down_block_additional_residuals=residuals[:-1], mid_block_additional_residual=residuals[-1]
        ),
        {**PROMPTS, **RESIDUALS},
        {**NEGATIVE, **{name: np.zeros_like(each) for name, each in RESIDUALS.items()}},
        {**TEXT, "conditions": {name: Condition(each.shape[1:]) for name, each in RESIDUALS.items()}},
    ),
    "attention mask": Family(
        tiny_text_unet,
        lambda unet, x, t, p, encoder_attention_mask: unet(x, t, p, encoder_attention_mask=encoder_attention_mask),
        {**PROMPTS, "encoder_attention_mask": MASK},
        {**NEGATIVE, "encoder_attention_mask": ~MASK},
        {**TEXT, "conditions": {"encoder_attention_mask": Condition((7,), "bool")}},
    ),
    "IP-Adapter": Family(
        ip_adapter,
        lambda unet, x, t, p, image_embeds_0: unet(x, t, p, added_cond_kwargs={"image_embeds": [image_embeds_0]}),
        {**PROMPTS, "image_embeds_0": rows(1, 12)},
        {**NEGATIVE, "image_embeds_0": 0},
        TEXT,
        ("image_embeds_0",),
    ),
    "number labels": Family(
        lambda: tiny_text_unet(class_embed_type="projection", projection_class_embeddings_input_dim=10),
        lambda unet, x, t, p, class_labels: unet(x, t, p, class_labels),
        {**PROMPTS, "class_labels": rows(10)},
        {**NEGATIVE, "class_labels": rows(10)},
        TEXT,
        ("class_labels",),
        hoisted=Binding.CALL,
    ),
    "DiT": Family(
        lambda: transformer(DiTTransformer2DModel, num_embeds_ada_norm=10),
        lambda dit, x, t, class_labels: dit(x, t, class_labels),
        {"class_labels": np.array([3, 7])},
        {"class_labels": 10},
        hoisted=Binding.CALL,
    ),
    "Transformer2DModel": Family(
        lambda: transformer(
            Transformer2DModel, num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False
        ),
        lambda dit, x, t, class_labels: dit(x, timestep=t, class_labels=class_labels),
        {"class_labels": np.array([3, 7])},
        {"class_labels": 10},
        hoisted=Binding.CALL,
    ),
    "PixArt": Family(
        lambda: transformer(
            PixArtTransformer2DModel, cross_attention_dim=24, caption_channels=24, use_additional_conditions=True
        ),
        lambda dit, x, t, p, resolution, aspect_ratio, mask: dit(
            x, p, t, {"resolution": resolution, "aspect_ratio": aspect_ratio}, encoder_attention_mask=mask
        ),
        {
            **PROMPTS,
            "resolution": np.float32([[64, 64], [64, 32]]),
            "aspect_ratio": np.float32([[1], [2]]),
            "encoder_attention_mask": MASK,
        },
        {**NEGATIVE, "encoder_attention_mask": ~MASK},
        {**TEXT, "conditions": {"encoder_attention_mask": Condition((7,), "bool")}},
        ("resolution", "aspect_ratio"),
        hoisted=Binding.CALL,
    ),
    "sequence": Family(sequence, lambda unet, x, t: unet(x, t), {}, shape=(3, 32), hoisted=Binding.PLAN),
}
SIGMA_DATA = 0.7
EDM = Plan(
    schedule=NoiseSchedule.karras(4),
    steps=4,
    prediction_type="edm",
    time_input="c_noise",
    sigma_data=SIGMA_DATA,
    clip=None,
)
FLOW = Plan(
    schedule=NoiseSchedule.flow(),
    steps=4,
    convention="paper",
    spacing="leading",
    prediction_type="flow",
    time_input="flow",
    clip=None,
)
prompted = partial(
    Family, tiny_text_unet, lambda unet, x, t, p: unet(x, t, p), PROMPTS, NEGATIVE, hoisted=Binding.PROMPT
)
# Those that other tests sample, too.
PLAIN = {
    "UNet2DModel": Family(
        lambda: tiny_unet(num_class_embeds=4),
        lambda unet, x, t, class_labels: unet(x, t, class_labels),
        {"class_labels": np.array([0, 2])},
        {"class_labels": 3},
        {"null_label": 3},
        shape=(1, 8, 8),
    ),
    "UNet2DConditionModel": prompted(TEXT),
    "an .onnx file": prompted(TEXT, from_file=True),
    "EDM": prompted({**TEXT, "time_input": "c_noise", "state": "edm", "sigma_data": SIGMA_DATA}, plan=EDM),
    "flow matching": prompted({**TEXT, "time_input": "flow", "state": "flow"}, plan=FLOW),
}
ALL = FAMILIES | PLAIN
GUIDED = [name for name, family in FAMILIES.items() if family.given]
X_T = {name: rows(*family.shape) for name, family in ALL.items()}
