from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from engines import exported
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import tiny_unet
from torch import nn

from skipstep.errors import ExportError
from skipstep.export.partition import partition
from skipstep.export.precision import lower_precision
from skipstep.export.precision_check import check_precision, step_graph
from skipstep.networks.spec import NetworkSpec


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
    assert 0.0 < error < 2.0**-9


def test_one_that_overflows_is_refused():
    exact = network(3e4)
    with pytest.raises(ExportError, match=r"a value of .* in the network, (large|carried|product)") as caught:
        check_precision(lower_precision(exact, "float16"), exact, "float16")
    assert "bfloat16" in caught.value.remedy


@pytest.fixture(scope="module")
def unet():
    return partition(exported(tiny_unet(), NetworkSpec((1, 8, 8), fractional_timesteps=True)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_networks_rounding_is_what_its_dtype_makes_of_it(unet, dtype):
    """Each rounding is a unit of the dtype; those of a small UNet's layers add up at random."""
    exact = unet.graphs.step
    error = check_precision(lower_precision(exact, dtype), exact, dtype)
    unit = 2.0**-11 if dtype == "float16" else 2.0**-8
    assert unit / 8 < error < 8 * unit


def test_products_are_in_half_precision_and_what_sums_is_not(unet):
    kinds = half_kinds(step_graph(unet, "float16"))
    assert "Conv" in kinds
    assert not {"InstanceNormalization", "Softmax"} & kinds


class Narrow(nn.Module):
    """A normalisation that sees 300 ± 1: of that float16 would keep a quarter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.conv(x) + 300.0))


def test_normalisations_of_small_differences_are_exact():
    parts = partition(exported(Narrow(), NetworkSpec((1, 8, 8))))
    assert check_precision(step_graph(parts, "float16"), parts.graphs.step, "float16") < 2.0**-9


def half_kinds(graph: bytes) -> set[str]:
    """The operators whose results are float16."""
    typed = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph)).graph
    half = {v.name for v in typed.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    return {node.op_type for node in typed.node if half & set(node.output)}
