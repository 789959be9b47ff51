"""Graphs in half precision: their dtypes and errors, for tests."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from tolerances import BFLOAT16_NETWORK, FLOAT16_NETWORK

NUMPY = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


ONNX = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


TOLERANCE = {"float16": FLOAT16_NETWORK, "bfloat16": BFLOAT16_NETWORK}


both = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def inputs_of(graph: bytes, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Values that `dtype` holds exactly, so that only what the network does differs."""
    random = np.random.default_rng(seed)
    return {
        each.name: random.standard_normal([d.dim_value or 2 for d in each.type.tensor_type.shape.dim]).astype(
            NUMPY[dtype]
        )
        for each in onnx.load_from_string(graph).graph.input
    }


def error(graph: bytes, lowered: bytes, dtype: str) -> float:
    """The largest error relative to the largest output. The evaluator computes each node in the dtype that it has."""
    inputs = inputs_of(graph, dtype)
    exact = {name: value.astype(np.float32) for name, value in inputs.items()}
    (expected,) = ReferenceEvaluator(onnx.load_from_string(graph)).run(None, exact)
    with np.errstate(over="ignore", invalid="ignore"):
        (got,) = ReferenceEvaluator(onnx.load_from_string(lowered)).run(None, inputs)
        assert got.dtype == NUMPY[dtype]
        assert got.shape == expected.shape
        return float(np.abs(got.astype(np.float32) - expected).max() / np.abs(expected).max())


def types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element types by name, those of inner graphs too."""
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    found |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= types(attribute.g)
    return found


def inspected(lowered: bytes) -> tuple[onnx.GraphProto, dict[str, int]]:
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(lowered), strict_mode=True).graph
    return graph, types(graph)
