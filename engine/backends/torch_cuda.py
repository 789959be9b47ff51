"""The torch backend on a GPU: the module itself in the network's dtype, or what torch.compile makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstep.backends.denoiser import Enqueue, MakeDenoiser, NetworkSource, StepInput, Target
from skipstep.backends.torch import DenoisingModule, module_on, plain_inputs, zero_conditioning
from skipstep.calls.conditioning import Conditioning
from skipstep.networks.graphs import StepInputs
from skipstep.networks.spec import NetworkSpec


class TorchDeviceDenoiser:
    """A module on a GPU (skipstep.backends.denoiser.DeviceDenoiser).

    `forward` runs it: the module itself, or what torch.compile made of it.
    """

    name = "torch"
    capture_refusal: str | None = None

    def __init__(
        self,
        forward: Callable[..., Tensor],
        spec: NetworkSpec,
        *,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        tf32: bool = False,
    ) -> None:
        self._forward, self._tf32 = forward, tf32
        self.batch_size = batch_size
        self.input = torch.zeros(batch_size, *spec.sample_shape, device=device, dtype=dtype)
        self.output = torch.zeros(batch_size, *spec.output_shape, device=device, dtype=dtype)
        self._spec = spec
        self._names = tuple(zero_conditioning(spec, 1))
        network_dtype = str(dtype).removeprefix("torch.")
        self.step_inputs: Mapping[str, StepInput] = {
            "timestep": StepInput((), "float32" if spec.fractional_timesteps else "int64", per_stage=True),
            # Embeddings are read in the network's own dtype, labels as they are.
            **{
                name: StepInput(tuple(each.shape[1:]), network_dtype if each.is_floating_point() else "int64", False)
                for name, each in zero_conditioning(spec, 1).items()
            },
        }

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        return plain_inputs(self._spec, timesteps, conditioning)

    def new_context(self) -> Enqueue:
        return self._enqueue

    def _enqueue(self, values: Mapping[str, Tensor], stage: Any) -> None:
        timesteps = values["timestep"]
        with torch.inference_mode(), library_settings(tf32=self._tf32):
            timestep = timesteps[stage] if isinstance(stage, int) else timesteps.index_select(0, stage)[0]
            conditioning = [values[name] for name in self._names]
            self.output.copy_(self._forward(self.input, timestep, *conditioning))


@contextlib.contextmanager
def library_settings(*, tf32: bool) -> Iterator[None]:
    """What cuDNN and cuBLAS may do while a network is launched, whatever the process has chosen for itself.

    Without `tf32` float32 is float32; torch's default for convolutions is not. cuDNN tries its algorithms when it meets
    a convolution for the first time, in the warm-up, and keeps the fastest: so one process draws the same bits at every
    call, and two processes need not.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    # The settings by operator can be read whichever of torch's two interfaces set them.
    named = (cudnn.conv, cudnn.rnn, matmul)
    before = [each.fp32_precision for each in named]
    benchmark, cudnn.benchmark = cudnn.benchmark, True
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    for each in named:  # Said outright, or a default of the process would count.
        each.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        cudnn.benchmark = benchmark
        cudnn.allow_tf32, matmul.allow_tf32 = before[0] == "tf32", before[2] == "tf32"
        for each, precision in zip(named, before, strict=True):
            each.fp32_precision = precision


def device_forward(module: DenoisingModule, *, compiled: bool) -> Callable[..., Tensor]:
    """How to run a module on a GPU: convolutions in channels-last order, which tensor cores read; `compiled` by
    torch.compile, without torch's own CUDA graphs. Only the memory layout of the module's weights changes."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not compiled:
        return module
    forward: Callable[..., Tensor] = torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False)
    return forward


def denoisers(source: NetworkSource, target: Target) -> MakeDenoiser:
    """Denoisers of a copy of the source's module on the GPU, in the target's precision."""
    device, dtype = torch.device(target.device), getattr(torch, target.dtype)
    forward = device_forward(module_on(source.module(), device, dtype), compiled=target.compiled)
    return lambda batch_size: TorchDeviceDenoiser(
        forward, source.spec, batch_size=batch_size, device=device, dtype=dtype, tf32=target.precision == "tf32"
    )
