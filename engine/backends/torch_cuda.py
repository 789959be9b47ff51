"""The torch backend on a GPU: a network's step as a graph in the network's dtype, or what torch.compile makes of it.

What follows from timesteps and conditioning alone is computed before the loop (skipstep.backends.torch_split). A module
that torch.export cannot trace runs as it is, all of it at every stage, and `fallback` says why.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from skipstep.backends.denoiser import Enqueue, MakeDenoiser, NetworkSource, StepInput, Target
from skipstep.backends.device_step import HostInputs
from skipstep.backends.torch import module_on, plain_inputs, zero_conditioning
from skipstep.backends.torch_graph import NotTraceableError
from skipstep.backends.torch_split import SplitNetworks
from skipstep.calls.conditioning import Conditioning
from skipstep.networks.graphs import StepInputs
from skipstep.networks.spec import NetworkSpec


class TorchDeviceDenoiser:
    """A network on a GPU (skipstep.backends.denoiser.DeviceDenoiser).

    `forward` takes the sample and the step inputs, in the order of `inputs`; without `inputs` it is the module itself,
    or what torch.compile made of it, and takes timestep and conditioning. `channels_last`: the order of images in
    memory, where it is not the plain one.

    After an evaluation `output` is what `forward` returned, if the step can read that where it is.
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
        inputs: HostInputs | None = None,
        fallback: str | None = None,
        channels_last: bool = False,
    ) -> None:
        self._forward, self._tf32 = forward, tf32
        self._order = torch.channels_last if channels_last else torch.contiguous_format
        self.batch_size, self.fallback = batch_size, fallback
        self.input, self._buffer = (
            torch.zeros(batch_size, *shape, device=device, dtype=dtype).to(memory_format=self._order)
            for shape in (spec.sample_shape, spec.output_shape)
        )
        self.output = self._buffer
        self._spec, self._inputs = spec, inputs
        self.step_inputs: Mapping[str, StepInput] = _plain(spec, dtype) if inputs is None else inputs.step_inputs

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        if self._inputs is None:
            return plain_inputs(self._spec, timesteps, conditioning)
        return self._inputs.compute(timesteps, conditioning)

    def new_context(self) -> Enqueue:
        return self._enqueue

    def _enqueue(self, values: Mapping[str, Tensor], stage: Any) -> None:
        with torch.inference_mode(), library_settings(tf32=self._tf32):
            given = []
            for name, each in self.step_inputs.items():
                value = values[name]
                if each.per_stage:
                    value = value[stage] if isinstance(stage, int) else value.index_select(0, stage)[0]
                given.append(value)
            predicted = self._forward(self.input, *given)
            self.output = predicted if self._fits(predicted) else self._buffer.copy_(predicted)

    def _fits(self, predicted: Tensor) -> bool:
        """The step writes the input, so it cannot read its operand there."""
        return (
            (predicted.shape, predicted.dtype) == (self._buffer.shape, self._buffer.dtype)
            and predicted.is_contiguous(memory_format=self._order)
            and predicted.untyped_storage().data_ptr() != self.input.untyped_storage().data_ptr()
        )


def _plain(spec: NetworkSpec, dtype: torch.dtype) -> dict[str, StepInput]:
    """What a module takes after its sample. Embeddings are read in the network's own dtype, labels as they are."""
    name = str(dtype).removeprefix("torch.")
    return {
        "timestep": StepInput((), "float32" if spec.fractional_timesteps else "int64", per_stage=True),
        **{
            each: StepInput(
                tuple(value.shape[1:]),
                name if value.is_floating_point() else str(value.dtype).removeprefix("torch."),
                False,
            )
            for each, value in zero_conditioning(spec, 1).items()
        },
    }


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


def _compiled(module: nn.Module) -> Callable[..., Tensor]:
    """By torch.compile, without torch's own CUDA graphs."""
    forward: Callable[..., Tensor] = torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False)
    return forward


def denoisers(source: NetworkSource, target: Target, *, fuse_norms: bool | None = None) -> MakeDenoiser:
    """Denoisers of a copy of the source's module on the GPU, in the target's precision.

    Convolutions over images are in channels-last order, which tensor cores read; of the module's weights only the
    order in memory changes. GroupNorms become kernels of ours (skipstep.backends.torch_fusion) with `fuse_norms`; None:
    on a GPU where Triton is installed, unless torch.compile makes its own.
    """
    device, dtype = torch.device(target.device), getattr(torch, target.dtype)
    host = source.module()
    module = module_on(host, device, dtype)
    channels_last = len(source.spec.sample_shape) == 3 and all(weight.ndim < 5 for weight in module.parameters())
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if fuse_norms is None:
        has_triton = importlib.util.find_spec("triton") is not None
        fuse_norms = device.type == "cuda" and has_triton and not target.compiled
    fuse: Callable[[fx.Graph], None] | None = None
    if fuse_norms:
        from skipstep.backends.torch_fusion import fuse_norms as fuse
    networks = SplitNetworks(module, host, source.spec, fuse=fuse, channels_last=channels_last)
    run: Callable[[nn.Module], Callable[..., Tensor]] = _compiled if target.compiled else lambda module: module

    def make(batch_size: int) -> TorchDeviceDenoiser:
        inputs, fallback, last = None, None, False
        forward: nn.Module = module
        try:
            network = networks.at(batch_size)
        except NotTraceableError as refusal:
            fallback = f"the whole network runs at every stage: {refusal}"
        else:
            forward, last = network.step, network.channels_last
            inputs = HostInputs(network.early, source.spec, network.step_tensors(batch_size), batch_size=batch_size)
        return TorchDeviceDenoiser(
            run(forward),
            source.spec,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            tf32=target.precision == "tf32",
            inputs=inputs,
            fallback=fallback,
            channels_last=last,
        )

    return make
