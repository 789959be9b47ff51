"""LoRA files of random factors, in the layouts that users have."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skipstep.networks.lora_layers import layers_of

Factors = Mapping[str, tuple[Tensor, Tensor]]
ALPHA = 3.0
# Prefix, what joins a path, and the endings of the two factors.
LAYOUTS = {
    "peft": ("{part}.", ".", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("{part}.", ".", ".lora.down.weight", ".lora.up.weight"),
    "processors": ("{part}.", ".", "_lora.down.weight", "_lora.up.weight"),
    "kohya": ("lora_{part}_", "_", ".lora_down.weight", ".lora_up.weight"),
}


def attention(path: str) -> bool:
    return "attn" in path


def factors_of(network: nn.Module, rank: int, seed: int, wanted: Any = attention) -> dict[str, tuple[Tensor, Tensor]]:
    """down and up of the layers whose path is wanted."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for path, layer in layers_of(network).items():
        if wanted(path):
            out, *rest = layer.weight.shape
            down = torch.randn(rank, *rest, generator=generator) * 0.3
            made[path] = down, torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator) * 0.3
    return made


def write_lora(path: Path, parts: Mapping[str, Factors], layout: str = "peft", *, alphas: bool = True) -> str:
    """With ALPHA as each layer's alpha where the layout has a place for it. The parts: "unet", "text_encoder"."""
    tensors, metadata = {}, {}
    prefix, join, down_end, up_end = LAYOUTS[layout]
    short = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2"}
    for part, factors in parts.items():
        start = prefix.format(part=short[part] if layout == "kohya" else part)
        for layer, (down, up) in factors.items():
            if part.startswith("text") and not layer.startswith("text_model"):
                layer = f"text_model.{layer}"
            own = layer.replace(".", join)
            if layout == "processors":
                own = own.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_")
            tensors |= {f"{start}{own}{down_end}": down, f"{start}{own}{up_end}": up}
            if layout == "kohya" and alphas:
                tensors[f"{start}{own}.alpha"] = torch.tensor(ALPHA)
        rank = len(next(iter(factors.values()))[0])
        config = {"lora_alpha": ALPHA, "r": rank, "target_modules": sorted(factors)}
        metadata |= {f"{part}.{name}": each for name, each in config.items()}
    said = {"lora_adapter_metadata": json.dumps(metadata)} if layout == "peft" and alphas else {}
    save_file({name: each.contiguous() for name, each in tensors.items()}, path, {"format": "pt", **said})
    return str(path)


def share(layout: str, rank: int) -> float:
    """alpha / rank of such a file."""
    return ALPHA / rank if layout in ("peft", "kohya") else 1.0


def updated(weight: Tensor, pairs: Iterable[tuple[float, Tensor, Tensor]]) -> Tensor:
    """W + the sum of factor · up · down, in float64."""
    total = weight.double()
    for factor, down, up in pairs:
        total = total + factor * torch.einsum("or,ri->oi", up.double().flatten(1), down.double().flatten(1)).reshape(
            weight.shape
        )
    return total
