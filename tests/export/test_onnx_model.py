"""Networks as ONNX graphs: what comes out, and who is to blame where nothing does."""

from __future__ import annotations

import onnx
import pytest
import torch
from engines import exported
from tiny_networks import Curve, tiny_unet
from torch import Tensor, nn

from skipstep.backends.torch import DenoisingModule
from skipstep.errors import ExportError
from skipstep.export.onnx_model import OPSET, export_onnx
from skipstep.networks.spec import NetworkSpec

SPEC = NetworkSpec((1, 8, 8), fractional_timesteps=True)


class Holding(nn.Module):
    """A network with one module inside, two levels down."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Sequential(inner)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else x


class Decomposing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x)[0] @ x


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_inputs_outputs_and_opset_are_as_said():
    graph = onnx.load_from_string(exported(tiny_unet(), SPEC))
    assert graph.opset_import[0].version == OPSET
    assert {each.name: dims(each) for each in graph.graph.input} == {
        "sample": ["batch", 1, 8, 8],
        "timestep": ["batch"],
    }
    assert [(each.name, dims(each)) for each in graph.graph.output] == [("out_sample", ["batch", 1, 8, 8])]
    onnx.checker.check_model(graph, full_check=True)


def test_shapes_are_fixed_on_request():
    graph = onnx.load_from_string(export_onnx(DenoisingModule(Curve()), SPEC, batch_size=3))
    assert dims(graph.graph.input[0]) == [3, 1, 8, 8]
    assert all(isinstance(dim, int) for each in graph.graph.value_info for dim in dims(each))


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (Branching(), r"blocks\.1\.0 \(Branching\)"),
        (Decomposing(), r"operator aten\._linalg_svd\.default in blocks\.1\.0 \(.*Decomposing\)"),
    ],
)
def test_a_failure_names_the_module_and_the_operator(inner, said):
    network = Holding(inner)
    with pytest.raises(ExportError, match=said):
        export_onnx(DenoisingModule(network), SPEC)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
