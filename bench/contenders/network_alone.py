"""The step network as often as a loop runs it, with nothing in between: what a loop could at best take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from skipstep import Engine
from skipstep.backends.onnxruntime import make_session
from skipstep.bench.contenders.workload import Workload


def network_alone(engine: Engine, threads: int) -> Callable[[Workload], Callable[[], None]]:
    """Of an engine that was built on ONNX Runtime; on the same random inputs every time, bound once."""
    assert engine._built is not None, "it was built here"
    session = make_session(engine._built.parts().graphs.step, num_threads=threads)

    def prepare(workload: Workload) -> Callable[[], None]:
        rng = np.random.default_rng(0)
        inputs = {
            each.name: rng.standard_normal(
                [workload.batch_size if isinstance(dim, str) else dim for dim in each.shape], dtype=np.float32
            )
            for each in session.get_inputs()
        }
        outputs: dict[str, Any] = {
            each.name: np.empty((workload.batch_size, *engine.network.output_shape), np.float32)
            for each in session.get_outputs()
        }
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        keep = inputs, outputs  # The binding knows their addresses and does not keep them alive.

        def run() -> None:
            assert keep
            for _ in range(workload.plan.num_evaluations):
                session.run_with_iobinding(binding)

        return run

    return prepare
