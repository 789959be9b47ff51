"""The noise of the engine, drawn by ONNX Runtime alone: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from noise_graphs import noise_graph
from onnxruntime import InferenceSession

from skipstep.calls.noise import standard_normal
from skipstep.kernels.layout import Stream

SEEDS = np.array([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF], np.uint64)


@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize("num_elements", [1, 6, 784, 100_000])
def test_the_bits_are_those_of_the_engine(num_elements, stream):
    """A hundred thousand elements of 14 draws reach the tails of the logarithm and all quarter turns."""
    session = InferenceSession(noise_graph(num_elements, stream), providers=["CPUExecutionProvider"])
    stages = [0, 999]
    (found,) = session.run(None, {"seeds": SEEDS, "stages": np.array(stages)})
    for row, stage in zip(found, stages, strict=True):
        expected = standard_normal(SEEDS, num_elements, stage=stage, stream=stream)
        np.testing.assert_array_equal(row.view(np.uint32), expected.view(np.uint32))
