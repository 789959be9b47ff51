"""A model as a network source: a diffusers folder or a torch module, what is said of it, and its graphs.

The engine's door to skipstep.export, which is imported only when a graph is needed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

from skipstep.backends.tensorrt_options import DEFAULTS, TensorRTOptions
from skipstep.errors import ExportError, InputError, ModelFormatError, check_flag, needs_packages
from skipstep.networks.checkpoint import Checkpoint, load_unet
from skipstep.networks.condition import Condition
from skipstep.networks.families import config_conditions, state_shape, takes_fractional_timesteps
from skipstep.networks.graphs import Partition, Values
from skipstep.networks.spec import LABELS, NetworkSpec, check_conditions

if TYPE_CHECKING:
    from skipstep.backends.denoiser import Denoiser, NetworkSource
    from skipstep.backends.torch import DenoisingModule
    from skipstep.export.onnx_file import OnnxNetwork
    from skipstep.loops.contract import Sampler
    from skipstep.reporting import Report


class SpecOptions(TypedDict, total=False):
    """What completes a model's configuration where it does not say (skipstep.networks.spec.NetworkSpec).

    fractional_timesteps  whether the network takes timesteps between those of its training; None: a diffusers network
                          does if its time embedding is smooth, any other module does not.
    conditions            by the names of the network's arguments; None: those that a diffusers configuration tells.
    time_input            what it is told of a noise level: "timestep", "sigma", "c_noise", "log_snr", "alpha_bar" or
                          "flow", and
    state                 what it reads of a noised sample: "vp", "ve", "edm" or "flow", both as in
                          skipstep.plans.parameterization.
    sigma_data            of state="edm", 0.5 where it is left out.
    """

    sample_shape: tuple[int, ...] | None
    num_classes: int | None
    null_label: int | None
    prompt_shape: tuple[int, int] | None
    fractional_timesteps: bool | None
    conditions: Mapping[str, Condition] | None
    time_input: str
    state: str
    sigma_data: float | None


class ModelOptions(SpecOptions, total=False):
    """What else belongs to a model (skipstep.opening).

    config     of a single .safetensors file: the local folder of its configuration.
    scheduler  scheduler_config.json, its contents or a diffusers scheduler, instead of what came with the model.
    controlnet of a folder: that of a ControlNet, or a list of several (skipstep.networks.controlnet).
    inputs     of an .onnx file: its names by ours, {"sample": "noisy", "timestep": "sigma"}; also "class_labels",
               "encoder_hidden_states" and, for its output, "out_sample". The others are found by name or shape.
    """

    config: str | os.PathLike[str] | None
    scheduler: Any
    controlnet: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
    inputs: Mapping[str, str] | None


NO_TORCH_BACKEND: Final = "pass backend='onnxruntime', or backend='tensorrt' on a GPU"


@dataclass(slots=True)
class GraphSource(ABC):
    """A network source (skipstep.backends.denoiser.NetworkSource) whose graphs are made once, when they are first
    needed."""

    name: str
    spec: NetworkSpec
    network: Any
    digest: str | None
    tables: dict[bytes, Values] = field(default_factory=dict, kw_only=True)
    # In 8 bits, by form (skipstep.quantizing).
    steps: Mapping[str, bytes] = field(default_factory=dict, kw_only=True)
    tensorrt: TensorRTOptions = field(default=DEFAULTS, kw_only=True)
    _partition: Partition | None = field(default=None, kw_only=True)
    _lock: threading.Lock = field(default_factory=threading.Lock, kw_only=True)

    @abstractmethod
    def module(self) -> Any:
        """The network as a torch module on the CPU. Raises InputError where it is none."""

    @abstractmethod
    def reference(self) -> Denoiser:
        """The network as it was given, for two samples in host memory."""

    @property
    def computes_in(self) -> str:
        """The precision that the reference computes in, whatever the weights of the parts that run."""
        return "float32"

    def blamed(self) -> AbstractContextManager[None]:
        """Around the comparison with the reference: turns an ExportError into one that names the remedy here."""
        return nullcontext()

    @abstractmethod
    def _export(self) -> Partition:
        """Raises ExportError."""

    def partition(self) -> Partition:
        """The network's graphs. A checkpoint's export is kept in the user's cache: it takes longer than all the rest.
        Raises ExportError."""
        with self._lock:
            if self._partition is None:
                self._partition = self._export()
            return self._partition

    def before_loop(self) -> Mapping[str, bytes]:
        return self.partition().graphs.before_loop

    def step_graph(self, precision: str) -> bytes:
        if precision in self.steps:
            return self.steps[precision]
        from skipstep.export.precision_check import step_graph

        return step_graph(self.partition(), precision)

    @property
    def engine_libraries(self) -> tuple[str, ...]:
        return "tensorrt", "tensorrt_rtx"

    def tensorrt_engine(
        self,
        library: str,
        *,
        version: str,
        device: int,
        batch_sizes: Sequence[int],
        precision: str,
        again: bool = False,
    ) -> bytes:
        from skipstep.export.engines import build_engine_cached
        from skipstep.export.tensorrt_engine import EngineTarget

        rtx, tf32 = library == "tensorrt_rtx", precision == "tf32"
        return build_engine_cached(
            self.step_graph("float32" if tf32 else precision),
            EngineTarget("tensorrt_rtx" if rtx else "tensorrt"),
            batch_sizes,
            device=device,
            options=self.tensorrt,
            tf32=tf32,
            channels_last=rtx,  # Only of this library is known that it then launches less (bench.kernel_counts).
            again=again,
        )[0]

    def engine_graph(self, precision: str) -> bytes:
        return engine_graph(self.step_graph("float32" if precision == "tf32" else precision))


@dataclass(slots=True)
class ModelSource(GraphSource):
    """A torch module. `digest` is a checkpoint's, None for a module."""

    network: DenoisingModule

    def module(self) -> DenoisingModule:
        from skipstep.backends.torch import module_on

        return module_on(self.network, "cpu")

    def reference(self) -> Denoiser:
        from skipstep.backends.torch import TorchDenoiser

        return TorchDenoiser(self.module(), self.spec, batch_size=2)

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


@dataclass(slots=True)
class OnnxSource(GraphSource):
    """An .onnx file: its graph under our names is the network, the file as it stands the reference."""

    network: OnnxNetwork

    def module(self) -> Any:
        raise InputError(
            got=f"the torch backend for {self.name}, an .onnx file",
            expected="a backend that runs graphs",
            remedy=NO_TORCH_BACKEND,
        )

    def reference(self) -> Denoiser:
        from skipstep.backends.onnx_file import FileDenoiser

        network = self.network
        return FileDenoiser(network.original, network.inputs, network.output, self.spec, batch_size=2)

    @property
    def computes_in(self) -> str:
        return "float16" if self.network.half_precision else "float32"

    @contextmanager
    def blamed(self) -> Iterator[None]:
        try:
            yield
        except ExportError as error:
            raise ModelFormatError(
                got=f"{self.name}, an .onnx file: {error.got}",
                expected="a graph that gives each sample of a batch what it gives that sample alone",
                remedy="export the network again with a dynamic batch dimension and a timestep of shape [batch]",
            ) from error

    def _export(self) -> Partition:
        from skipstep.export.partition import partition

        return partition(self.network.graph)


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
    **time: Any,
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
            **time,
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
        **time,
    )


def engine_graph(step: bytes) -> bytes:
    """A step network as TensorRT's builder reads it."""
    from skipstep.export.tensorrt_graph import builder_graph

    return builder_graph(step)


def read_model(
    model: Any, checkpoint: Checkpoint | None, network: NetworkSpec, controlnets: Sequence[Checkpoint] = ()
) -> ModelSource:
    from skipstep.backends.torch import prepare_module

    name, digest, module = type(model).__name__, None, model
    if checkpoint is not None:
        name, digest = checkpoint.name, checkpoint.digest()
        module = load_unet(checkpoint, network.sample_shape[0])
    if controlnets:
        from skipstep.pipelines.modules import Controlled

        digests = (str(digest), *(each.digest() for each in controlnets))
        digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        module = Controlled(module, [load_unet(each) for each in controlnets])
    prepared, network = prepare_module(module, network)
    return ModelSource(name, network, prepared, digest)


def open_onnx(
    path: Path, *, inputs: object, config: Mapping[str, Any] | None, **said: Unpack[SpecOptions]
) -> OnnxNetwork:
    """The network in an .onnx file. Raises ModelFormatError, IntegrityError, InputError, MissingDependencyError."""
    with needs_packages(
        "onnx, onnxscript and onnxruntime, which read and run .onnx files", remedy="pip install 'skipstep[cpu,export]'"
    ):
        from skipstep.export.onnx_file import read_onnx
    return read_onnx(path, inputs=inputs, config=config, **said)


def save_bundle(
    engine: Sampler,
    source: NetworkSource,
    path: str | os.PathLike[str],
    *,
    open_again: Callable[[Path], Sampler],
    progress: Report,
    quantize: Callable[[GraphSource, Sequence[str]], Mapping[str, Any]] | None = None,
    **request: Any,
) -> None:
    """Write an engine that was built from a model as a bundle; `request` is a skipstep.export BundleRequest's.
    `quantize` gives the step network in these forms of skipstep.quantizing."""
    from skipstep.export.request import BundleRequest, check_request

    if not isinstance(source, GraphSource):
        raise InputError(
            got="an engine that was loaded from a bundle",
            expected="one that was built from a model",
            remedy="copy the bundle's folder, or build the engine from the model",
        )
    asked = BundleRequest(**request)
    targets = check_request(path, asked)
    if quantize is not None:
        forms = [f"int8-{name}" for name in ("onnxruntime", "openvino") if asked.precision == "int8"]
        on_gpu = targets.engines or targets.step_network or targets.trtexec
        asked = replace(asked, quantized=quantize(source, forms + ([asked.precision] if on_gpu else [])))
    from skipstep.export.bundle_writer import check_engine, write_bundle

    check_engine(engine, targets)
    write_bundle(engine, source.partition(), path, asked, targets, open_again=open_again, progress=progress)
