"""A model as a network source: a diffusers folder or a torch module, what is said of it, and its graphs.

The engine's door to skipstep.export, which is imported only when a graph is needed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from skipstep.errors import InputError, check_flag
from skipstep.networks.checkpoint import Checkpoint, load_unet
from skipstep.networks.condition import Condition
from skipstep.networks.families import config_conditions, state_shape
from skipstep.networks.graphs import Partition, Values
from skipstep.networks.spec import LABELS, NetworkSpec, check_conditions, takes_fractional_timesteps

if TYPE_CHECKING:
    from skipstep.backends.denoiser import NetworkSource
    from skipstep.backends.torch import DenoisingModule
    from skipstep.loops.contract import Sampler
    from skipstep.reporting import Report


class ModelOptions(TypedDict, total=False):
    """What completes a model's configuration where it does not say (skipstep.networks.spec.NetworkSpec).

    fractional_timesteps  whether the network takes timesteps between those of its training; None: a diffusers network
                          does if its time embedding is smooth, any other module does not.
    conditions            by the names of the network's arguments; None: those that a diffusers configuration tells.
    """

    sample_shape: tuple[int, ...] | None
    num_classes: int | None
    null_label: int | None
    prompt_shape: tuple[int, int] | None
    fractional_timesteps: bool | None
    conditions: Mapping[str, Condition] | None


@dataclass(slots=True)
class ModelSource:
    """A torch module as a network source (skipstep.backends.denoiser.NetworkSource). Its graphs are exported once, when
    they are first needed. `digest` is a checkpoint's, None for a module."""

    name: str
    spec: NetworkSpec
    network: DenoisingModule
    digest: str | None
    tables: dict[bytes, Values] = field(default_factory=dict)
    _partition: Partition | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def module(self) -> DenoisingModule:
        from skipstep.backends.torch import module_on

        return module_on(self.network, "cpu")

    def partition(self) -> Partition:
        """The network's graphs. A checkpoint's export is kept in the user's cache: it takes longer than all the rest.
        Raises ExportError."""
        with self._lock:
            if self._partition is None:
                self._partition = self._export()
            return self._partition

    def _export(self) -> Partition:
        from skipstep.bundles.cache import ArtefactCache
        from skipstep.bundles.cache_key import cache_key
        from skipstep.export.onnx_model import export_onnx, exporter_versions
        from skipstep.export.partition import partition

        def export() -> bytes:
            return export_onnx(self.module(), self.spec)

        if self.digest is None:
            return partition(export())
        key = cache_key(kind="network.onnx", weights=self.digest, network=repr(self.spec), exporter=exporter_versions())
        description = f"{type(self.network.network).__name__} {self.spec.sample_shape}, exported to ONNX"
        return partition(ArtefactCache().get_or_build(key, export, description))

    def before_loop(self) -> Mapping[str, bytes]:
        return self.partition().graphs.before_loop

    def step_graph(self, precision: str) -> bytes:
        from skipstep.export.precision_check import step_graph

        return step_graph(self.partition(), precision)

    @property
    def engine_libraries(self) -> tuple[str, ...]:
        return "tensorrt", "tensorrt_rtx"

    def tensorrt_engine(
        self, library: str, *, version: str, device: int, batch_size: int, precision: str, again: bool = False
    ) -> bytes:
        from skipstep.export.engines import build_engine_cached
        from skipstep.export.tensorrt_engine import EngineTarget

        target = EngineTarget("tensorrt" if library == "tensorrt" else "tensorrt_rtx")
        tf32 = precision == "tf32"
        step = self.step_graph("float32" if tf32 else precision)
        return build_engine_cached(step, target, batch_size, device=device, tf32=tf32, again=again)[0]


def specification(
    model: Any,
    checkpoint: Checkpoint | None,
    *,
    sample_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    null_label: int | None = None,
    prompt_shape: tuple[int, int] | None = None,
    fractional_timesteps: bool | None = None,
    conditions: Mapping[str, Condition] | None = None,
) -> NetworkSpec:
    if fractional_timesteps is not None:
        check_flag("fractional_timesteps", fractional_timesteps)
    if checkpoint is None:
        return NetworkSpec.of_module(
            model,
            sample_shape=sample_shape,
            num_classes=num_classes,
            null_label=null_label,
            prompt_shape=prompt_shape,
            fractional_timesteps=fractional_timesteps,
            conditions=conditions,
        )
    config, known = checkpoint.unet_config, config_conditions(checkpoint.unet_config, check_conditions(conditions))
    state = state_shape(config, checkpoint.class_name, known) if sample_shape is None else sample_shape
    classes = None if LABELS in known else checkpoint.num_classes
    return NetworkSpec(
        checkpoint.sample_shape if state is None else state,
        classes if num_classes is None else num_classes,
        checkpoint.null_label if null_label is None else null_label,
        checkpoint.class_names,
        fractional_timesteps=takes_fractional_timesteps(config)
        if fractional_timesteps is None
        else fractional_timesteps,
        prompt_shape=checkpoint.prompt_shape if prompt_shape is None else prompt_shape,
        conditions=known,
    )


def is_module(model: object) -> bool:
    torch = sys.modules.get("torch")  # Without torch there are no modules.
    return torch is not None and isinstance(model, torch.nn.Module)


def read_model(model: Any, checkpoint: Checkpoint | None, network: NetworkSpec) -> ModelSource:
    from skipstep.backends.torch import prepare_module

    name, digest, module = type(model).__name__, None, model
    if checkpoint is not None:
        name, digest = checkpoint.folder.resolve().name, checkpoint.digest()
        module = load_unet(checkpoint)
    prepared, network = prepare_module(module, network)
    return ModelSource(name, network, prepared, digest)


def save_bundle(
    engine: Sampler,
    source: NetworkSource,
    path: str | os.PathLike[str],
    *,
    open_again: Callable[[Path], Sampler],
    progress: Report,
    **request: Any,
) -> None:
    """Write an engine that was built from a model as a bundle; `request` is a skipstep.export BundleRequest's."""
    from skipstep.export.request import BundleRequest, check_request

    if not isinstance(source, ModelSource):
        raise InputError(
            got="an engine that was loaded from a bundle",
            expected="one that was built from a model",
            remedy="copy the bundle's folder, or build the engine from the model",
        )
    asked = BundleRequest(**request)
    targets = check_request(path, asked)
    from skipstep.export.bundle_writer import write_bundle

    write_bundle(engine, source.partition(), path, asked, targets, open_again=open_again, progress=progress)
