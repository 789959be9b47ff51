"""The estimate: what counts as a kernel, what a kernel is said to move and take, and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import tiny_unet

from skipstep.backends.torch import prepare_module
from skipstep.bench import gpu_estimate
from skipstep.bench.fused_kernels import Kernel, fused_kernels
from skipstep.bench.gpu_estimate import AIM, DEVICES, count_operators, estimate, occupied, verdict
from skipstep.bench.gpu_models import tiny_model
from skipstep.export.graph_cost import graph_cost
from skipstep.export.onnx_model import export_onnx
from skipstep.export.partition import partition
from skipstep.networks.spec import NetworkSpec

RESULTS = Path(__file__).parents[2] / "bench" / "results"
H200 = DEVICES["H200"]


def network(*nodes: onnx.NodeProto, constants: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """[batch, 4, 8, 8] → y, with constants of these shapes."""
    image = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 8, 8]) for name in ("sample",)]
    made = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in constants.items()]
    made.append(numpy_helper.from_array(np.array([0, 4, 64]), "rows"))
    made.append(numpy_helper.from_array(np.array([0, 4, 8, 8]), "image"))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", image, [result], made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def node(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def conv(inputs: str, output: str) -> onnx.NodeProto:
    return node("Conv", inputs, output, pads=[1, 1, 1, 1])


def test_what_follows_a_convolution_is_part_of_it():
    """Bias, SiLU and the residual sum: one kernel, which reads the image, the weights and the residual."""
    model = network(
        conv("sample w b", "a"),
        node("Sigmoid", "a", "s"),
        node("Mul", "a s", "silu"),
        node("Add", "silu sample", "y"),
        constants={"w": (4, 4, 3, 3), "b": (4,)},
    )
    (kernel,) = fused_kernels(model)
    assert kernel == Kernel("Conv", flops=2 * 256 * 36 + 3 * 256, weights=144 + 4, elements=256 + 256, result=(64, 4))


def test_a_residual_joins_the_later_branch_and_both_branches_are_kernels():
    model = network(conv("sample w", "a"), conv("a w", "b"), node("Add", "a b", "y"), constants={"w": (4, 4, 3, 3)})
    first, second = fused_kernels(model)
    assert first.elements == 2 * 256
    assert second.elements == 2 * 256  # Reads a once although two of its operations do; b never leaves the kernel.


def test_a_normalisation_begins_a_kernel_and_keeps_its_affine_map():
    model = network(
        conv("sample w", "a"),
        node("Reshape", "a rows", "r"),
        node("InstanceNormalization", "r g h", "n"),
        node("Reshape", "n image", "i"),
        node("Mul", "i m", "y"),
        constants={"w": (4, 4, 3, 3), "g": (4,), "h": (4,), "m": (4, 1, 1)},
    )
    assert [(kernel.name, kernel.elements) for kernel in fused_kernels(model)] == [
        ("Conv", 512),
        ("InstanceNormalization", 512),
    ]


def test_attention_is_one_kernel_between_its_projections():
    model = network(
        node("Reshape", "sample rows", "t"),
        node("MatMul", "t w", "q"),
        node("MatMul", "t w", "k"),
        node("MatMul", "t w", "v"),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "p"),
        node("Softmax", "p", "s"),
        node("MatMul", "s v", "o"),
        node("MatMul", "o w", "l"),
        node("Reshape", "l image", "y"),
        constants={"w": (64, 64)},
    )
    kernels = fused_kernels(model)
    assert [kernel.name for kernel in kernels] == ["MatMul"] * 5
    attention = kernels[3]
    assert attention.elements == 4 * 256  # q, k and v in, o out; the 4×4 weights stay inside.
    assert attention.flops == 2 * 2 * 4 * 4 * 64 + 4 * 4


@pytest.fixture(scope="module")
def tiny():
    module, spec = prepare_module(tiny_unet(), NetworkSpec((1, 8, 8)))
    return module, spec, onnx.load_from_string(partition(export_onnx(module, spec)).graphs.step)


def test_a_real_network_is_counted_whole(tiny):
    _, _, graph = tiny
    kernels = fused_kernels(graph)
    kinds = [each.op_type for each in graph.graph.node]
    assert sum(kernel.flops for kernel in kernels) == graph_cost(graph, nodes=0, crosses=False).flops
    for kind in ("Conv", "InstanceNormalization", "Resize"):
        assert sum(kernel.name == kind for kernel in kernels) == kinds.count(kind) > 0
    # Two products of each attention and one softmax are one kernel.
    attentions = kinds.count("Softmax")
    assert sum(kernel.name == "MatMul" for kernel in kernels) == kinds.count("MatMul") - attentions
    # Every weight is read, once; constants of shapes are not weights.
    floats = [each for each in graph.graph.initializer if each.data_type == TensorProto.FLOAT]
    assert 0.9 * sum(np.prod(each.dims) for each in floats) < sum(kernel.weights for kernel in kernels)


def test_operators_of_torch_are_those_that_launch(tiny):
    module, spec, graph = tiny
    count = count_operators(module, spec)
    kinds = [each.op_type for each in graph.graph.node]
    norms, convolutions, silus = (kinds.count(kind) for kind in ("InstanceNormalization", "Conv", "Sigmoid"))
    assert norms + convolutions + silus < count < len(kinds)
    assert count > len(fused_kernels(graph))


def test_floor_launches_and_range():
    memory_bound = Kernel("Conv", flops=10, weights=24_000_000, elements=0, result=(64, 64))  # 10 µs of 4.8 TB/s.
    small = Kernel("Softmax", flops=10, weights=0, elements=100, result=None)
    numbers = estimate([memory_bound, small], 1, H200, step_bytes=12)
    assert numbers["floor_ms"] == pytest.approx(10e-3, rel=1e-3)
    assert numbers["launches_ms"] == pytest.approx([4.5e-3, 7.5e-3])
    assert numbers["estimate_ms"] == pytest.approx([10e-3 + 3e-3, 12.5e-3 + 5e-3])
    # Operations at the full rate at best; at worst at that of the few multiprocessors that have a tile.
    product = Kernel("MatMul", flops=int(9.9e9), weights=0, elements=0, result=(64, 66 * 64))
    numbers = estimate([product], 1, H200, step_bytes=12)
    assert numbers["estimate_ms"] == pytest.approx([10e-3 + 1.5e-3, 20e-3 / 0.6 + 2.5e-3])
    # Of 64 samples the activations and operations are 64 times as many, and the weights the same.
    twice = Kernel("Conv", flops=10, weights=24_000_000, elements=24_000_000 // 64, result=(64, 64))
    assert estimate([twice], 64, H200, step_bytes=0)["floor_ms"] == pytest.approx(20e-3)


def test_tiles_come_in_waves():
    def of(rows: int) -> float:
        return occupied(Kernel("MatMul", 1, 0, 0, (rows, 64)), 1, H200)

    assert of(64) == of(1) == 1 / 132
    assert of(64 * 132) == 1
    assert of(64 * 133) == pytest.approx(133 / 264)
    assert occupied(Kernel("Softmax", 1, 0, 0, None), 1, H200) == 1


@pytest.mark.parametrize(
    ("range_ms", "judged"), [([0.2, 0.3], "within reach"), ([0.3, 0.5], "possible"), ([0.5, 0.6], "out of reach")]
)
def test_the_aim_is_judged_by_both_ends(range_ms, judged):
    case = {"batch_size": AIM.batch_size, "devices": {"H200": {"estimate_ms": range_ms, "floor_ms": 0.03}}}
    network = {"model": AIM.model, "cases": [case], "kernels_per_step": 160, "operators_ms": [0.5, 0.8]}
    found = verdict([network])
    assert found["devices"]["H200"]["aim_is"] == judged
    assert found["most_microseconds_a_kernel"] == pytest.approx(2.5)
    assert found["unfused_aim_is"] == "out of reach"


def test_a_network_is_described_from_its_export(monkeypatch, tiny):
    monkeypatch.setattr(gpu_estimate, "MODELS", {"tiny": tiny_model})
    network = gpu_estimate.describe("tiny", batch_sizes=(1, 4))
    one, four = network["cases"]
    assert sum(network["kernels"].values()) + 1 == network["kernels_per_step"]
    assert one["step_kernel_bytes"] == 12 * 1 * 8 * 8
    for count in ("flops", "activation_bytes", "step_kernel_bytes"):
        assert four[count] == 4 * one[count] > 0
    for case in (one, four):
        for numbers in case["devices"].values():
            low, high = numbers["estimate_ms"]
            assert numbers["floor_ms"] < low == pytest.approx(numbers["launches_ms"][0])  # Tiny: launches are all.
            assert low < high


def test_the_committed_estimate_says_that_it_is_none_of_a_run():
    committed = json.loads((RESULTS / "gpu-estimate.json").read_text())
    assert committed["measured"] is False
    assert [each["model"] for each in committed["networks"]] == list(gpu_estimate.MODELS)
    assert committed["aim"] == json.loads(json.dumps(verdict(committed["networks"])))
    low, high = AIM.floor_us
    for facts in committed["aim"]["devices"].values():
        assert low - 1 < facts["floor_us"] < high + 1  # The floor that the aim was set against is that of these bytes.
    table = gpu_estimate.estimate_table(RESULTS)
    assert table.count("estimate, not measured") >= len(DEVICES) + 2
    assert f"{AIM.ms:g} ms" in table


def test_a_count_leaves_the_module_as_it_was(tiny):
    module, spec, _ = tiny
    x = torch.randn(1, *spec.sample_shape)
    before = module(x, torch.zeros(1, dtype=torch.int64))
    count_operators(module, spec)
    assert torch.equal(module(x, torch.zeros(1, dtype=torch.int64)), before)
