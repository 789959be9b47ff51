"""Whether a denoiser computes the network that it was made of: a few evaluations beside those of another backend.

A graph may be translated wrongly, and a compiler may choose kernels that are wrong on one device. Two samples are
evaluated by both, each with timesteps and conditioning of its own, and repeated to fill the batch: so a denoiser that
mixes the samples of its batch shows as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from skipstep.backends.denoiser import Denoiser, DeviceDenoiser
from skipstep.calls.condition_rows import filled_rows
from skipstep.calls.conditioning import Conditioning
from skipstep.errors import ExportError
from skipstep.loops.contract import Array
from skipstep.networks.graphs import StepInputs
from skipstep.networks.spec import NetworkSpec

if TYPE_CHECKING:
    from skipstep.cuda.device import Device

# How far a network's prediction may be from the float32 reference, relative to the largest output. float32 rounding in
# another order over a few hundred layers stays below 1e-5, and a wrong operator is orders of magnitude off. Products
# round by 2^-11 in tf32 and float16 and by 2^-8 in bfloat16; over many layers that adds up at random.
TOLERANCES: Final[Mapping[str, float]] = {
    "float32": 1e-4,
    "tf32": 32 * 2.0**-11,
    "float16": 32 * 2.0**-11,
    "bfloat16": 32 * 2.0**-8,
    # Calibrated on trajectories, it cuts off more of what is compared here: random samples.
    "int8": 0.3,
    "fp8": 0.3,
}
_NUM_SAMPLES, _NUM_STAGES = 2, 3


@dataclass(frozen=True, slots=True)
class NetworkProbe:
    """Two samples `[2, *sample_shape]`, their timesteps `[E, 2]` and conditioning rows, and predictions `[E, 2, …]`."""

    sample: Array
    timesteps: Any
    rows: dict[str, Any]
    expected: Array = field(default_factory=lambda: np.empty(0, np.float32))

    @classmethod
    def of(cls, reference: Denoiser, spec: NetworkSpec) -> NetworkProbe:
        """What a denoiser of two samples in host memory predicts."""
        rng = np.random.default_rng(0)
        sample = rng.standard_normal((_NUM_SAMPLES, *spec.sample_shape), dtype=np.float32)
        timesteps = rng.integers(0, 1000, (_NUM_STAGES, _NUM_SAMPLES)).astype(np.float64)
        inputs = cls(sample, timesteps, filled_rows(spec, _NUM_SAMPLES, rng))
        return replace(inputs, expected=inputs._predictions(reference, None))

    def check(self, denoiser: Denoiser, *, precision: str = "float32", device: Device | None = None) -> float:
        """The largest error relative to the largest output. Raises ExportError beyond the tolerance of `precision`."""
        expected = self.expected[:, self._index(denoiser.batch_size)]
        found = self._predictions(denoiser, device)
        # What the network itself makes of it is not the denoiser's fault.
        known = np.isfinite(expected)
        largest = float(np.abs(expected[known]).max(initial=0.0)) or 1.0
        error = float(np.abs(found - expected)[known].max(initial=0.0)) / largest
        if not error <= TOLERANCES[precision]:
            raise ExportError(
                got=f"a network that {denoiser.name} computes in {precision} at batch size {denoiser.batch_size}, off "
                f"by {error:.2g} of its largest output",
                expected=f"at most {TOLERANCES[precision]:g}",
                remedy="use another precision, or backend='torch', and report the network"
                if precision != "float32"
                else "use backend='torch', and report the network: it was translated wrongly",
            )
        return error

    def _index(self, batch_size: int) -> Any:
        return np.arange(batch_size) % _NUM_SAMPLES

    def _predictions(self, denoiser: Denoiser, device: Device | None) -> Array:
        index = self._index(denoiser.batch_size)
        conditioning = Conditioning(self.rows, index if self.rows else np.zeros_like(index))
        values = denoiser.compute(self.timesteps[:, index], conditioning)
        if device is not None:
            return _on_device(denoiser, values, self.sample[index], device)  # type: ignore[arg-type]
        enqueue, predictions = denoiser.new_context(), []
        for stage in range(_NUM_STAGES):
            denoiser.input[...] = self.sample[index]
            enqueue(values, stage)
            predictions.append(denoiser.output.astype(np.float32))
        return np.stack(predictions)


def _on_device(denoiser: DeviceDenoiser, values: StepInputs, sample: Array, device: Device) -> Array:
    import torch

    from skipstep.loops.buffers import StagedBlock, step_input_fields

    block = StagedBlock(device, step_input_fields(denoiser, _NUM_STAGES))
    predictions = device.zeros((_NUM_STAGES, *denoiser.output.shape), torch.float32)
    # The zeros are the calling thread's, and come first.
    device.stream.follow(device.caller_stream())
    block.fill({name: values.expanded(name) for name in denoiser.step_inputs})
    given = torch.from_numpy(sample)
    enqueue = denoiser.new_context()

    def work() -> None:
        for stage in range(_NUM_STAGES):
            denoiser.input.copy_(given)
            enqueue(block.tensors, stage)
            predictions[stage].copy_(denoiser.output)

    device.stream.run(work)
    device.stream.record().synchronize()
    found: Array = predictions.cpu().numpy()
    return found
