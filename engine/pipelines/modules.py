"""The parts of a pipeline as modules of plain tensors, as they are exported. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """Token ids [B, L] -> embeddings [B, L, D], with `pooled` also [B, P]. `penultimate`: those before the last layer,
    without its norm."""

    def __init__(self, encoder: nn.Module, *, penultimate: bool, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.penultimate, self.pooled = encoder, penultimate, pooled

    def forward(self, tokens: Tensor) -> Any:
        found = self.encoder(tokens, output_hidden_states=self.penultimate)
        embeds = found.hidden_states[-2] if self.penultimate else found.last_hidden_state
        return (embeds, found.text_embeds) if self.pooled else embeds


class _Scaled(nn.Module):
    """An autoencoder between pictures and the latents that the network reads, latents · scale + shift being its own."""

    def __init__(self, autoencoder: Any, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        # The object's configuration also has what the file leaves out.
        scale, shift = 1.0 / autoencoder.config.scaling_factor, torch.tensor(config.get("shift_factor") or 0.0)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            scale = scale * torch.tensor(config["latents_std"]).reshape(1, -1, 1, 1)
            shift = torch.tensor(config["latents_mean"]).reshape(1, -1, 1, 1)
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32))
        self.register_buffer("shift", shift.float())


class Decoder(_Scaled):
    """Latents -> pictures, in [-1, 1] but for what overshoots."""

    def forward(self, latents: Tensor) -> Tensor:
        own = latents * self.get_buffer("scale") + self.get_buffer("shift")
        pictures: Tensor = self.autoencoder.decode(own, return_dict=False)[0]
        return pictures


class Encoder(_Scaled):
    """Pictures -> mean and deviation of the latents, side by side in the channels; of a VQModel the deviation is 0."""

    def forward(self, pictures: Tensor) -> Tensor:
        found = self.autoencoder.encode(pictures, return_dict=False)[0]
        mean, deviation = (found, torch.zeros_like(found)) if isinstance(found, Tensor) else (found.mean, found.std)
        scale = self.get_buffer("scale")
        return torch.cat([(mean - self.get_buffer("shift")) / scale, deviation / scale], dim=1)
