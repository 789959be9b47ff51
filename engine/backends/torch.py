"""The torch backend: any nn.Module that predicts noise, run as it is. It is the reference for every other backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skipstep.backends.denoiser import Constant, Enqueue, Stage
from skipstep.calls.conditioning import LABELS, PROMPTS, Conditioning
from skipstep.errors import InputError
from skipstep.networks.spec import NetworkSpec

NETWORK_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def prepare_module(network: nn.Module, spec: NetworkSpec) -> tuple[DenoisingModule, NetworkSpec]:
    """Check a network once, on zeros, where it is, and wrap it. It is put into eval mode; nothing else is changed.

    Returns it with what its output tells: 2C channels are a learned variance.
    Raises InputError for weights of mixed dtypes or devices, or of a dtype that no network is run in, and for an output
    of another shape.
    """
    parameters = dict(network.named_parameters())
    devices = {parameter.device for parameter in parameters.values()} or {torch.device("cpu")}
    dtypes = {parameter.dtype for parameter in parameters.values()} or {torch.float32}
    for name, parameter in parameters.items():
        if parameter.dtype not in NETWORK_DTYPES or len(devices) > 1 or len(dtypes) > 1:
            raise InputError(
                got=f"a network whose {name} is {parameter.dtype} on {parameter.device}",
                expected="float32, float16 or bfloat16 throughout, on one device; precision= converts it",
                remedy="call network.float() and network.to(device) first",
            )
    (device,), (dtype,) = devices, dtypes
    module = DenoisingModule(network).eval()
    sample = torch.zeros(1, *spec.sample_shape, device=device, dtype=dtype)
    timestep = torch.zeros(1, device=device, dtype=_timestep_dtype(spec))
    conditioning = [
        tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for tensor in zero_conditioning(spec, 1).values()
    ]
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


def module_on(
    module: DenoisingModule, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> DenoisingModule:
    """The module there and in that dtype: itself, or a copy where it is not."""
    device = torch.device(device)
    there = all(p.dtype == dtype and p.device == device for p in module.parameters())
    return module if there else copy.deepcopy(module).to(device=device, dtype=dtype)


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
    """A module on the CPU, behind buffers that NumPy and torch share."""

    def __init__(self, module: DenoisingModule, spec: NetworkSpec, *, batch_size: int) -> None:
        self._module = module
        self._sample = torch.zeros(batch_size, *spec.sample_shape)
        self._prediction = torch.zeros(batch_size, *spec.output_shape)
        self._timesteps = torch.zeros(0, batch_size, dtype=_timestep_dtype(spec))
        self._names = tuple(zero_conditioning(spec, 1))
        self._conditioning: list[Tensor] = []
        self.batch_size = batch_size
        self.input: Any = self._sample.numpy()
        self.output: Any = self._prediction.numpy()

    def prepare(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> None:
        self._timesteps = torch.from_numpy(timesteps).to(self._timesteps.dtype)
        self._conditioning = [torch.from_numpy(conditioning.per_sample(name)) for name in self._names]

    def enqueue(self, stage: int) -> None:
        with torch.inference_mode():
            self._prediction.copy_(self._module(self._sample, self._timesteps[stage], *self._conditioning))


class TorchDeviceDenoiser:
    """A module on a GPU (skipstep.backends.denoiser). `forward` runs it: the module itself, or what compiled it."""

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
        self._names = tuple(zero_conditioning(spec, 1))
        self.constants: Mapping[str, Constant] = {
            "timestep": Constant((), _timestep_dtype(spec), per_stage=True),
            # Embeddings are read in the network's own dtype, labels as they are.
            **{
                name: Constant(tuple(tensor.shape[1:]), dtype if tensor.is_floating_point() else tensor.dtype, False)
                for name, tensor in zero_conditioning(spec, 1).items()
            },
        }

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> dict[str, NDArray[Any]]:
        return {"timestep": timesteps, **{name: conditioning.per_sample(name) for name in self._names}}

    def new_context(self) -> Enqueue:
        return self._enqueue

    def _enqueue(self, constants: Mapping[str, Tensor], stage: Stage) -> None:
        timesteps = constants["timestep"]
        with torch.inference_mode():
            timestep = timesteps[stage] if isinstance(stage, int) else timesteps.index_select(0, stage)[0]
            conditioning = [constants[name] for name in self._names]
            self.output.copy_(self._forward(self.input, timestep, *conditioning))


def device_forward(module: DenoisingModule, *, compiled: bool) -> Callable[..., Tensor]:
    """How to run a module on a GPU: convolutions in channels-last order, which tensor cores read; `compiled` by
    torch.compile, without graphs of its own. The module's weights are laid out anew in place; nothing else changes."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not compiled:
        return module
    forward: Callable[..., Tensor] = torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False)
    return forward
