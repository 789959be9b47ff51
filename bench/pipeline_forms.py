"""The forms of a Stable Diffusion pipeline that skipstep.bench.pipeline_latency runs. ADD A FORM HERE, in `FORMS`: how
its folder is made, beside those before it, for pictures of so many pixels a side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from skipstep import Engine
from skipstep.bench.large_network import PROMPT, sd15_sized

STEPS: Final = (2, 4)
_SCHEDULE: Final = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_OFFSET: Final = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
_START, _END = "<|startoftext|>", "<|endoftext|>"
# Of the autoencoder's levels.
_WIDTHS: Final = (128, 256, 512, 512)


def make_diffusers(folder: Path, side: int, model: Path | None) -> None:
    """`model`, else random weights of Stable Diffusion 1.5's size in half precision, as they are distributed. Of CLIP's
    tokens only those of single letters have a name."""
    if model is not None:
        shutil.copytree(model, folder)
        return
    import diffusers
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), _START, _END]
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    tokens, width = PROMPT
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 12, "num_attention_heads": 12}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = transformers.CLIPTextConfig(vocab_size=49408, max_position_embeddings=tokens, **sizes, **ends)
    down, up = ("DownEncoderBlock2D",) * len(_WIDTHS), ("UpDecoderBlock2D",) * len(_WIDTHS)
    kinds = {"down_block_types": down, "up_block_types": up, "block_out_channels": _WIDTHS, "layers_per_block": 2}
    words_of = {"model_max_length": tokens, "pad_token": _END}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**kinds),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words", **words_of),
        unet=sd15_sized(side // 2 ** (len(_WIDTHS) - 1)),
        scheduler=diffusers.DDIMScheduler(**_SCHEDULE, **_OFFSET),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def make_bundle(folder: Path, side: int, model: Path | None) -> None:
    source, size = str(folder.with_name("diffusers")), {"height": side, "width": side}
    built: dict[str, Any] = {"backend": "onnxruntime", "device": "cpu", "batch_sizes": [1], **size}
    with Engine.build(source, plans=list(STEPS), compatibility="diffusers", **built) as engine:
        engine.save(folder, license="for measuring alone")


class _FirstOutput(nn.Module):
    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *given: Tensor) -> Any:
        return getattr(self.module, self.method)(*given, return_dict=False)[0]


def make_openvino(folder: Path, side: int, model: Path | None) -> None:
    """As openvino_genai reads it, and Optimum writes it: the parts, with their inputs by these names, configurations
    and weights in half precision."""
    import diffusers
    import openvino
    import openvino_tokenizers

    source = folder.with_name("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
    text, latent = pipeline.text_encoder.config, side // pipeline.vae_scale_factor
    ids = torch.zeros(1, text.max_position_embeddings, dtype=torch.int64)
    state, prompt = torch.zeros(1, 4, latent, latent), torch.zeros(*ids.shape, text.hidden_size)
    step = {"sample": state, "timestep": torch.ones(1, dtype=torch.int64), "encoder_hidden_states": prompt}
    for name, part, method, inputs, output in (
        ("text_encoder", "text_encoder", "forward", {"input_ids": ids}, "last_hidden_state"),
        ("unet", "unet", "forward", step, "out_sample"),
        ("vae_decoder", "vae", "decode", {"latent_sample": state}, "sample"),
    ):
        module = _FirstOutput(getattr(pipeline, part).eval(), method)
        with torch.no_grad():
            made = openvino.convert_model(module, example_input=tuple(inputs.values()))
        for port, title in [*zip(made.inputs, inputs, strict=True), (made.outputs[0], output)]:
            port.get_tensor().set_names({title})
        openvino.save_model(made, folder / name / "openvino_model.xml", compress_to_fp16=True)
        shutil.copy(source / part / "config.json", folder / name)
    words = openvino_tokenizers.convert_tokenizer(pipeline.tokenizer)
    openvino.save_model(words, folder / "tokenizer" / "openvino_tokenizer.xml")
    shutil.copytree(source / "scheduler", folder / "scheduler")
    shutil.copy(source / "model_index.json", folder)


FORMS: Final = {"diffusers": make_diffusers, "bundle": make_bundle, "openvino": make_openvino}
