"""From a model to a network that is ready to be sampled: read it, check the options, choose backend and loop.

This is the engine's one door to skipstep.export, which is imported only when a graph is needed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args

import numpy as np

from skipstep.backends.denoiser import Denoiser, Target
from skipstep.backends.registry import resolve_backend
from skipstep.calls.conditioning import LABELS, PROMPTS, Conditioning
from skipstep.errors import DeviceUnavailableError, ExportError, InputError, MissingDependencyError
from skipstep.loops.choice import make_loop, resolve_form
from skipstep.loops.lifecycle import Lifecycle
from skipstep.loops.runner import BatchRunner, CompiledNetwork
from skipstep.networks.checkpoint import load_unet, read_checkpoint
from skipstep.networks.graphs import Partition, Values
from skipstep.networks.spec import NetworkSpec, takes_fractional_timesteps

if TYPE_CHECKING:
    from skipstep.backends.denoiser import NetworkSource
    from skipstep.backends.torch import DenoisingModule
    from skipstep.loops.contract import Sampler

Precision = Literal["float32", "float16", "bfloat16"]

# How far an exported graph may be from the module it came from, relative to the largest output: float32 rounding in
# another order over a few hundred layers stays below 1e-5, a wrong operator is orders of magnitude off.
EXPORT_TOLERANCE = 1e-4


class ModelOptions(TypedDict, total=False):
    """What completes a model's configuration where it does not say (skipstep.networks.spec.NetworkSpec).

    fractional_timesteps  whether the network takes timesteps between those of its training; None: a diffusers network
                          does if its time embedding is smooth, any other module does not.
    """

    sample_shape: tuple[int, int, int] | None
    num_classes: int | None
    null_label: int | None
    prompt_shape: tuple[int, int] | None
    fractional_timesteps: bool | None


class BuildOptions(ModelOptions, total=False):
    """How a network is compiled; each may be left out.

    backend           "torch", "onnxruntime", "tensorrt" or "auto" (skipstep.backends.registry has the table).
    loop              on a GPU "captured", "step_graph" or "stepwise" (skipstep.loops.programs), on the CPU "stepwise".
                      "auto": the one with the fewest launches from the host. `Engine.describe` says which was possible.
    require_captured  on a GPU: raise CaptureError where a loop cannot run as `loop` says, instead of a simpler one.
    device            "cpu", "cuda", "cuda:1", or "auto": the GPU where there is one.
    precision         of the network on a GPU: "float32", "float16" or "bfloat16"; the state is always float32.
    compile_network   run torch's module through torch.compile first (torch on a GPU).
    num_threads       of ONNX Runtime on the CPU; None: every core. torch keeps its process-wide setting.
    """

    backend: str
    loop: str
    require_captured: bool
    device: str
    precision: str
    compile_network: bool
    num_threads: int | None


@dataclass(slots=True)
class ModelSource:
    """A torch module as a network source (skipstep.backends.denoiser.NetworkSource). Its graphs are exported once, when
    they are first needed. `digest` is a checkpoint's, None for a module."""

    name: str
    spec: NetworkSpec
    network: DenoisingModule
    digest: str | None
    plan_defaults: Mapping[str, Any]
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

    def tensorrt_engine(self, library: str, *, version: str, batch_size: int, precision: str) -> bytes:
        from skipstep.export.engines import build_engine_cached
        from skipstep.export.tensorrt_engine import EngineTarget

        target = EngineTarget("tensorrt" if library == "tensorrt" else "tensorrt_rtx")
        return build_engine_cached(self.step_graph(precision), target, batch_size)[0]


def build_network(
    model: Any,
    *,
    batch_sizes: Iterable[int],
    backend: str = "auto",
    loop: str = "auto",
    require_captured: bool = False,
    device: str = "auto",
    precision: str = "float32",
    compile_network: bool = False,
    num_threads: int | None = None,
    **model_options: Unpack[ModelOptions],
) -> CompiledNetwork:
    """See Engine.build and BuildOptions."""
    try:
        import torch  # noqa: F401 - for the message, where it is missing
    except ImportError as error:
        raise MissingDependencyError(
            got="no package torch", expected="torch, which builds engines", remedy="pip install 'skipstep[torch]'"
        ) from error
    sizes = _checked_batch_sizes(batch_sizes)
    resolved = _resolve_device(device)
    chosen = resolve_backend(backend, device=resolved.type, exports=True)
    form = resolve_form(loop, device=resolved.type)
    _check_options(precision, resolved.type, chosen.name, compile_network, require_captured)
    source = _read_model(model, **model_options)
    lifecycle = Lifecycle()
    target = Target("cpu", precision, num_threads, compile_network)
    cuda = None
    if resolved.type == "cuda":
        from skipstep.cuda.device import CudaDevice

        cuda = CudaDevice(resolved)
        target = replace(target, device=str(cuda.torch_device), stream=getattr(cuda.stream, "torch_stream", None))
    make, network = chosen.denoisers(source, target), source.spec
    if chosen.name == "onnxruntime" and cuda is None:
        _check_export(source, make(2))
    made = make_loop(make, network, sizes, form=form, required=require_captured, lifecycle=lifecycle, device=cuda)
    runner = BatchRunner(made, network, sizes, lifecycle)
    return CompiledNetwork(source, runner, chosen.name, precision, num_threads, plan_defaults=source.plan_defaults)


def save_bundle(
    engine: Sampler,
    source: NetworkSource,
    path: str | os.PathLike[str],
    *,
    open_again: Callable[[Path], Sampler],
    progress: Callable[[str], None] | None,
    **request: Any,
) -> None:
    """Write an engine that was built from a model as a bundle; `request` is a skipstep.export BundleRequest's."""
    from skipstep.export.bundle_writer import BundleRequest, write_bundle

    if not isinstance(source, ModelSource):
        raise InputError(
            got="an engine that was loaded from a bundle",
            expected="one that was built from a model",
            remedy="copy the bundle's folder, or build the engine from the model",
        )
    write_bundle(engine, source.partition(), path, BundleRequest(**request), open_again=open_again, progress=progress)


def _read_model(
    model: Any,
    *,
    sample_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    null_label: int | None = None,
    prompt_shape: tuple[int, int] | None = None,
    fractional_timesteps: bool | None = None,
) -> ModelSource:
    import torch

    from skipstep.backends.torch import prepare_module

    plan_defaults: dict[str, Any] = {}
    name, digest = type(model).__name__, None
    if isinstance(model, str | os.PathLike):
        checkpoint = read_checkpoint(model)
        name, digest = checkpoint.folder.resolve().name, checkpoint.digest()
        module = load_unet(checkpoint)
        network = NetworkSpec(
            sample_shape or checkpoint.sample_shape,
            checkpoint.num_classes if num_classes is None else num_classes,
            checkpoint.null_label if null_label is None else null_label,
            checkpoint.class_names,
            fractional_timesteps=takes_fractional_timesteps(checkpoint.unet_config)
            if fractional_timesteps is None
            else fractional_timesteps,
            prompt_shape=prompt_shape or checkpoint.prompt_shape,
        )
        if checkpoint.scheduler is not None:
            plan_defaults = checkpoint.scheduler.plan_options()
    elif isinstance(model, torch.nn.Module):
        module = model
        network = NetworkSpec.of_module(
            model,
            sample_shape=sample_shape,
            num_classes=num_classes,
            null_label=null_label,
            prompt_shape=prompt_shape,
            fractional_timesteps=fractional_timesteps,
        )
    else:
        raise InputError(
            got=f"a model of type {type(model).__name__}",
            expected="a torch.nn.Module, or the path of a diffusers folder",
            remedy="pass pipeline.unet, or the folder that pipeline.save_pretrained() wrote",
        )
    prepared, network = prepare_module(module, network)
    return ModelSource(name, network, prepared, digest, plan_defaults)


def _check_export(source: ModelSource, denoiser: Denoiser) -> None:
    """Compare the exported graph with its module on random inputs before it is trusted. Raises ExportError."""
    from skipstep.backends.torch import TorchDenoiser

    network = source.spec
    reference = TorchDenoiser(source.module(), network, batch_size=denoiser.batch_size)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal(reference.input.shape, dtype=np.float32)
    # Other conditioning for each sample: a graph that mixes samples would show.
    timesteps = rng.integers(0, 1000, (3, len(sample))).astype(np.float64)
    rows: dict[str, Any] = {}
    if network.prompt_shape is not None:
        rows[PROMPTS] = rng.standard_normal((len(sample), *network.prompt_shape), dtype=np.float32)
    if network.num_classes is not None:
        rows[LABELS] = rng.integers(0, network.num_classes, len(sample))
    index = np.arange(len(sample)) if rows else np.zeros(len(sample), np.int64)
    values = [each.compute(timesteps, Conditioning(rows, index)) for each in (denoiser, reference)]
    for stage, t in enumerate(timesteps):
        for each, looked_up in zip((denoiser, reference), values, strict=True):
            each.input[...] = sample
            each.new_context()(looked_up, stage)
        error = float(np.abs(denoiser.output - reference.output).max() / np.abs(reference.output).max())
        if not error <= EXPORT_TOLERANCE:
            raise ExportError(
                got=f"an exported graph that is off by {error:.2g} of the largest output at timesteps {t.tolist()}",
                expected=f"at most {EXPORT_TOLERANCE:g}",
                remedy="use backend='torch', and report the network: the exporter translated it wrongly",
            )


def _check_options(precision: str, device: str, backend: str, compile_network: bool, require_captured: bool) -> None:
    if precision not in get_args(Precision):
        raise InputError(
            got=f"precision={precision!r}", expected=", ".join(get_args(Precision)), remedy="pick one of these"
        )
    only_on_gpu = {
        f"precision={precision!r}": precision != "float32",
        "require_captured=True": require_captured,
        "compile_network=True": compile_network,
    }
    for option, given in only_on_gpu.items():
        if given and device == "cpu":
            raise InputError(
                got=f"{option} on the CPU", expected="a CUDA device", remedy="leave it out, or see device="
            )
    if compile_network and backend != "torch":
        raise InputError(
            got=f"compile_network=True with the {backend} backend",
            expected="backend='torch': torch.compile takes its modules",
            remedy="leave it out",
        )


def _resolve_device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            got=f"device={name!r}", expected="'auto', 'cpu', 'cuda' or 'cuda:N'", remedy="pick one of these"
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise DeviceUnavailableError(
                got=f"device={name!r} on a machine with {count} CUDA devices",
                expected="a CUDA device that torch can see",
                remedy="use device='cpu', or install a CUDA build of torch and a driver",
            )
    elif device.type != "cpu":
        raise InputError(
            got=f"device={name!r}", expected="'auto', 'cpu', 'cuda' or 'cuda:N'", remedy="pick one of these"
        )
    return device


def _checked_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(batch_sizes)
    if not sizes or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in sizes):
        raise InputError(
            got=f"batch_sizes={list(sizes)!r}",
            expected="at least one integer ≥ 1",
            remedy="pass e.g. batch_sizes=[1, 16]; other request sizes are split over these",
        )
    return tuple(sorted(set(sizes)))
