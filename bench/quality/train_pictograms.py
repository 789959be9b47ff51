"""Train a model that draws 32x32 pictograms from their names: `python -m skipstep.bench.quality.train_pictograms`.

A text encoder of 0.5 M parameters (word pieces of the names, two layers, as CLIP's) and a UNet of 4.8 M that reads it
by cross-attention learn together, with the same loss as train_unet.py has (v-prediction); a tenth of the prompts is the
empty one, for guidance. The network sees 2x2 pixels as one of twelve channels and reads the prompt at 8x8 and 4x4: a
step takes less than half the time of one at full resolution with attention at 16x16. What is written is a diffusers
folder without an autoencoder, which `skipstep.Engine.build` takes. Pictures are not augmented: names tell left from
right and sizes apart.

Interrupt and repeat the command to go on.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from skipstep.bench.quality.pictograms import DEFAULT_FILE, SIDE, load_pictograms
from skipstep.bench.quality.train_unet import Task, add_options, fit
from skipstep.pipelines.prompts import plain_sections
from skipstep.pipelines.spec import TextSpec
from skipstep.pipelines.tokenizer import PromptTokenizer

PATCH: Final = 2
WIDTHS: Final = (64, 96, 112)
_LENGTH, _WIDTH, _WORDS = 16, 128, 1600
_START, _END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(names: Sequence[str], num_words: int = _WORDS) -> Tokenizer:
    """CLIP's kind of byte-pair encoding, of the names' own word pieces."""
    made = Tokenizer(models.BPE(unk_token=_END, end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.train_from_iterator(
        names,
        trainers.BpeTrainer(
            vocab_size=num_words,
            special_tokens=[_START, _END],
            end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    start, end = ((token, made.get_vocab()[token]) for token in (_START, _END))
    made.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return made


class PromptNetwork(nn.Module):
    """Text encoder and UNet as one network of (x_t, t, the number of a prompt in `tokens`)."""

    def __init__(self, tokens: Tensor, vocabulary: int, end: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens, persistent=False)
        self.text_encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=_WIDTH,
                intermediate_size=2 * _WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=_LENGTH,
                bos_token_id=0,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=SIDE // PATCH,
            in_channels=3 * PATCH**2,
            out_channels=3 * PATCH**2,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (len(widths) - 1)),
            up_block_types=(*("CrossAttnUpBlock2D",) * (len(widths) - 1), "UpBlock2D"),
            cross_attention_dim=_WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        embeds = self.text_encoder(self.get_buffer("tokens")[label]).last_hidden_state
        predicted: Tensor = self.unet(x_t, t, encoder_hidden_states=embeds).sample
        return predicted


def make_scheduler() -> DDIMScheduler:
    """The cosine schedule: of so small a picture the linear one leaves little at half of its timesteps."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def write_folder(network: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """A pipeline's folder as diffusers writes it, in float16, with no `vae`."""
    half: Any = copy.deepcopy(network).half()
    half.unet.save_pretrained(folder / "unet")
    half.text_encoder.save_pretrained(folder / "text_encoder")
    make_scheduler().save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    tokens = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": _LENGTH, **tokens}
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    for path, contents in (("tokenizer/tokenizer_config.json", config), ("model_index.json", index)):
        (folder / path).write_text(json.dumps(contents, indent=2) + "\n")


def make_task(data: Path, widths: tuple[int, ...] = WIDTHS) -> Task:
    found = load_pictograms(data)
    names = found.distinct()
    tokenizer = train_tokenizer(names)
    end = tokenizer.get_vocab()[_END]
    reader = PromptTokenizer(tokenizer.to_str(), TextSpec(_LENGTH, end, pooled=False))
    tokens = np.concatenate([reader.chunks(plain_sections(name))[0] for name in (*names, "")])
    network = PromptNetwork(torch.from_numpy(tokens), tokenizer.get_vocab_size(), end, widths)
    pixels = torch.from_numpy(found.pictures).float() / 127.5 - 1.0
    number = {name: i for i, name in enumerate(names)}
    return Task(
        network,
        nn.functional.pixel_unshuffle(pixels, PATCH),
        torch.tensor([number[name] for name in found.names]),
        len(names),
        make_scheduler(),
        lambda averaged, folder: write_folder(averaged, tokenizer, folder),
        bfloat16=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_FILE, help="what `make pictograms-data` drew")
    add_options(parser, epochs=342, batch_size=32, lr=6e-4, average=0.9995)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    # Written out: the backward pass of the fused attention is a third of a step in bfloat16 on a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        fit(make_task(options.data), options)


if __name__ == "__main__":
    main()
