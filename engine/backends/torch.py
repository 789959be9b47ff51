"""The torch backend on the CPU: any nn.Module that predicts, run as it is. It is the reference for other backends."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skipstep.backends.denoiser import Enqueue, MakeDenoiser, NetworkSource, Target
from skipstep.backends.module_call import ModuleCall, Watched
from skipstep.calls.condition_rows import filled_rows
from skipstep.calls.conditioning import Conditioning, distinct
from skipstep.errors import InputError
from skipstep.networks.graphs import StepInputs
from skipstep.networks.spec import NetworkSpec, network_state_scale

NETWORK_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class DenoisingModule(nn.Module):
    """One calling convention over what networks return: a tensor, a tuple, or diffusers' output with `.sample`.

    forward(sample [N, C, …], timestep int64 or float32 [N], condition [N, …], …) -> [N, C or 2C, …]. The conditions
    come in the order of NetworkSpec.all_conditions; without a specification all are passed on by position.
    """

    def __init__(self, network: nn.Module, spec: NetworkSpec | None = None) -> None:
        super().__init__()
        self.network = network
        self._call = ModuleCall.of(network, {} if spec is None else spec.all_conditions)
        self._spec = spec

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        return self._evaluated(*self._call.arranged(self._scaled(sample, timestep), timestep, conditions))

    def ignored(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> tuple[Tensor, set[str]]:
        """The prediction, and the conditions that the network did not look at."""
        arguments, keywords = self._call.arranged(self._scaled(sample, timestep), timestep, conditions, Watched)
        found = [each for each in keywords.values() if isinstance(each, Watched)]
        for each in found:
            each.seen.clear()  # Lists of entries were read to be filled.
        output = self._evaluated(arguments, keywords)
        return output, {name for each in found for name in each.keys() - each.seen}

    def _scaled(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The state as the network reads it (skipstep.plans.parameterization)."""
        if self._spec is None or self._spec.state == "vp":
            return sample
        scale: Tensor = network_state_scale(self._spec, timestep.float(), of=torch)
        return sample * scale.to(sample.dtype).reshape(-1, *[1] * (sample.ndim - 1))

    def _evaluated(self, arguments: Sequence[Tensor], keywords: Mapping[str, Any]) -> Tensor:
        output = self.network(*arguments, **keywords)
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
    module = DenoisingModule(network, spec).eval()
    sample = torch.zeros(1, *spec.sample_shape, device=device, dtype=dtype)
    timestep = torch.zeros(1, device=device, dtype=timestep_dtype(spec))
    conditioning = [
        tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for tensor in zero_conditioning(spec, 1).values()
    ]
    with torch.inference_mode():
        try:
            output, ignored = module.ignored(sample, timestep, *conditioning)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                got=f"{type(error).__name__} from the network: {error}",
                expected=f"network(sample {list(sample.shape)}, timestep [1]"
                + "".join(f", {name}" for name in zero_conditioning(spec, 1))
                + ") to return a prediction",
                remedy="check sample_shape, prompt_shape, num_classes and conditions, or wrap the network in a module "
                "with this signature",
            ) from error
    if ignored:
        raise InputError(
            got=f"conditions that the network does not read: {', '.join(sorted(ignored))}",
            expected="those that its configuration asks for",
            remedy="leave them out, or check their names",
        )
    learns_variance = output.shape == (1, *replace(spec, learns_variance=True).output_shape)
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
    return {name: torch.from_numpy(rows) for name, rows in filled_rows(spec, batch_size).items()}


def timestep_dtype(spec: NetworkSpec) -> torch.dtype:
    return torch.float32 if spec.fractional_timesteps else torch.int64


class TorchDenoiser:
    """A module on the CPU, behind buffers that NumPy and torch share (skipstep.backends.denoiser.Denoiser).

    `lock` is shared by all denoisers of a module, which runs one call at a time: it may keep state between calls.
    """

    name = "torch"

    def __init__(
        self, module: DenoisingModule, spec: NetworkSpec, *, batch_size: int, lock: threading.Lock | None = None
    ) -> None:
        self._module = module
        self._spec = spec
        self._lock = lock or threading.Lock()
        self._sample = torch.zeros(batch_size, *spec.sample_shape)
        self._prediction = torch.zeros(batch_size, *spec.output_shape)
        self._names = tuple(zero_conditioning(spec, 1))
        self.batch_size = batch_size
        self.input: Any = self._sample.numpy()
        self.output: Any = self._prediction.numpy()

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        return plain_inputs(self._spec, timesteps, conditioning)

    def new_context(self) -> Enqueue:
        return self._enqueue

    def _enqueue(self, values: StepInputs, stage: int) -> None:
        timestep, *conditioning = (_rows(values, name, stage) for name in ("timestep", *self._names))
        with torch.inference_mode(), self._lock:
            self._prediction.copy_(self._module(self._sample, timestep, *conditioning))


def _rows(values: StepInputs, name: str, stage: int) -> Tensor:
    table, rows = values.row(name, stage)
    return torch.from_numpy(table[rows])


def plain_inputs(spec: NetworkSpec, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
    """Step inputs of a network from which nothing was moved: its timestep and its conditioning."""
    distinct_timesteps, index = distinct(timesteps)
    plan = {"timestep": distinct_timesteps.astype(spec.timestep_dtype)}
    return StepInputs(plan, {}, dict(conditioning.rows), index, index, conditioning.index)


def denoisers(source: NetworkSource, target: Target) -> MakeDenoiser:
    """Denoisers of the source's module on the CPU, for any batch size. torch keeps its process-wide thread count."""
    module, lock = source.module(), threading.Lock()
    return lambda batch_size: TorchDenoiser(module, source.spec, batch_size=batch_size, lock=lock)
