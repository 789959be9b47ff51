"""What is said not to fuse takes more kernels in an engine that TensorRT-RTX builds, and what fuses does not."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from skipstep.export.engine_plan import kernels
from skipstep.export.fusion import not_fused


class Norm(nn.Module):
    """Eight groups of so many channels, between convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(4, 8 * channels, 3, padding=1), nn.Conv2d(8 * channels, 4, 3, padding=1)
        self.norm = nn.GroupNorm(8, 8 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(nn.functional.silu(self.norm(self.before(x))))


class Attention(nn.Module):
    """Two heads."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(32, 2 * head) for _ in range(3))
        self.after = nn.Linear(2 * head, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [part(x).view(1, 64, 2, -1).transpose(1, 2) for part in (self.queries, self.keys, self.values)]
        return self.after(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(1, 64, -1))


def graph_of(module: nn.Module, dtype: torch.dtype) -> bytes:
    x = torch.zeros(1, 4, 16, 16) if isinstance(module, Norm) else torch.zeros(1, 64, 32)
    file = io.BytesIO()
    torch.onnx.export(module.eval().to(dtype), (x.to(dtype),), file, dynamo=False, opset_version=18)
    return file.getvalue()


HALF, FULL = torch.float16, torch.float32
# The module that fuses, one that does not, and what is said of it.
CASES = {
    "3 channels": ((Norm, 4, HALF), (Norm, 3, HALF), "1 × norm with 3 channels in a group, which is no power of two"),
    "6 channels": ((Norm, 8, HALF), (Norm, 6, HALF), "1 × norm with 6 channels in a group, which is no power of two"),
    "float32 norm": ((Norm, 4, FULL), (Norm, 6, FULL), "1 × norm with 6 channels in a group, which is no power of two"),
    "a large head": (
        (Attention, 256, HALF),
        (Attention, 512, HALF),
        "1 × attention of head dimension 512, which is above 256",
    ),
    "float32": (
        (Attention, 64, HALF),
        (Attention, 64, FULL),
        "1 × attention in float32, which is fused in half precision alone",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_what_is_said_not_to_fuse_takes_more_kernels(case):
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    *made, said = CASES[case]
    fused, other = (graph_of(kind(size), dtype) for kind, size, dtype in made)
    assert not_fused(fused) == []
    assert not_fused(other) == [said]
    [of_fused], [of_other] = (kernels(build(graph, 89).engine) for graph in (fused, other))
    assert of_other.total() > of_fused.total()
