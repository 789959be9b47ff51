"""From a model to a network that is ready to be sampled: read it, check what was asked, choose backend and loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from skipstep.backends import BackendName, resolve_backend
from skipstep.errors import DeviceUnavailableError, InputError, MissingDependencyError
from skipstep.loops.lifecycle import Lifecycle
from skipstep.loops.network_loops import device_loops, host_loops
from skipstep.loops.stepwise import Loop
from skipstep.networks.checkpoint import load_unet, read_checkpoint
from skipstep.networks.spec import NetworkSpec, network_batch_sizes, takes_fractional_timesteps

if TYPE_CHECKING:
    from skipstep.backends.torch import DenoisingModule
    from skipstep.export.partition import Partition
    from skipstep.loops.captured import Lane

LoopName = Literal["onnx", "captured", "step_graph", "stepwise"]
LOOPS: tuple[str, ...] = get_args(LoopName)
Precision = Literal["float32", "float16", "bfloat16"]


class BuildOptions(TypedDict, total=False):
    """How a network is compiled; each may be left out.

    backend         "torch", "onnxruntime", "tensorrt" or "auto" (skipstep.backends.resolve_backend has the rule).
    loop            on the CPU "onnx", the whole loop as one graph (onnxruntime), or "stepwise"; on a GPU "captured",
                    "step_graph" or "stepwise" (skipstep.loops.programs). "auto": the first of these that there is.
                    `Engine.describe` says which runs, and why it is not more.
    require_captured
                    on a GPU: raise CaptureError where a loop cannot run as `loop` says, instead of a simpler one.
    device          "cpu", "cuda", "cuda:1", or "auto": the GPU where there is one.
    precision       of the network on a GPU: "float32", "float16" or "bfloat16"; the state is always float32.
    compile_network run torch's module through torch.compile first (torch on a GPU).
    num_threads     of ONNX Runtime on the CPU; None leaves it to use every core. torch keeps its process-wide setting.
    sample_shape, num_classes, null_label, prompt_shape
                    complete what the model's configuration does not say (skipstep.networks.spec.NetworkSpec).
    fractional_timesteps
                    whether the network takes timesteps between those of its training; None: a diffusers network does
                    if its time embedding is smooth, any other module does not.
    """

    backend: str
    loop: str
    require_captured: bool
    device: str
    precision: str
    compile_network: bool
    num_threads: int | None
    sample_shape: tuple[int, int, int] | None
    num_classes: int | None
    null_label: int | None
    prompt_shape: tuple[int, int] | None
    fractional_timesteps: bool | None


@dataclass(frozen=True, slots=True)
class BuiltNetwork:
    """Loops, what a step count needs to become a Plan, and the network as graphs when asked (skipstep.loops.runner).

    `lane` is what the loops share on a GPU, None on the CPU.
    """

    name: str
    network: NetworkSpec
    loops: Mapping[int, Loop]
    backend: BackendName
    device: str
    precision: str
    any_batch: bool
    plan_defaults: Mapping[str, Any]
    parts: Callable[[], Partition]
    lifecycle: Lifecycle
    lane: Lane | None


@dataclass(frozen=True, slots=True)
class _Model:
    """A module that predicts, in eval mode, and what is known of it. `digest` is a checkpoint's."""

    name: str
    module: DenoisingModule
    network: NetworkSpec
    digest: str | None
    plan_defaults: Mapping[str, Any]


def build_network(
    model: Any,
    *,
    batch_sizes: Sequence[int],
    backend: str = "auto",
    loop: str = "auto",
    require_captured: bool = False,
    device: str = "auto",
    precision: str = "float32",
    compile_network: bool = False,
    num_threads: int | None = None,
    sample_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    null_label: int | None = None,
    prompt_shape: tuple[int, int] | None = None,
    fractional_timesteps: bool | None = None,
) -> BuiltNetwork:
    """See Engine.build and BuildOptions."""
    try:
        import torch  # noqa: F401 - for the message, where it is missing
    except ImportError as error:
        raise MissingDependencyError(
            got="no package torch", expected="torch, which builds engines", remedy="pip install 'skipstep[torch]'"
        ) from error
    resolved_device = _resolve_device(device)
    chosen = resolve_backend(backend, device=resolved_device.type)
    wanted = resolve_loop(loop, chosen, device=resolved_device.type)
    _check_options(precision, resolved_device.type, chosen, compile_network, require_captured)
    source = _read_model(
        model,
        sample_shape=sample_shape,
        num_classes=num_classes,
        null_label=null_label,
        prompt_shape=prompt_shape,
        fractional_timesteps=fractional_timesteps,
    )
    exported = lru_cache(maxsize=1)(lambda: _exported(source))
    sizes = network_batch_sizes(source.network, batch_sizes)
    lifecycle = Lifecycle()
    lane: Lane | None = None
    loops: Mapping[int, Loop]
    if resolved_device.type == "cpu":
        loops = host_loops(source.module, source.network, exported, chosen, wanted, sizes, num_threads)
    else:
        from skipstep.cuda.device import CudaDevice
        from skipstep.loops.captured import Lane

        lane = Lane(CudaDevice(resolved_device), lifecycle)
        with lane.device.range(f"skipstep build {source.name}"):
            loops = device_loops(
                source.module,
                source.network,
                exported,
                chosen,
                lane,
                batch_sizes,
                wanted=wanted,
                required=require_captured,
                precision=precision,
                compiled=compile_network,
            )
    return BuiltNetwork(
        source.name,
        source.network,
        loops,
        chosen,
        str(resolved_device if lane is None else lane.device.torch_device),
        precision,
        wanted == "onnx",
        source.plan_defaults,
        exported,
        lifecycle,
        lane,
    )


def _read_model(
    model: Any,
    *,
    sample_shape: tuple[int, int, int] | None,
    num_classes: int | None,
    null_label: int | None,
    prompt_shape: tuple[int, int] | None,
    fractional_timesteps: bool | None,
) -> _Model:
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
    return _Model(name, prepared, network, digest, plan_defaults)


def _exported(source: _Model) -> Partition:
    """The network's parts. A checkpoint's export is kept in the user's cache: it takes longer than all the rest."""
    from skipstep.backends.torch import module_on
    from skipstep.bundles.cache import ArtefactCache
    from skipstep.bundles.cache_key import cache_key
    from skipstep.export.onnx_model import export_onnx, exporter_versions
    from skipstep.export.partition import partition

    network = source.network

    def export() -> bytes:
        return export_onnx(module_on(source.module, "cpu"), network)

    if source.digest is None:
        return partition(export())
    key = cache_key(kind="network.onnx", weights=source.digest, network=repr(network), exporter=exporter_versions())
    description = f"{type(source.module.network).__name__} {network.sample_shape}, exported to ONNX"
    return partition(ArtefactCache().get_or_build(key, export, description))


def resolve_loop(name: str, backend: BackendName, *, device: str) -> LoopName:
    """Turn "auto" into the loop that leaves the host least to do: one launch a call where there is such a form.

    On a GPU that is what is tried first, and the engine reports what it came to. Raises InputError for an unknown name,
    and for a loop that there is not.
    """
    there: tuple[LoopName, ...] = ("captured", "step_graph", "stepwise")
    if device == "cpu":
        there = ("onnx", "stepwise") if backend == "onnxruntime" else ("stepwise",)
    if name == "auto":
        return there[0]
    for known in there:
        if name == known:
            return known
    raise InputError(
        got=f"loop={name!r} with the {backend} backend on {device}",
        expected=f"'auto', or one of {', '.join(there)}",
        remedy="use 'auto' to let the engine choose",
    )


def _check_options(
    precision: str, device: str, backend: BackendName, compile_network: bool, require_captured: bool
) -> None:
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
