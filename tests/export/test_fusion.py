"""What is said not to fuse takes more kernels in an engine that TensorRT-RTX builds, and what fuses does not."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from skipstep.export.engine_plan import kernels, launches
from skipstep.export.fusion import not_fused
from skipstep.export.quantize import find_layers, quantize


class Attention(nn.Module):
    def __init__(self, head: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.queries, self.keys, self.values = (nn.Linear(32, heads * head) for _ in range(3))
        self.after = nn.Linear(heads * head, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.queries, self.keys, self.values)
        heads = [part(x).view(1, 64, self.heads, -1).transpose(1, 2) for part in parts]
        return self.after(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(1, 64, -1))


def exported(module: nn.Module, x: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(module.eval().to(x.dtype), (x,), file, dynamo=False, opset_version=20)
    return file.getvalue()


def graph_of(dtype: torch.dtype, *sizes: int) -> bytes:
    return exported(Attention(*sizes), torch.zeros(1, 64, 32, dtype=dtype))


HALF, FULL = torch.float16, torch.float32
# The attention that fuses, one that does not, and what is said of it.
CASES = {
    "a large head": ((HALF, 256), (HALF, 512), "attention of head dimension 512, which is above 256"),
    "float32": ((HALF, 64), (FULL, 64), "attention in float32, which is fused in half precision alone"),
    "one head": ((HALF, 32), (HALF, 64, 1), "attention of one head, which is fused from a batch of 2 on"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_what_is_said_not_to_fuse_takes_more_kernels(case):
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    *made, said = CASES[case]
    fused, other = (graph_of(*each) for each in made)
    assert not_fused(fused) == []
    assert not_fused(other) == [f"1 × {said}"]
    [of_fused], [of_other] = (kernels(build(graph, 89).engine) for graph in (fused, other))
    assert of_other.total() > of_fused.total()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("one_product", [False, True])
def test_an_attention_is_one_kernel_while_its_products_are_in_half_precision(kind, one_product):
    """As skipstep.quantizing leaves them, whatever else is in 8 bits."""
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    half = graph_of(HALF, 64)
    layers = {name: dict.fromkeys(each, (-6.0, 6.0)) for name, each in find_layers(half).items()}
    products = [name for name, each in layers.items() if 1 in each]
    assert len(products) == 2
    low = {name: each for name, each in layers.items() if name not in products[one_product:]}
    [plan] = launches(build(quantize(half, low, kind), 89).engine)
    assert any(each.name.startswith("_gemm_mha") for each in plan) is not one_product


class Norm(nn.Module):
    """A group norm written out, as networks in half precision have it, and its activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float().reshape(x.shape[0], 4, -1)
        centred = values - values.mean(2, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(2, keepdim=True) + 1e-5)
        return nn.functional.silu(scaled.reshape(x.shape)).to(x.dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_centring_a_convolution_takes_no_kernel_of_its_own():
    """What subtracts the centre rounds, too, and what adds the constant for it is the norm behind the convolution."""
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    first, middle, last = (nn.Conv2d(*channels, 3, padding=1) for channels in ((8, 32), (32, 32), (32, 8)))
    half = exported(nn.Sequential(first, Norm(), middle, Norm(), last), torch.zeros(2, 8, 16, 16, dtype=HALF))
    [(layer, values)] = find_layers(half).items()
    low = quantize(half, {layer: dict.fromkeys(values, (-0.3, 4.0))}, "int8")
    [of_half], [of_low] = (launches(build(graph, 89).engine) for graph in (half, low))
    assert len(of_low) == len(of_half)
    [rounding] = [each.nodes for each in of_low if any(node.endswith("/centred/int8") for node in each.nodes)]
    [adding] = [each.nodes for each in of_low if any(node.endswith("/whole") for node in each.nodes)]
    assert any(node.endswith("/centred") for node in rounding)
    assert any("ReduceMean" in node for node in adding)
