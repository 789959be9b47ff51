"""A network's loops, by its batch size: on the CPU, or on a GPU. Graphs are compared with their module before use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from skipstep.backends import BackendName, Denoiser
from skipstep.calls.conditioning import LABELS, PROMPTS, Conditioning
from skipstep.errors import ExportError
from skipstep.loops.stepwise import HostLoop, Loop
from skipstep.networks.spec import NetworkSpec, network_batch_sizes

if TYPE_CHECKING:
    from skipstep.backends.denoiser import DeviceDenoiser
    from skipstep.backends.torch import DenoisingModule
    from skipstep.loops.captured import CudaLoop, Lane
    from skipstep.networks.graphs import Partition

# How far an exported graph may be from the module it came from, relative to the largest output: float32 rounding in
# another order over a few hundred layers stays below 1e-5, a wrong operator is orders of magnitude off.
EXPORT_TOLERANCE = 1e-4


def host_loops(
    source: DenoisingModule,
    network: NetworkSpec,
    exported: Callable[[], Partition],
    backend: BackendName,
    sizes: Sequence[int],
    num_threads: int | None,
) -> dict[int, Loop]:
    """Loops on the CPU, by the network's batch size."""
    from skipstep.backends.torch import TorchDenoiser, module_on

    module = module_on(source, "cpu")
    if backend == "torch":
        return {size: HostLoop(TorchDenoiser(module, network, batch_size=size), network) for size in sizes}

    from skipstep.backends.onnxruntime import LoopConstants, OnnxRuntimeDenoiser, make_session

    parts = exported()
    constants = LoopConstants(parts.graphs.before_loop, network, num_threads)
    step = make_session(parts.graphs.step, num_threads=num_threads)
    check_equal(
        OnnxRuntimeDenoiser(step, constants, network, batch_size=2),
        TorchDenoiser(module, network, batch_size=2),
        network,
    )
    return {size: HostLoop(OnnxRuntimeDenoiser(step, constants, network, batch_size=size), network) for size in sizes}


def device_loops(
    source: DenoisingModule,
    network: NetworkSpec,
    exported: Callable[[], Partition],
    backend: BackendName,
    lane: Lane,
    batch_sizes: Sequence[int],
    *,
    wanted: str,
    required: bool,
    precision: str,
    compiled: bool,
) -> Mapping[int, Loop]:
    """Loops on a GPU, by the network's batch size."""
    import torch

    device = lane.device.torch_device
    sizes = network_batch_sizes(network, batch_sizes)
    denoisers: Mapping[int, DeviceDenoiser]
    if backend == "torch":
        from skipstep.backends.torch import TorchDeviceDenoiser, device_forward, module_on

        dtype = getattr(torch, precision)
        forward = device_forward(module_on(source, device, dtype), compiled=compiled)
        denoisers = {
            size: TorchDeviceDenoiser(forward, network, batch_size=size, device=device, dtype=dtype) for size in sizes
        }
    elif backend == "tensorrt":
        from skipstep.backends.tensorrt import denoisers_from_partition

        denoisers = denoisers_from_partition(exported(), network, sizes, precision=precision, device=device)
    else:
        from skipstep.backends.onnxruntime_cuda import denoisers_from_partition as onnxruntime_denoisers

        denoisers = onnxruntime_denoisers(
            exported(),
            network,
            sizes,
            precision=precision,
            device=device,
            stream=getattr(lane.device.stream, "torch_stream", None),
        )
    return make_device_loops(denoisers, network, lane, batch_sizes, wanted=wanted, required=required)


def make_device_loops(
    denoisers: Mapping[int, DeviceDenoiser],
    network: NetworkSpec,
    lane: Lane,
    batch_sizes: Sequence[int],
    *,
    wanted: str,
    required: bool,
) -> dict[int, CudaLoop]:
    """A loop for each denoiser, which prepares for the calls that will come to it: with guidance, without, or both."""
    from skipstep.loops.captured import CudaLoop
    from skipstep.loops.programs import LADDER

    all_copies = (1, 2) if network.can_guide else (1,)
    return {
        size: CudaLoop(
            denoiser,
            network,
            lane,
            wanted=next(name for name in LADDER if name == wanted),
            required=required,
            copies=[copies for copies in all_copies if size in {copies * each for each in batch_sizes}],
        )
        for size, denoiser in denoisers.items()
    }


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
