"""The ONNX Runtime backend: the network as one optimised graph per batch size, on the CPU.

Inputs and outputs are bound once to buffers that live as long as the session, so a run copies nothing in or out.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from skipstep.errors import ExportError
from skipstep.network import NetworkSpec

# Some builds write usage events to the user's cache folder; a library that is embedded in products sends nothing.
onnxruntime.disable_telemetry_events()


class OnnxRuntimeDenoiser:
    """A session of the graph `model` (inputs sample, timestep, class_labels; output out_sample) at one batch size.

    `input`: float32 `[N, C, H, W]`, `output` the same or with 2C channels. The graph's symbolic batch dimension is
    fixed when the session is made: the optimiser then sees static shapes, and one export serves every batch size.
    """

    def __init__(self, model: bytes, spec: NetworkSpec, *, batch_size: int, num_threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.add_free_dimension_override_by_name("batch", batch_size)
        options.intra_op_num_threads = num_threads or 0
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class but Exception.
            raise ExportError(
                got=f"a graph that ONNX Runtime {onnxruntime.__version__} does not take: {error}",
                expected="a graph with operators that it knows",
                remedy="upgrade onnxruntime, or use backend='torch'",
            ) from error
        self.batch_size = batch_size
        self.input = np.zeros((batch_size, *spec.sample_shape), np.float32)
        self.output = np.zeros((batch_size, *spec.output_shape), np.float32)
        self._timestep = np.zeros(batch_size, spec.timestep_dtype)
        self._labels = np.zeros(batch_size, np.int64)
        self._timesteps = np.zeros((0, batch_size))
        self._binding = self._session.io_binding()
        feeds: dict[str, NDArray[np.generic]] = {"sample": self.input, "timestep": self._timestep}
        if spec.num_classes is not None:
            feeds["class_labels"] = self._labels
        for name, array in feeds.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._binding.bind_output("out_sample", "cpu", 0, np.float32, self.output.shape, self.output.ctypes.data)

    def prepare(self, timesteps: NDArray[np.float64], class_labels: NDArray[np.int64] | None) -> None:
        self._timesteps = timesteps
        if class_labels is not None:
            self._labels[:] = class_labels

    def enqueue(self, stage: int) -> None:
        self._timestep[:] = self._timesteps[stage]
        self._session.run_with_iobinding(self._binding)
