"""A diffusers UNet's tensors under the names of the original latent-diffusion code."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_names(state: Mapping[str, Tensor], *, layers: int, attention_above: bool) -> dict[str, Tensor]:
    """Of a network with `layers` per block; `attention_above`: its first upwards block has no attention."""
    return {"model.diffusion_model." + _name(name, layers, attention_above): each for name, each in state.items()}


def _name(name: str, layers: int, attention_above: bool) -> str:
    for diffusers, original in _TOP.items():
        if name.startswith(diffusers + "."):
            name = original + name.removeprefix(diffusers)
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name)
    if found:
        way, block, kind, index = found[1], int(found[2]), found[3], int(found[4])
        start = block * (layers + 1)
        if kind == "downsamplers":
            prefix = f"input_blocks.{start + layers + 1}.0."
            name = name.replace("conv.", "op.")
        elif kind == "upsamplers":
            prefix = f"output_blocks.{start + layers}.{1 if attention_above and block == 0 else 2}."
        else:
            place = 0 if kind == "resnets" else 1
            prefix = f"{'input' if way == 'down' else 'output'}_blocks.{start + index + (way == 'down')}.{place}."
        name = prefix + name[name.index(f"{kind}.{index}.") + len(f"{kind}.{index}.") :]
    for diffusers, original in _RESNET.items() if "transformer_blocks" not in name else ():
        name = re.sub(rf"\.{diffusers}\.", f".{original}.", name)
    return name
