"""What benchmarks run: the shipped model, architectures with random weights, a diffusers folder or a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from skipstep import load
from skipstep.backends.torch import DenoisingModule, prepare_module
from skipstep.bench.architectures import ARCHITECTURES
from skipstep.bundles.bundle import is_bundle, open_bundle
from skipstep.bundles.cache import ArtefactCache
from skipstep.bundles.cache_key import cache_key
from skipstep.demo import SHIPPED_MODEL
from skipstep.errors import InputError
from skipstep.networks.checkpoint import Checkpoint, load_unet, read_checkpoint
from skipstep.networks.families import takes_fractional_timesteps
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.plan import Plan


class FixedLabelUNet(UNet2DModel):  # type: ignore[misc]
    """A class-conditional UNet2DModel as unconditional callers know it: `labels` are those of every call."""

    labels: torch.Tensor

    def forward(self, sample, timestep, class_labels=None, return_dict=True):  # type: ignore[no-untyped-def]
        # diffusers' DDIMPipeline has no argument for labels.
        return super().forward(sample, timestep, self.labels if class_labels is None else class_labels, return_dict)


_NAMES = ("fashion-mnist", *ARCHITECTURES)


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
        # Imported here: a process that is measured and exports nothing need not load the exporter.
        from skipstep.export.onnx_model import export_onnx, exporter_versions

        prepared, spec = self.prepared
        key = cache_key(kind="network.onnx", weights=self.digest, network=repr(spec), exporter=exporter_versions())
        return ArtefactCache().get_or_build(key, lambda: export_onnx(prepared, spec), f"{self.name}, exported to ONNX")


def open_subject(model: str, *, folder: Path) -> Subject:
    """The model of that name (fashion-mnist or one of ARCHITECTURES), or the diffusers folder or bundle at that path.

    A named architecture is written to `folder` first. Raises InputError for a folder without a scheduler
    configuration, ModelFormatError and BundleError.
    """
    if model == "fashion-mnist":
        return _of_folder(SHIPPED_MODEL, name=model)
    if model in ARCHITECTURES:
        unet, scheduler = ARCHITECTURES[model]()
        unet.save_pretrained(folder / model / "unet")
        scheduler.save_pretrained(folder / model / "scheduler")
        return _of_folder(folder / model, name=model)
    path = Path(model)
    if is_bundle(path):
        return _of_bundle(path)
    _check_folder(path)
    return _of_folder(path, name=path.resolve().name)


def subject_name(model: str) -> str:
    """The name under which `open_subject` opens it, before anything is loaded. Raises as it does for a bad path."""
    path = Path(model)
    if model in _NAMES:
        return model
    if is_bundle(path):
        return open_bundle(path, allow_hard_links=True).manifest.model
    _check_folder(path)
    return path.resolve().name


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise InputError(
            got=f"the model {str(path)!r}",
            expected=f"{', '.join(_NAMES)}, a diffusers folder or a bundle",
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
