"""What step networks on a GPU have in common: their tensors and their step inputs.

The step inputs are computed on the host before the loop (skipstep.backends.early).
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.denoiser import StepInput
from skipstep.backends.early import EarlyParts
from skipstep.calls.condition_rows import filled_rows
from skipstep.calls.conditioning import Conditioning
from skipstep.errors import ExportError
from skipstep.networks.graphs import PREDICTION, SAMPLE, StepInputs
from skipstep.networks.spec import NetworkSpec

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_RESULTS, _KEPT_BYTES, _LONG_KEY = 8, 256 << 20, 1 << 12
# NumPy has no bfloat16; the copy to the device rounds.
HOST_DTYPES: Mapping[str, type[np.generic]] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.float32,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


@dataclass(frozen=True, slots=True)
class StepTensor:
    """An input or output of a compiled step network; the leading dimension of `shape` is the batch, `dtype` by name.
    `channels_last`: the order of its memory."""

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool = False


def check_step_tensors(
    inputs: Mapping[str, StepTensor], outputs: Mapping[str, StepTensor], spec: NetworkSpec, *, batch_size: int, of: str
) -> None:
    """Whether these are the step network of `spec` at this batch size. Raises ExportError; `of` says whose they are."""

    def mismatch(got: str, expected: str) -> ExportError:
        remedy = f"build it again from this network, for batch size {batch_size}"
        return ExportError(got=f"{of} with {got}", expected=expected, remedy=remedy)

    if SAMPLE not in inputs or set(outputs) != {PREDICTION}:
        raise mismatch(
            f"inputs {', '.join(sorted(inputs))} and outputs {', '.join(sorted(outputs))}",
            f"an input {SAMPLE} and the output {PREDICTION} alone",
        )
    dtype = inputs[SAMPLE].dtype
    if dtype not in ("float32", "float16", "bfloat16"):
        raise mismatch(f"a sample of {dtype}", "float32, float16 or bfloat16")
    wanted = {
        SAMPLE: StepTensor((batch_size, *spec.sample_shape), dtype),
        PREDICTION: StepTensor((batch_size, *spec.output_shape), dtype),
    }
    for name, expected in wanted.items():
        found = inputs[name] if name == SAMPLE else outputs[name]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise mismatch(f"{name} {found.dtype} {list(found.shape)}", f"{expected.dtype} {list(expected.shape)}")
    for name, each in inputs.items():
        if each.shape[:1] != (batch_size,) or each.dtype not in HOST_DTYPES:
            raise mismatch(f"{name} {each.dtype} {list(each.shape)}", f"a row for each of {batch_size} samples")


class HostInputs:
    """The step inputs of a step network: which it reads, and what they are for a call, in host memory.

    `inputs` are the network's own but for the sample. Raises ExportError where the parts before the loop do not give
    what they ask for.
    """

    def __init__(
        self, source: EarlyParts, spec: NetworkSpec, inputs: Mapping[str, StepTensor], *, batch_size: int
    ) -> None:
        self._source = source
        self._kept: OrderedDict[Hashable, StepInputs] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        # Values that follow from a timestep alone are found by computing some; those of a stored plan are read.
        stored = np.frombuffer(next(iter(source.tables), np.zeros(1).tobytes()))
        stages = source.compute(np.repeat(stored[:, None], batch_size, axis=1), _blank(spec, batch_size))
        of_stages, of_samples = {**stages.plan, **stages.call}, stages.prompt
        self.step_inputs: dict[str, StepInput] = {}
        for name, each in inputs.items():
            known = of_stages.get(name, of_samples.get(name))
            if known is None or known.shape[1:] != each.shape[1:]:
                found = "no value" if known is None else f"{list(known.shape[1:])}"
                raise ExportError(
                    got=f"{found} for {name}, a step input of the network",
                    expected=f"{list(each.shape[1:])} from the parts of the same network",
                    remedy="build the step network again, from the same export as the other parts",
                )
            self.step_inputs[name] = StepInput(each.shape[1:], each.dtype, per_stage=name in of_stages)

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        """See Denoiser.compute. The last few results are kept, and must not be written to."""
        key = _key(timesteps, conditioning)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        values = self._source.compute(timesteps, conditioning)
        with self._lock:
            self._keep(key, values)
        return values

    def _keep(self, key: Hashable, values: StepInputs) -> None:
        num_bytes = _num_bytes(values)
        if num_bytes > _KEPT_BYTES or key in self._kept:
            return
        self._kept[key] = values
        self._kept_bytes += num_bytes
        while len(self._kept) > _KEPT_RESULTS or self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= _num_bytes(self._kept.popitem(last=False)[1])


def _num_bytes(values: StepInputs) -> int:
    return sum(array.nbytes for part in (values.plan, values.call, values.prompt) for array in part.values())


def _blank(spec: NetworkSpec, batch_size: int) -> Conditioning:
    return Conditioning(filled_rows(spec, 1), np.zeros(batch_size, np.int64))


def _key(timesteps: NDArray[np.float64], conditioning: Conditioning) -> Hashable:
    """All that the values follow from. Of prompts, which are long, a digest: a key outlives them."""
    rows = []
    for name, array in conditioning.rows.items():
        data = array.tobytes()
        short = data if len(data) <= _LONG_KEY else hashlib.sha256(data).digest()
        rows.append((name, array.dtype.char, array.shape, short))
    return timesteps.shape, timesteps.tobytes(), conditioning.index.tobytes(), tuple(rows)


def copy_row(table: Tensor, stage: int | Tensor, out: Tensor) -> None:
    """Enqueue `out` = table[stage], whether the host knows the stage or only the device does."""
    if isinstance(stage, int):
        out.copy_(table[stage], non_blocking=True)
    else:
        import torch

        torch.index_select(table, 0, stage, out=out.unsqueeze(0))
