"""From a model to loops: read the checkpoint, choose the backend, make one denoiser per batch size of the network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import numpy as np

from skipstep.backends import BackendName, Denoiser, resolve_backend
from skipstep.checkpoint import load_unet, read_checkpoint
from skipstep.conditioning import LABELS, PROMPTS, Conditioning
from skipstep.errors import DeviceUnavailableError, ExportError, InputError, MissingDependencyError
from skipstep.loop import HostLoop, Loop
from skipstep.network import NetworkSpec, network_batch_sizes, takes_fractional_timesteps

if TYPE_CHECKING:
    from skipstep.export.partition import Partition

# How far an exported graph may be from the module it came from, relative to the largest output: float32 rounding in
# another order over a few hundred layers stays below 1e-5, a wrong operator is orders of magnitude off.
EXPORT_TOLERANCE = 1e-4

LoopName = Literal["stepwise", "onnx"]
LOOPS: tuple[str, ...] = get_args(LoopName)


class BuildOptions(TypedDict, total=False):
    """How a network is compiled; each may be left out.

    backend         "torch", "onnxruntime" or "auto" (skipstep.backends.resolve_backend has the rule).
    loop            "onnx", the whole loop as one graph (onnxruntime), "stepwise", or "auto": the first where it is
                    there. `Engine.describe` says which.
    device          "cpu", "cuda", "cuda:1", or "auto": the GPU where there is one.
    num_threads     of ONNX Runtime; None leaves it to use every core. torch keeps its process-wide setting.
    sample_shape, num_classes, null_label, prompt_shape
                    complete what the model's configuration does not say (skipstep.network.NetworkSpec).
    fractional_timesteps
                    whether the network takes timesteps between those of its training; None: a diffusers network does
                    if its time embedding is smooth, any other module does not.
    """

    backend: str
    loop: str
    device: str
    num_threads: int | None
    sample_shape: tuple[int, int, int] | None
    num_classes: int | None
    null_label: int | None
    prompt_shape: tuple[int, int] | None
    fractional_timesteps: bool | None


@dataclass(frozen=True, slots=True)
class BuiltNetwork:
    """Loops, what a step count needs to become a Plan, and the network as graphs when asked (skipstep.sampler)."""

    name: str
    network: NetworkSpec
    loops: Mapping[int, Loop]
    backend: BackendName
    device: str
    any_batch: bool
    plan_defaults: Mapping[str, Any]
    parts: Callable[[], Partition]


def build_network(
    model: Any,
    *,
    batch_sizes: Sequence[int],
    backend: str = "auto",
    loop: str = "auto",
    device: str = "auto",
    num_threads: int | None = None,
    sample_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    null_label: int | None = None,
    prompt_shape: tuple[int, int] | None = None,
    fractional_timesteps: bool | None = None,
) -> BuiltNetwork:
    """See Engine.build and BuildOptions."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            got="no package torch", expected="torch, which builds engines", remedy="pip install 'skipstep[torch]'"
        ) from error
    from skipstep.backends.torch import TorchDenoiser, prepare_module

    resolved_device = _resolve_device(device)
    chosen = resolve_backend(backend, device=resolved_device.type)
    kind = resolve_loop(loop, chosen)
    plan_defaults: dict[str, Any] = {}
    name, digest = type(model).__name__, None
    if isinstance(model, str | os.PathLike):
        checkpoint = read_checkpoint(model)
        name, digest = checkpoint.folder.resolve().name, checkpoint.digest()
        module = load_unet(checkpoint).to(resolved_device)
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

    prepared, network = prepare_module(module, network, device=resolved_device, dtype=torch.float32)
    sizes = network_batch_sizes(network, batch_sizes)
    loops: dict[int, Loop] = {}

    @lru_cache(maxsize=1)
    def exported() -> Partition:
        return _exported(prepared, network, digest)

    if chosen == "onnxruntime":
        from skipstep.backends.onnxruntime import LoopConstants, OnnxRuntimeDenoiser, make_session
        from skipstep.export.onnx_loop import build_loop
        from skipstep.graph_loop import GraphLoop
        from skipstep.loop_sessions import LoopSessions

        parts = exported()
        constants = LoopConstants(parts.graphs.before_loop, network, num_threads)

        step = make_session(parts.graphs.step, num_threads=num_threads)
        check_equal(
            OnnxRuntimeDenoiser(step, constants, network, batch_size=2),
            TorchDenoiser(prepared, network, batch_size=2, device=resolved_device, dtype=torch.float32),
            network,
        )
        if kind == "stepwise":
            loops = {
                size: HostLoop(OnnxRuntimeDenoiser(step, constants, network, batch_size=size), network)
                for size in sizes
            }
        else:
            sessions = LoopSessions(
                lambda features: make_session(build_loop(parts, network, features), num_threads=num_threads)
            )
            loops = {0: GraphLoop(sessions, constants, network)}
    else:
        for size in sizes:
            denoiser: Denoiser = TorchDenoiser(
                prepared, network, batch_size=size, device=resolved_device, dtype=torch.float32
            )
            if resolved_device.type == "cpu":
                loops[size] = HostLoop(denoiser, network)
            else:
                from skipstep.cuda_loop import CudaLoop

                loops[size] = CudaLoop(denoiser, network, resolved_device)
    return BuiltNetwork(name, network, loops, chosen, str(resolved_device), kind == "onnx", plan_defaults, exported)


def _exported(prepared: Any, network: NetworkSpec, digest: str | None) -> Partition:
    """The network's parts. A checkpoint's export is kept in the user's cache: it takes longer than all the rest."""
    from skipstep.cache import ArtefactCache, cache_key
    from skipstep.export.onnx_model import export_onnx, exporter_versions
    from skipstep.export.partition import partition

    if digest is None:
        return partition(export_onnx(prepared, network))
    key = cache_key(kind="network.onnx", weights=digest, network=repr(network), exporter=exporter_versions())
    description = f"{type(prepared.network).__name__} {network.sample_shape}, exported to ONNX"
    return partition(ArtefactCache().get_or_build(key, lambda: export_onnx(prepared, network), description))


def resolve_loop(name: str, backend: BackendName) -> LoopName:
    """Turn "auto" into a loop: the whole loop as one graph where there is one, with onnxruntime; else stepwise.

    Raises InputError for an unknown name, and for a loop that the backend has not.
    """
    if name == "auto":
        return "onnx" if backend == "onnxruntime" else "stepwise"
    if name not in LOOPS or (name == "onnx" and backend != "onnxruntime"):
        raise InputError(
            got=f"loop={name!r} with the {backend} backend",
            expected="'auto', 'stepwise', or 'onnx' with onnxruntime",
            remedy="use 'auto' to let the engine choose",
        )
    return "onnx" if name == "onnx" else "stepwise"


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


def check_equal(denoiser: Denoiser, reference: Denoiser, network: NetworkSpec) -> None:
    """Compare a graph with its module on random inputs before it is trusted. Raises ExportError."""
    rng = np.random.default_rng(0)
    sample = rng.standard_normal(reference.input.shape, dtype=np.float32)
    # Other conditioning for each sample: what a graph mixed between them would show.
    timesteps = rng.integers(0, 1000, (3, len(sample))).astype(np.float64)
    rows: dict[str, Any] = {}
    if network.prompt_shape is not None:
        rows[PROMPTS] = rng.standard_normal((len(sample), *network.prompt_shape), dtype=np.float32)
    if network.num_classes is not None:
        rows[LABELS] = rng.integers(0, network.num_classes, len(sample))
    for each in (denoiser, reference):
        each.input[...] = sample
        each.prepare(timesteps, Conditioning(rows, np.arange(len(sample)) if rows else np.zeros(len(sample), np.int64)))
    for stage, t in enumerate(timesteps):
        denoiser.enqueue(stage)
        reference.enqueue(stage)
        error = float(np.abs(denoiser.output - reference.output).max() / np.abs(reference.output).max())
        if not error <= EXPORT_TOLERANCE:
            raise ExportError(
                got=f"an exported graph that is off by {error:.2g} of the largest output at timesteps {t.tolist()}",
                expected=f"at most {EXPORT_TOLERANCE:g}",
                remedy="use backend='torch', and report the network: the exporter translated it wrongly",
            )
