"""The parts of a pipeline as modules of plain tensors, as they are exported. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

# Of an upscaler's embedding of a noise level: cosines, which are 1 without noise, and sines.
_NOISE_WIDTH: Final = 128


class TextEncoder(nn.Module):
    """Token ids [B, L] -> embeddings [B, L, D], with `pooled` also [B, P]. `layer`: what that layer gives, without the
    last norm. An upscaler's pooled ones come with its embedding of the small picture's noise: none."""

    def __init__(self, encoder: nn.Module, *, layer: int | None, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.layer, self.pooled = encoder, layer, pooled

    def forward(self, tokens: Tensor) -> Any:
        found = self.encoder(tokens, output_hidden_states=self.layer is not None)
        embeds = found.last_hidden_state if self.layer is None else found.hidden_states[self.layer]
        if not self.pooled:
            return embeds
        if "text_embeds" in found:
            return embeds, found.text_embeds
        sines = nn.functional.pad(found.pooler_output, (_NOISE_WIDTH // 2, 0))
        return embeds, nn.functional.pad(sines, (_NOISE_WIDTH // 2, 0), value=1.0)


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


class SafetyChecker(nn.Module):
    """Pictures in [0, 1] of the size that it reads -> [B], above 0 for what shows one of its concepts."""

    def __init__(self, checker: Any, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.checker = checker
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(config[name]).reshape(1, 3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        pixels = (pictures - self.get_buffer("image_mean")) / self.get_buffer("image_std")
        embeds = self.checker.visual_projection(self.checker.vision_model(pixels)[1])
        return self._margin(embeds, "concept") + 0.01 * (self._margin(embeds, "special_care") > 0)

    def _margin(self, embeds: Tensor, name: str) -> Tensor:
        """How far the nearest concept is above its threshold, which diffusers rounds to three digits."""
        concepts, thresholds = (getattr(self.checker, f"{name}_embeds{end}") for end in ("", "_weights"))
        near = nn.functional.normalize(embeds) @ nn.functional.normalize(concepts).T
        margin: Tensor = (near - thresholds - 0.0005).amax(dim=1)
        return margin


class Controlled(nn.Module):
    """A UNet and ControlNets, whose residuals are added to what its up blocks read: `control_image` holds a picture for
    each, `controlnet_conditioning_scale` [N, number of ControlNets] their weights."""

    def __init__(self, unet: Any, nets: list[Any]) -> None:
        super().__init__()
        self.unet, self.nets, self.config = unet, nn.ModuleList(nets), unet.config
        self._bias: list[Tensor] = []
        for module in self.nets.modules():
            if hasattr(module, "to_k"):
                module.register_forward_pre_hook(self._masked, with_kwargs=True)

    def _masked(self, _: nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
        """A ControlNet's forward takes no mask for prompts, its attention layers do."""
        if not self._bias or named.get("encoder_hidden_states") is None:
            return None
        return arguments, {**named, "attention_mask": self._bias[0]}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: Any = None,
        *,
        control_image: list[Tensor],
        controlnet_conditioning_scale: Tensor,
    ) -> Any:
        read = {"class_labels": class_labels, "added_cond_kwargs": added_cond_kwargs}
        mask = encoder_attention_mask
        self._bias[:] = [] if mask is None else [((1 - mask) * -10000.0).to(sample.dtype)[:, None]]
        down: list[Tensor] = []
        nets: Any = self.nets
        middle: Any = None
        for i, (net, picture) in enumerate(zip(nets, control_image, strict=True)):
            scale = controlnet_conditioning_scale[:, i].reshape(-1, 1, 1, 1)
            # An inpainting network's further channels are its own.
            latents = sample[:, : net.config.in_channels]
            found, last = net(latents, timestep, encoder_hidden_states, picture, scale, return_dict=False, **read)
            down = [a + b for a, b in zip(down, found, strict=True)] if down else list(found)
            middle = last if middle is None else middle + last
        self._bias.clear()
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            encoder_attention_mask=mask,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
            **read,
        )[0]
