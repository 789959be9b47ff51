"""The torch backend: any nn.Module that predicts noise, run as it is. It is the reference for every other backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skipstep.conditioning import LABELS, PROMPTS, Conditioning
from skipstep.errors import InputError
from skipstep.network import NetworkSpec


class DenoisingModule(nn.Module):
    """One calling convention over what networks return: a tensor, a tuple, or diffusers' output with `.sample`.

    forward(sample [N, C, H, W], timestep int64 or float32 [N], conditioning [N, …], each) -> [N, C or 2C, H, W].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, *conditioning: Tensor) -> Tensor:
        output = self.network(sample, timestep, *conditioning)
        if isinstance(output, Tensor):
            return output
        predicted = getattr(output, "sample", None)
        return predicted if isinstance(predicted, Tensor) else output[0]


def prepare_module(
    network: nn.Module, spec: NetworkSpec, *, device: torch.device, dtype: torch.dtype
) -> tuple[DenoisingModule, NetworkSpec]:
    """Check a network once, on zeros, and wrap it. It is put into eval mode; nothing else of it is changed.

    Returns it with what its output tells: 2C channels are a learned variance.
    Raises InputError for weights of another dtype or device than asked, and for an output of another shape.
    """
    for name, parameter in network.named_parameters():
        if parameter.dtype != dtype or parameter.device.type != device.type:
            raise InputError(
                got=f"a network whose {name} is {parameter.dtype} on {parameter.device}",
                expected=f"{dtype} on {device}",
                remedy=f"call network.to(device={str(device)!r}, dtype={dtype}) first",
            )
    module = DenoisingModule(network).eval()
    sample = torch.zeros(1, *spec.sample_shape, device=device, dtype=dtype)
    timestep = torch.zeros(1, device=device, dtype=_timestep_dtype(spec))
    conditioning = [tensor.to(device) for tensor in zero_conditioning(spec, 1).values()]
    with torch.inference_mode():
        try:
            output = module(sample, timestep, *conditioning)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                got=f"{type(error).__name__} from the network: {error}",
                expected=f"network(sample {list(sample.shape)}, timestep [1]"
                + "".join(f", {name}" for name in zero_conditioning(spec, 1))
                + ") to return a prediction",
                remedy="check sample_shape, prompt_shape and num_classes, or wrap the network in a module with this "
                "signature",
            ) from error
    channels, height, width = spec.sample_shape
    learns_variance = output.shape == (1, 2 * channels, height, width)
    if output.shape != sample.shape and not learns_variance:
        raise InputError(
            got=f"a network that returns {list(output.shape)} for {list(sample.shape)}",
            expected="an output of the input's shape, or with twice its channels where the variance is learned",
            remedy="check sample_shape, or wrap the network",
        )
    return module, replace(spec, learns_variance=learns_variance)


def zero_conditioning(spec: NetworkSpec, batch_size: int) -> dict[str, Tensor]:
    """The conditioning that the network takes after its timestep, by name, in the order of its arguments."""
    inputs: dict[str, Tensor] = {}
    if spec.prompt_shape is not None:
        inputs[PROMPTS] = torch.zeros(batch_size, *spec.prompt_shape)
    if spec.num_classes is not None:
        inputs[LABELS] = torch.zeros(batch_size, dtype=torch.int64)
    return inputs


def _timestep_dtype(spec: NetworkSpec) -> torch.dtype:
    return torch.float32 if spec.fractional_timesteps else torch.int64


class TorchDenoiser:
    """A module behind static buffers. `input` and `output` are NumPy arrays on the CPU and tensors on a GPU."""

    def __init__(
        self, module: DenoisingModule, spec: NetworkSpec, *, batch_size: int, device: torch.device, dtype: torch.dtype
    ):
        self._module = module
        self._sample = torch.zeros(batch_size, *spec.sample_shape, device=device, dtype=dtype)
        self._prediction = torch.zeros(batch_size, *spec.output_shape, device=device, dtype=dtype)
        self._timesteps = torch.zeros(0, batch_size, device=device, dtype=_timestep_dtype(spec))
        self._names = tuple(zero_conditioning(spec, 1))
        self._conditioning: list[Tensor] = []
        on_host = device.type == "cpu"
        self.batch_size = batch_size
        self.input: Any = self._sample.numpy() if on_host else self._sample
        self.output: Any = self._prediction.numpy() if on_host else self._prediction

    def prepare(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> None:
        device = self._sample.device
        # All rows are on the device before the loop: a scalar read inside it would stall the GPU at every step.
        self._timesteps = torch.from_numpy(timesteps).to(device=device, dtype=self._timesteps.dtype)
        self._conditioning = [torch.from_numpy(conditioning.per_sample(name)).to(device) for name in self._names]

    def enqueue(self, stage: int) -> None:
        with torch.inference_mode():
            self._prediction.copy_(self._module(self._sample, self._timesteps[stage], *self._conditioning))
