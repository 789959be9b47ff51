"""diffusers' pipelines of random weights, small enough to be exported in seconds, saved as folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import numpy as np
import tolerances
import torch

# Of `compare`: relative to the largest value, by pipeline and kind of call.
ERRORS: dict[tuple[str, str], float] = {}
LENGTH = 12
_START, _END = "<|startoftext|>", "<|endoftext|>"
_PAIRS = (
    "t h",
    "th e</w>",
    "a n",
    "an d</w>",
    "c a",
    "ca t</w>",
    "r e",
    "re d</w>",
    "d o",
    "do g</w>",
    "e r</w>",
    "i n",
)


def write_vocabulary(folder: Path) -> None:
    """CLIP's files of a byte-pair encoding with a dozen merges."""
    import tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    units = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*units, *(f"{unit}</w>" for unit in units), *(pair.replace(" ", "") for pair in _PAIRS), _START, _END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(_PAIRS) + "\n")


def tokenizer(folder: Path, pad: str = _END) -> Any:
    import transformers

    write_vocabulary(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH, pad_token=pad)


def text_encoder(vocabulary: Any, *, projected: bool = False, width: int = 16) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
        projection_dim=16,
        hidden_act="gelu" if projected else "quick_gelu",
    )
    made = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)
    # A trained norm's outputs have a mean, which prompts with weights keep.
    (bias,) = (each for name, each in made.named_parameters() if name.endswith("final_layer_norm.bias"))
    bias.data += torch.linspace(-0.2, 0.8, width)
    return made


def unet(channels: int = 4, **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        }
        | options
    )


def autoencoder(**options: Any) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 4, "sample_size": 16, "latent_channels": 4}
    return diffusers.AutoencoderKL(in_channels=3, out_channels=3, **blocks, **sizes, **options)


def small_decoder(**options: Any) -> Any:
    """An AutoencoderTiny for the latents of `autoencoder`."""
    made = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    counts = {f"num_{part}_blocks": (1, 1) for part in ("encoder", "decoder")}
    return diffusers.AutoencoderTiny(**made, **counts, **options)


def scheduler(**options: Any) -> Any:
    return diffusers.DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
        | options
    )


def _stable_diffusion(where: Path, channels: int = 4) -> Any:
    """With 12 channels: no autoencoder, and squares of 2 by 2 pixels."""
    vocabulary = tokenizer(where / "words")
    parts = {
        "vae": None if channels == 12 else autoencoder(),
        "text_encoder": text_encoder(vocabulary),
        "tokenizer": vocabulary,
    }
    cls = diffusers.StableDiffusionInpaintPipeline if channels == 9 else diffusers.StableDiffusionPipeline
    return cls(
        unet=unet(channels, out_channels=12 if channels == 12 else 4),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


def _xl(where: Path) -> Any:
    first, second = tokenizer(where / "words"), tokenizer(where / "words2", pad="!")
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=False),
        text_encoder=text_encoder(first),
        text_encoder_2=text_encoder(second, projected=True, width=24),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet(cross_attention_dim=40, projection_class_embeddings_input_dim=16 + 48, **added),
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _lcm(where: Path) -> Any:
    vocabulary = tokenizer(where / "words")
    return diffusers.LatentConsistencyModelPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(vocabulary),
        tokenizer=vocabulary,
        unet=unet(time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _upscaler(where: Path) -> Any:
    """As k-diffusion's, whose blocks take groups of 32 channels and no fewer levels."""
    vocabulary, levels = tokenizer(where / "words"), 2
    network = unet(
        8,
        sample_size=16,
        out_channels=5,
        block_out_channels=(32, 64, 64),
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * levels),
        up_block_types=(*["KCrossAttnUpBlock2D"] * levels, "KUpBlock2D"),
        mid_block_type=None,
        attention_head_dim=8,
        norm_num_groups=None,
        act_fn="gelu",
        timestep_post_act="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_norm="layer_norm",
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        time_cond_proj_dim=128 + 16,
    )
    steps = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.StableDiffusionLatentUpscalePipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(vocabulary),
        tokenizer=vocabulary,
        unet=network,
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="sample", **steps),
    )


def _ldm(where: Path) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 4, "sample_size": 16, "latent_channels": 3}
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    vq = diffusers.VQModel(num_vq_embeddings=32, **blocks, **sizes)
    return diffusers.LDMPipeline(vqvae=vq, unet=network, scheduler=scheduler())


def controlnet() -> Any:
    made = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
    )
    for each in made.parameters():  # Its last layers are zeros until it is trained.
        if not each.any():
            torch.nn.init.normal_(each, std=0.2)
    return made


def _controlled(where: Path) -> Any:
    parts = _stable_diffusion(where).components
    nets = [controlnet(), controlnet()]
    return diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=nets, requires_safety_checker=False)


_MADE = {
    "control": _controlled,
    "sd": _stable_diffusion,
    "inpaint": lambda where: _stable_diffusion(where, 9),
    "pixels": lambda where: _stable_diffusion(where, 12),
    "xl": _xl,
    "lcm": _lcm,
    "ldm": _ldm,
    "upscaler": _upscaler,
}


@cache
def tiny_pipeline(name: str) -> tuple[Any, Path]:
    """The pipeline, quiet and in eval mode, and the folder that it was saved to."""
    where = Path(mkdtemp())
    torch.manual_seed(0)
    made = _MADE[name](where)
    folder = where / name
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made, folder


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def compare(found: Any, pipeline: Any, seeds: Sequence[int], steps: int = 20, **call: Any) -> None:
    """Latents with those that diffusers' pipeline draws; the largest error of each kind of call is kept in ERRORS."""
    call = {"num_inference_steps": steps, "output_type": "latent", "generator": generators(seeds), **call}
    expected = pipeline(**call).images.numpy()
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert error <= tolerances.PIPELINE_LATENTS
    channels = pipeline.unet.config.in_channels
    # Of an upscaler 8: latents, and the picture's beside them.
    row = type(pipeline).__name__ + ("" if channels in (4, 8) else f" of {channels} channels")
    negative = call.get("negative_prompt") or call.get("negative_prompt_embeds") is not None
    column = "negative prompt" if negative else "guided" if call.get("guidance_scale", 1.0) > 1.0 else "not guided"
    ERRORS[row, column] = max(error, ERRORS.get((row, column), 0.0))


def embedded(pipeline: Any, pieces: list[tuple[str, float]], chunks: int) -> torch.Tensor:
    """By transformers alone: tokens in chunks between start and end, times their weights, each chunk's mean kept."""
    words, encoder = pipeline.tokenizer, pipeline.text_encoder
    tokens = [(i, w) for text, w in pieces for i in words(text, add_special_tokens=False).input_ids]
    made = []
    for k in range(chunks):
        own = tokens[k * (LENGTH - 2) : (k + 1) * (LENGTH - 2)]
        rest = LENGTH - 1 - len(own)
        ids = [words.bos_token_id, *(i for i, _ in own), words.eos_token_id, *[words.pad_token_id] * (rest - 1)]
        weights = torch.tensor([1.0, *(w for _, w in own), *[1.0] * rest])
        with torch.no_grad():
            plain = encoder(torch.tensor([ids])).last_hidden_state
        weighed = plain * weights[None, :, None]
        made.append(weighed * (plain.mean() / weighed.mean()))
    return torch.cat(made, dim=1)
