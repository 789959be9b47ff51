from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from skipstep.errors import ExportError
from skipstep.export.precision import lower_precision
from skipstep.export.precision_check import HALF_TOLERANCE, check_precision


def network(scale: float) -> bytes:
    """out = scale·(W·sample) / scale: the same function for every scale, but not in every dtype."""
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["sample", "weight"], ["product"]),
        helper.make_node("Mul", ["product", "up"], ["large"]),
        helper.make_node("MatMul", ["large", "eye"], ["carried"]),
        helper.make_node("Mul", ["carried", "down"], ["out_sample"]),
    ]
    weights = {
        "weight": weight,
        "eye": np.eye(8, dtype=np.float32),
        "up": np.float32(scale),
        "down": np.float32(1 / scale),
    }
    shape = ["batch", 1, 4, 8]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def test_a_good_one_is_measured():
    exact = network(1.0)
    error = check_precision(lower_precision(exact, "float16"), exact, "float16")
    assert error is not None
    assert 0.0 < error < HALF_TOLERANCE / 4


def test_one_that_overflows_is_refused():
    exact = network(3e4)
    with pytest.raises(ExportError, match=r"a value of .* in the network, (large|carried|product)") as caught:
        check_precision(lower_precision(exact, "float16"), exact, "float16")
    assert "bfloat16" in caught.value.remedy


def test_bfloat16_is_not_computed_here():
    exact = network(1.0)
    assert check_precision(lower_precision(exact, "bfloat16"), exact, "bfloat16") is None
