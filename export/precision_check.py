"""Step networks in half precision, each compared with the float32 one on random inputs before an engine is built.

What half precision does to a network is computed in float32, with every value rounded that the network holds in half:
so it does not depend on what a CPU does with such types, and bfloat16 is checked, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from skipstep.backends.onnxruntime import make_session, run_session
from skipstep.errors import ExportError, check_choice
from skipstep.export.graph_writer import load_graph, serialised
from skipstep.export.large_model import is_outside
from skipstep.export.precision import HalfPrecision, lower_precision
from skipstep.loops.agreement import TOLERANCES
from skipstep.networks.graphs import Partition
from skipstep.networks.large_graph import weights_of

_LARGEST = float(np.finfo(np.float16).max)
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def step_graph(parts: Partition, precision: str) -> bytes:
    """The step network in "float32", "float16" or "bfloat16". Raises ExportError where it cannot be lowered."""
    step = parts.graphs.step
    if precision == "float32":
        return step
    dtype: HalfPrecision = "float16" if precision == "float16" else "bfloat16"
    lowered = lower_precision(step, dtype)
    check_precision(lowered, step, dtype)
    return lowered


def check_precision(lowered: bytes, exact: bytes, dtype: HalfPrecision) -> float:
    """The error of `lowered` against `exact`, relative to the largest output.

    Raises ExportError beyond skipstep.loops.agreement.TOLERANCES, and for a value that float16 cannot hold, by name.
    """
    check_choice("dtype", dtype, get_args(HalfPrecision))
    for graph in (lowered, exact):
        load_graph(graph)
    given = _random_inputs(exact)
    if dtype == "float16":
        _check_ranges(lowered, exact, given)
    expected, found = (_prediction(graph, given) for graph in (exact, _rounded(lowered)))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCES[dtype]:
        raise ExportError(
            got=f"a network that in {dtype} is off by {error:.2g} of its largest output",
            expected=f"at most {TOLERANCES[dtype]:g}",
            remedy="export with --precision bfloat16, which has float32's range, or float32"
            if dtype == "float16"
            else "export with --precision float32",
        )
    return error


def _prediction(graph: bytes, given: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    session = make_session(graph, before_loop=True, as_it_stands=True)
    name = session.get_outputs()[0].name
    return run_session(session, [name], given)[name].astype(np.float32)


def _rounded(lowered: bytes) -> bytes:
    """The same network in float32, with a rounding after every node whose result is in half precision."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(lowered))
    graph = model.graph
    types = {each.name: each.type.tensor_type.elem_type for each in (*graph.value_info, *graph.input, *graph.output)}
    for tensor in graph.initializer:
        if is_outside(tensor) and tensor.data_type in _HALVES:
            tensor.data_type = TensorProto.FLOAT
        _widen(tensor)
    nodes: list[NodeProto] = []
    for each in (*graph.input, *graph.output):
        if each.type.tensor_type.elem_type in _HALVES:
            each.type.tensor_type.elem_type = TensorProto.FLOAT
    _round_inputs(graph, types, nodes)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in _HALVES:
                attribute.i = TensorProto.FLOAT
            _widen(attribute.t)
        nodes.append(node)
        for place, name in enumerate(node.output):
            if types.get(name) in _HALVES:
                node.output[place] = f"{name}/exact"
                nodes += _rounding(f"{name}/exact", name, types[name])
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    halves = ("float16", "bfloat16")
    weights = weights_of(lowered).items()
    return serialised(model, {k: a.astype(np.float32) if a.dtype.name in halves else a for k, a in weights})


def _round_inputs(graph: GraphProto, types: Mapping[str, int], nodes: list[NodeProto]) -> None:
    for each in graph.input:
        if types[each.name] in _HALVES:
            rounded = f"{each.name}/rounded"
            nodes += _rounding(each.name, rounded, types[each.name])
            for node in graph.node:
                node.input[:] = [rounded if name == each.name else name for name in node.input]


def _rounding(source: str, to: str, dtype: int) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [source], [f"{to}/half"], to=dtype),
        helper.make_node("Cast", [f"{to}/half"], [to], to=TensorProto.FLOAT),
    ]


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in _HALVES:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


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
    session = make_session(serialised(model, weights_of(exact)), before_loop=True)
    for name, array in run_session(session, [each.name for each in session.get_outputs()], given).items():
        largest = float(np.abs(array.astype(np.float32)).max(initial=0.0))
        if not largest <= _LARGEST:
            raise ExportError(
                got=f"a value of {largest:.3g} in the network, {name}",
                expected=f"at most {_LARGEST:g}, the largest that float16 holds",
                remedy="export with --precision bfloat16, which has float32's range, or float32",
            )
