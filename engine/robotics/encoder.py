"""The observation encoder of a policy, with the normalisation before it, as one graph. Needs torch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from skipstep.errors import InputError
from skipstep.export.encoder import check_encoder, export_encoder
from skipstep.export.large_model import refuse_large
from skipstep.robotics.features import EPSILON, Feature, PolicySpec
from skipstep.robotics.policy import FEATURES


class ObservationEncoder(nn.Module):
    """forward(observation [N, n_obs_steps, *shape], …) -> global_cond [N, D], in PolicySpec's order."""

    def __init__(self, policy: Any, spec: PolicySpec) -> None:
        super().__init__()
        # A copy without the network that the engine samples: parameters may be on a GPU, where the caller needs them.
        unet = policy.diffusion._modules.pop("unet")
        try:
            self.diffusion = copy.deepcopy(policy.diffusion).cpu().float()
        finally:
            policy.diffusion._modules["unet"] = unet
        self.features = spec.observations
        for i, each in enumerate(self.features):
            if each.normalisation is not None:
                shift, scale = each.normalisation.terms(len(each.shape))
                self.register_buffer(f"shift{i}", torch.from_numpy(shift.copy()))
                self.register_buffer(f"scale{i}", torch.from_numpy(scale.copy()))

    def forward(self, *observations: Tensor) -> Tensor:
        batch, images = {}, []
        for i, (feature, given) in enumerate(zip(self.features, observations, strict=True)):
            values = self._normalised(i, feature, given)
            if feature.kind == "image":
                images.append(values)
            else:
                batch[feature.name] = values
        if images:
            batch["observation.images"] = torch.stack(images, dim=2)
        encoded: Tensor = self.diffusion._prepare_global_conditioning(batch)
        return encoded

    def _normalised(self, i: int, feature: Feature, values: Tensor) -> Tensor:
        if feature.normalisation is None:
            return values
        shift, scale = self.get_buffer(f"shift{i}"), self.get_buffer(f"scale{i}")
        if feature.normalisation.mode == "mean_std":
            return (values - shift) / (scale + EPSILON)
        return 2 * (values - shift) / scale - 1


def export_observations(policy: Any, spec: PolicySpec) -> tuple[bytes, int]:
    """The encoder's graph, compared with the module on random observations, and the width of its output.

    Raises ExportError, InputError where the policy's configuration and its encoder contradict each other.
    """
    module = ObservationEncoder(policy, spec).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        each.name: torch.rand(2, spec.n_obs_steps, *each.shape, generator=generator) for each in spec.observations
    }
    with torch.no_grad():
        try:
            expected = module(*inputs.values())
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise InputError(
                got=f"{type(error).__name__} from the policy's encoder: {error!s:.300}",
                expected="one that takes the features in its configuration",
                remedy="check the policy's input_features",
            ) from error
    graph = export_encoder(module, inputs, [FEATURES])
    remedy = "build the engine of the policy's network alone, and pass it the features in conditions="
    refuse_large(graph, "an observation encoder", remedy)
    check_encoder(graph, inputs, {FEATURES: expected}, "observation encoder")
    return graph, expected.shape[1]
