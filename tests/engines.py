"""Engines for tests, and ONNX exports that are made once for the whole session.

Torch takes 2 to 12 seconds to export even a tiny network. `share_exports` puts the exports of equal networks into a
cache that all processes of a session share: the first that asks for one makes it, the others wait for it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from typing import Any

import pytest
import torch
from tiny_networks import Labelled
from torch import nn

from skipstep import Engine, NoiseSchedule
from skipstep.backends.torch import DenoisingModule, zero_conditioning
from skipstep.bundles.cache import ArtefactCache
from skipstep.export import onnx_model
from skipstep.export.partition import partition
from skipstep.networks.graphs import Partition
from skipstep.networks.spec import NetworkSpec

SCHEDULE = NoiseSchedule.linear(1000)

_export = onnx_model.export_onnx


def build(model: nn.Module | str | os.PathLike[str], *, plans: Any = (), **options: Any) -> Engine:
    """`Engine.build` on the CPU with torch and batch sizes 1 and 4, unless `options` say otherwise.

    A module gets the linear schedule. Without plans the engine compiles what it is asked for.
    """
    defaults: dict[str, Any] = {
        "backend": "torch",
        "device": "cpu",
        "batch_sizes": [1, 4],
        "compile_on_miss": not plans,
    }
    if isinstance(model, nn.Module):
        defaults["schedule"] = SCHEDULE
    return Engine.build(model, plans=plans, **{**defaults, **options})


def labelled_engine() -> Engine:
    """A small guided network on torch, one plan of three steps, and requests that are split over batch sizes."""
    return build(Labelled(), plans=[3], batch_sizes=[1, 2], sample_shape=(1, 4, 4), num_classes=4, null_label=3)


def exported(module: nn.Module, spec: NetworkSpec, *, batch_size: int | None = None) -> bytes:
    """`export_onnx` through the session's cache, by what the exporter reads. What no pickle holds is exported anew."""
    network = module if isinstance(module, DenoisingModule) else DenoisingModule(module)
    network.eval()
    given = (network, spec.sample_shape, spec.fractional_timesteps, zero_conditioning(spec, 2), batch_size)
    content = io.BytesIO()
    try:
        _Content(content, protocol=5).dump(given)
    except (pickle.PicklingError, AttributeError, TypeError):  # A class that a test function defines, or a hook.
        return _export(network, spec, batch_size=batch_size)
    return ArtefactCache().get_or_build(
        hashlib.sha256(content.getvalue()).hexdigest(),
        lambda: _export(network, spec, batch_size=batch_size),
        f"{type(network.network).__name__} for a test",
    )


def parts_of(module: nn.Module, spec: NetworkSpec) -> Partition:
    return partition(exported(module, spec))


def share_exports(patch: pytest.MonkeyPatch) -> None:
    """Engines take their exports from the session's cache; modules that import `export_onnx` keep the exporter."""
    patch.setattr(onnx_model, "export_onnx", exported)


class _Content(pickle.Pickler):
    """Pickles what a value says: tensors' own pickles hold addresses, configurations the folder that a network was
    loaded from, and of strings it matters which of them are one object."""

    def persistent_id(self, value: object) -> object:
        if isinstance(value, str):
            return value.encode()
        if type(value).__name__ == "FrozenDict":  # The configuration of a diffusers module.
            said = {name: each for name, each in value.items() if not name.startswith("_")}
            return json.dumps(said, sort_keys=True, default=str).encode()
        if not isinstance(value, torch.Tensor):
            return None
        return str(value.dtype), tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes()
