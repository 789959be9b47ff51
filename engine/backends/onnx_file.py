"""Somebody's .onnx file, run as it is: the reference for what was made of it.

Each sample is evaluated alone, with its own timestep and conditions, repeated to the batch that the file fixes. So the
comparison shows whether another graph mixes samples or gives all of them one timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.denoiser import Enqueue
from skipstep.backends.onnxruntime import make_session, run_session
from skipstep.calls.conditioning import Conditioning, distinct
from skipstep.networks.graphs import SAMPLE, StepInputs
from skipstep.networks.spec import NetworkSpec, network_state_scale

# ONNX's numbers for element types.
_DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64}


@dataclass(frozen=True, slots=True)
class FileInput:
    """An input of the file: our name for it, its own, its element type in ONNX's numbers, its rank, and how many rows
    it takes for one sample."""

    role: str
    name: str
    elem_type: int
    rank: int
    rows: int


class FileDenoiser:
    """The file's graph behind buffers in host memory (skipstep.backends.denoiser.Denoiser)."""

    name = "the file itself"

    def __init__(
        self,
        graph: bytes,
        inputs: Sequence[FileInput],
        output: str,
        spec: NetworkSpec,
        *,
        batch_size: int,
    ) -> None:
        self._session = make_session(graph)
        self._inputs, self._output, self._spec = inputs, output, spec
        self.batch_size = batch_size
        self.input = np.zeros((batch_size, *spec.sample_shape), np.float32)
        self.output = np.zeros((batch_size, *spec.output_shape), np.float32)

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        distinct_timesteps, index = distinct(timesteps)
        plan = {"timestep": distinct_timesteps.astype(self._spec.timestep_dtype)}
        return StepInputs(plan, {}, dict(conditioning.rows), index, index, conditioning.index)

    def new_context(self) -> Enqueue:
        return self._enqueue

    def _enqueue(self, values: StepInputs, stage: int) -> None:
        for sample in range(self.batch_size):
            given = {each.name: self._given(each, values, stage, sample) for each in self._inputs}
            self.output[sample] = run_session(self._session, [self._output], given)[self._output][0]

    def _given(self, each: FileInput, values: StepInputs, stage: int, sample: int) -> NDArray[np.generic]:
        if each.role == SAMPLE:
            row = self.input[sample]
            if self._spec.state != "vp":
                table, rows = values.row("timestep", stage)
                row = row * network_state_scale(self._spec, table[rows[sample]])
        else:
            table, rows = values.row(each.role, stage)
            row = table[rows[sample]]
        row = np.asarray(row).astype(_DTYPES[each.elem_type])
        if each.rank == 0:
            return row
        row = row.reshape((1,) * (each.rank - row.ndim) + row.shape)
        return np.repeat(row, each.rows, axis=0)
