"""The networks that benchmarks run: the shipped one, two architectures with random weights, and anybody's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from skipstep import load
from skipstep.backends.torch import DenoisingModule, prepare_module
from skipstep.bundles.bundle import is_bundle, open_bundle
from skipstep.bundles.cache import ArtefactCache
from skipstep.bundles.cache_key import cache_key
from skipstep.demo import SHIPPED_MODEL, checked_model
from skipstep.errors import InputError
from skipstep.export.onnx_model import export_onnx, exporter_versions
from skipstep.networks.checkpoint import Checkpoint, load_unet, read_checkpoint
from skipstep.networks.spec import NetworkSpec, takes_fractional_timesteps
from skipstep.plans.plan import Plan


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
    checkpoint = read_checkpoint(checked_model(SHIPPED_MODEL))
    scheduler = DDIMScheduler.from_pretrained(SHIPPED_MODEL, subfolder="scheduler")
    return BenchModel("fashion-mnist", _labelled_unet(checkpoint), scheduler, True)


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
    return BenchModel("cifar10-architecture", calmed(unet).eval(), scheduler, False)


def calmed(unet: Any) -> Any:
    """The network with a last convolution near zero, as Ho et al. begin to train theirs.

    With random weights of full size a sampler is chaotic: clipping and 1/√ᾱ magnify the last bits of float32, after
    fifty steps into other pictures. Nobody's samples could then be told right from wrong.
    """
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.01)
        unet.conv_out.bias.zero_()
    return unet


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
    return BenchModel("text-architecture", calmed(unet).eval(), scheduler, False, prompt_shape=(77, 256))


MODELS = {"fashion-mnist": shipped_model, "cifar10-architecture": cifar10_model}
ALL_MODELS = {**MODELS, "text-architecture": text_model}


@dataclass(frozen=True)
class Subject:
    """What a benchmark runs: a diffusers folder with a scheduler configuration, or a bundle.

    A bundle holds no network that torch could run, so `module` and `exported` are for folders alone.
    `plan_options` are the arguments of Plan that sample as the model's scheduler says; `digest` tells its weights.
    """

    name: str
    path: Path
    spec: NetworkSpec
    plan_options: Mapping[str, Any]
    digest: str
    checkpoint: Checkpoint | None = None

    @property
    def is_bundle(self) -> bool:
        return self.checkpoint is None

    def plan(self, steps: int) -> Plan:
        return Plan(**self.plan_options, steps=steps)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The network in eager float32 on the CPU, in eval mode."""
        assert self.checkpoint is not None, "a bundle has no module"
        labelled = self.spec.num_classes is not None and self.checkpoint.class_name == "UNet2DModel"
        return _labelled_unet(self.checkpoint) if labelled else load_unet(self.checkpoint)

    @cached_property
    def prepared(self) -> tuple[DenoisingModule, NetworkSpec]:
        """The network and what it is as an exporter takes them."""
        return prepare_module(self.module, self.spec)

    @cached_property
    def exported(self) -> bytes:
        """The whole network as ONNX, from the user's cache, under the key that Engine.build looks for."""
        prepared, spec = self.prepared
        key = cache_key(kind="network.onnx", weights=self.digest, network=repr(spec), exporter=exporter_versions())
        return ArtefactCache().get_or_build(key, lambda: export_onnx(prepared, spec), f"{self.name}, exported to ONNX")


def open_subject(model: str, *, folder: Path) -> Subject:
    """The model of that name (MODELS), or the diffusers folder or bundle at that path.

    A named architecture is written to `folder` first. Raises InputError for a folder without a scheduler
    configuration, ModelFormatError and BundleError.
    """
    if model == "fashion-mnist":
        return _of_folder(checked_model(SHIPPED_MODEL), name=model)
    if model in ALL_MODELS:
        made = ALL_MODELS[model]()
        made.unet.save_pretrained(folder / model / "unet")
        made.scheduler.save_pretrained(folder / model / "scheduler")
        return _of_folder(folder / model, name=model)
    path = Path(model)
    if is_bundle(path):
        return _of_bundle(path)
    _check_folder(path)
    return _of_folder(path, name=path.resolve().name)


def subject_name(model: str) -> str:
    """The name under which `open_subject` opens it, before anything is loaded. Raises as it does for a bad path."""
    path = Path(model)
    if model in ALL_MODELS:
        return model
    if is_bundle(path):
        return open_bundle(path, allow_hard_links=True).manifest.model
    _check_folder(path)
    return path.resolve().name


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise InputError(
            got=f"the model {str(path)!r}",
            expected=f"{', '.join(ALL_MODELS)}, a diffusers folder or a bundle",
            remedy="check the path",
        )


def _of_folder(path: Path, *, name: str) -> Subject:
    checkpoint = read_checkpoint(path)
    if checkpoint.scheduler is None:
        raise InputError(
            got=f"the model {path} without a scheduler configuration",
            expected="scheduler/scheduler_config.json, which says how the network was trained and is to be sampled",
            remedy=f"write one: DDIMScheduler(...).save_pretrained({str(path / 'scheduler')!r})",
        )
    spec = NetworkSpec(
        checkpoint.sample_shape,
        checkpoint.num_classes,
        checkpoint.null_label,
        checkpoint.class_names,
        fractional_timesteps=takes_fractional_timesteps(checkpoint.unet_config),
        prompt_shape=checkpoint.prompt_shape,
    )
    return Subject(name, path, spec, checkpoint.scheduler.plan_options(), checkpoint.digest(), checkpoint)


def _of_bundle(path: Path) -> Subject:
    bundle = open_bundle(path, allow_hard_links=True)
    engine = load(path, allow_hard_links=True)
    if "schedule" not in engine.plan_defaults:
        raise InputError(
            got=f"the bundle {path} without a scheduler configuration",
            expected="one that was exported from a model with a scheduler configuration",
            remedy="export it again from a diffusers folder with scheduler/scheduler_config.json",
        )
    return Subject(bundle.manifest.model, path, engine.network, engine.plan_defaults, bundle.manifest.digest)


def _labelled_unet(checkpoint: Checkpoint) -> FixedLabelUNet:
    unet = FixedLabelUNet.from_config({k: v for k, v in checkpoint.unet_config.items() if not k.startswith("_")})
    unet.load_state_dict(load_unet(checkpoint).state_dict())
    labelled: FixedLabelUNet = unet.eval().requires_grad_(False)
    return labelled
