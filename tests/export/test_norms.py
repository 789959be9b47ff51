"""Norms written out compute what the operator does, in fewer kernels of TensorRT-RTX."""

from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
import torch
from engine_builds import build
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from skipstep.export.engine_plan import kernels
from skipstep.export.norms import write_out_norms
from skipstep.export.precision import lower_precision

RNG = np.random.default_rng(0)
HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT


def norm_of(shape: list[int | str], dtype: int = FULL, *, plain: bool = False, opset: int = 20) -> ModelProto:
    """One InstanceNormalization of x, whose scale and bias are 1 and 0 if `plain`."""
    channels, kind = int(shape[1]), np.float16 if dtype == HALF else np.float32
    scale = np.ones(channels) if plain else RNG.standard_normal(channels)
    weights = [
        numpy_helper.from_array(value.astype(kind), name) for name, value in (("s", scale), ("b", scale * 0.5 - 0.5))
    ]
    graph = helper.make_graph(
        [helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"], name="norm", epsilon=1e-3)],
        "norm",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize(
    ("shape", "dtype", "plain", "atol"),
    [
        ((2, 3, 40), FULL, False, 2e-6),
        ((1, 4, 5, 6), FULL, False, 2e-6),
        ((2, 3, 40), FULL, True, 2e-6),
        ((2, 3, 4, 5, 2), HALF, False, 2e-3),
    ],
)
def test_the_same_function(shape, dtype, plain, atol):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = norm_of(["batch", *shape[1:]], dtype, plain=plain)
    before = model.SerializeToString()
    write_out_norms(model)
    onnx.checker.check_model(model, full_check=True)
    assert "InstanceNormalization" not in {node.op_type for node in model.graph.node}
    x = (3.0 + RNG.standard_normal(shape)).astype(np.float16 if dtype == HALF else np.float32)
    expected, found = (
        onnxruntime.InferenceSession(graph).run(None, {"x": x})[0] for graph in (before, model.SerializeToString())
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_what_cannot_be_written_out_is_left_alone():
    for model in (norm_of(["batch", 3, 8], opset=17), norm_of(["batch", 3, 8])):
        if model.opset_import[0].version > 17:  # A scale that is computed.
            model.graph.initializer.pop(0)
            model.graph.input.append(helper.make_tensor_value_info("s", FULL, [3]))
        before = model.SerializeToString()
        write_out_norms(model)
        assert [node.op_type for node in model.graph.node] == ["InstanceNormalization"]
        assert model.SerializeToString() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_norm_is_one_kernel_whatever_its_groups():
    """In half precision, with the conversions and the activation around it."""
    pytest.importorskip("tensorrt_rtx")

    def count(channels: int) -> int:
        layers = nn.Conv2d(4, 8 * channels, 3), nn.GroupNorm(8, 8 * channels), nn.SiLU(), nn.Conv2d(8 * channels, 4, 3)
        file = io.BytesIO()
        x = torch.zeros(1, 4, 16, 16)
        torch.onnx.export(nn.Sequential(*layers).eval(), (x,), file, dynamo=False, opset_version=18)
        return kernels(build(lower_precision(file.getvalue(), "float16"), 89).engine)[0].total()

    # Two convolutions, a change of order before and after them, and the norm.
    assert [count(channels) for channels in (3, 4, 6)] == [5, 5, 5]
