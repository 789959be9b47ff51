"""The torch backend on a GPU: the module itself in the network's dtype, or what torch.compile makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    ) -> None:
        self._forward = forward
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
        with torch.inference_mode():
            timestep = timesteps[stage] if isinstance(stage, int) else timesteps.index_select(0, stage)[0]
            conditioning = [values[name] for name in self._names]
            self.output.copy_(self._forward(self.input, timestep, *conditioning))


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
    device, dtype = torch.device(target.device), getattr(torch, target.precision)
    forward = device_forward(module_on(source.module(), device, dtype), compiled=target.compiled)
    return lambda batch_size: TorchDeviceDenoiser(
        forward, source.spec, batch_size=batch_size, device=device, dtype=dtype
    )
