"""Step networks in half precision, each compared with the float32 one on random inputs before an engine is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from skipstep.backends.onnxruntime import make_session, run_session
from skipstep.errors import ExportError, check_choice
from skipstep.export.graph_writer import load_graph
from skipstep.export.precision import HalfPrecision, lower_precision
from skipstep.networks.graphs import Partition

# Of the largest output. Small UNets in float16 are off by 1e-3, and rounding adds up with depth.
HALF_TOLERANCE = 2e-2
_LARGEST = float(np.finfo(np.float16).max)
_REMEDY = "export with --precision bfloat16, which has float32's range, or float32"


def step_graph(parts: Partition, precision: str) -> bytes:
    """The step network in "float32", "float16" or "bfloat16". Raises ExportError where it cannot be lowered."""
    step = parts.graphs.step
    if precision == "float32":
        return step
    dtype: HalfPrecision = "float16" if precision == "float16" else "bfloat16"
    lowered = lower_precision(step, dtype)
    check_precision(lowered, step, dtype)
    return lowered


def check_precision(lowered: bytes, exact: bytes, dtype: HalfPrecision) -> float | None:
    """The error of `lowered` against `exact`, relative to the largest output; None for bfloat16, which is not run here.

    Raises ExportError beyond HALF_TOLERANCE, and for a value that float16 cannot hold, by name. ONNX Runtime's CPU
    rounds weights and inputs to float16 but may keep values in between in float32, so ranges are checked separately, in
    the float32 network.
    """
    check_choice("dtype", dtype, get_args(HalfPrecision))
    for graph in (lowered, exact):
        load_graph(graph)
    if dtype == "bfloat16":
        return None
    given = _random_inputs(exact)
    _check_ranges(lowered, exact, given)
    halves = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in given.items()}
    reference, candidate = (make_session(graph, before_loop=True) for graph in (exact, lowered))
    name = reference.get_outputs()[0].name
    expected = run_session(reference, [name], given)[name].astype(np.float32)
    found = run_session(candidate, [name], halves)[name].astype(np.float32)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= HALF_TOLERANCE:
        raise ExportError(
            got=f"a network that in {dtype} is off by {error:.2g} of its largest output",
            expected=f"at most {HALF_TOLERANCE:g}",
            remedy=_REMEDY,
        )
    return error


def _random_inputs(graph: bytes) -> dict[str, NDArray[np.generic]]:
    """Standard normals, and zeros for integers, at batch 1."""
    rng = np.random.default_rng(0)
    given: dict[str, NDArray[np.generic]] = {}
    for each in make_session(graph, before_loop=True).get_inputs():
        shape = [dim if isinstance(dim, int) else 1 for dim in each.shape]
        floats = each.type == "tensor(float)"
        given[each.name] = rng.standard_normal(shape, dtype=np.float32) if floats else np.zeros(shape, np.int64)
    return given


def _check_ranges(lowered: bytes, exact: bytes, given: Mapping[str, NDArray[np.generic]]) -> None:
    typed = onnx.shape_inference.infer_shapes(onnx.load_from_string(lowered)).graph
    halves = {value.name for value in typed.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    model = onnx.load_from_string(exact)
    kept = {output.name for output in model.graph.output}
    made = {name for node in model.graph.node for name in node.output}
    for name in sorted((halves & made) - kept):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = make_session(bytes(model.SerializeToString()), before_loop=True)
    for name, array in run_session(session, [each.name for each in session.get_outputs()], given).items():
        largest = float(np.abs(array.astype(np.float32)).max(initial=0.0))
        if not largest <= _LARGEST:
            raise ExportError(
                got=f"a value of {largest:.3g} in the network, {name}",
                expected=f"at most {_LARGEST:g}, the largest that float16 holds",
                remedy=_REMEDY,
            )
