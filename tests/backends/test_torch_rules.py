"""Every rule takes out what changes no bit, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipstep.backends.torch_graph import runnable, trace
from skipstep.backends.torch_rules import RULES, simplify
from skipstep.networks.spec import NetworkSpec

SPEC = NetworkSpec((2, 3, 4))
ATEN = torch.ops.aten


class Does(nn.Module):
    """`what` between two operations that no rule knows."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.what(x.neg()).neg()


class Whole(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x.long() / 1).to(x.dtype)


def results(what: Any, dtype: torch.dtype = torch.float32) -> tuple[list[Any], Tensor, Tensor]:
    """The operations that are left, what they give, and what the module gives."""
    module = (what if isinstance(what, nn.Module) else Does(what)).eval()
    traced = trace(_Typed(module, dtype), SPEC, batch_size=2)
    simplify(traced.graph)
    left = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    # Both zeros, both infinities, NaN, the smallest and the largest number.
    odd = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), torch.finfo(dtype).smallest_normal / 4]
    x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.view(-1)[: len(odd)] = torch.tensor(odd, dtype=dtype)
    x.view(-1)[len(odd)] = torch.finfo(dtype).max
    return left, runnable(traced.graph, traced.tensors)(x, torch.zeros(2)), module(x, torch.zeros(2))


class _Typed(nn.Module):
    """Has a parameter, which says of what dtype a network is."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.weight = module, nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.module(x, t)


REMOVED = {
    "x / 1.0": (ATEN.div.Tensor, lambda x: x / 1.0),
    "x / 1": (ATEN.div.Tensor, lambda x: x / 1),
    "1 · x": (ATEN.mul.Tensor, lambda x: 1 * x),
    "x - 0": (ATEN.sub.Tensor, lambda x: x - 0),
    "x + -0.0": (ATEN.add.Tensor, lambda x: x + -0.0),
    "n + 0": (ATEN.add.Tensor, lambda x: ((x > 0).long() + 0).to(x.dtype)),
    "dropout": (ATEN.dropout.default, lambda x: nn.functional.dropout(x, 0.5, training=False)),
    "dropout of nothing": (ATEN.dropout.default, lambda x: nn.functional.dropout(x, 0.0, training=True)),
    "channels' dropout": (ATEN.feature_dropout.default, lambda x: nn.functional.dropout2d(x, 0.5, training=False)),
    "the same dtype": (ATEN.to.dtype, lambda x: x.to(x.dtype)),
    "the same device": (ATEN.to.device, lambda x: ATEN.to.device(x, x.device, x.dtype)),
    "of the same type": (ATEN.type_as.default, lambda x: x.type_as(x)),
    "a copy": (ATEN.clone.default, lambda x: x.clone()),
    "a copy that is in order": (ATEN.clone.default, lambda x: x.clone(memory_format=torch.contiguous_format)),
    "what is in order": (ATEN.contiguous.default, lambda x: ATEN.contiguous(x)),
    "another name": (ATEN.alias.default, lambda x: ATEN.alias(x)),
    "without gradients": (ATEN.detach.default, lambda x: x.detach()),
    "a view of the same shape": (ATEN.view.default, lambda x: x.view(x.shape)),
    "a reshape to the same shape": (ATEN.reshape.default, lambda x: x.reshape(x.shape)),
    "an expansion to the same shape": (ATEN.expand.default, lambda x: x.expand(x.shape)),
    "all of it": (ATEN.slice.Tensor, lambda x: x[:, :]),
    "there and back": (ATEN.transpose.int, lambda x: x.transpose(1, 2).transpose(-2, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", REMOVED)
def test_what_changes_no_bit_is_taken_out(case, dtype):
    operation, what = REMOVED[case]
    assert operation in RULES
    before = trace(_Typed(Does(what), dtype), SPEC, batch_size=2).graph
    left, found, wanted = results(what, dtype)
    assert operation in {node.target for node in before.nodes}
    assert operation not in left
    assert found.dtype == wanted.dtype
    # Arithmetic in bfloat16 makes one NaN of all.
    numbers = ~wanted.isnan()
    assert torch.equal(found.isnan(), ~numbers)
    assert torch.equal(found[numbers].view(torch.uint8), wanted[numbers].view(torch.uint8))


KEPT = {
    "x / 2": (ATEN.div.Tensor, lambda x: x / 2),
    "x / -1": (ATEN.div.Tensor, lambda x: x / -1),
    "x · y": (ATEN.mul.Tensor, lambda x: x.cos() * x.cos()),
    "integers / 1": (ATEN.div.Tensor, Whole()),
    "x + 0": (ATEN.add.Tensor, lambda x: x + 0),
    "x - -0.0": (ATEN.sub.Tensor, lambda x: x - -0.0),
    "x - y": (ATEN.sub.Tensor, lambda x: x - x.cos()),
    "another dtype": (ATEN.to.dtype, lambda x: x.to(torch.float64).cos().to(x.dtype)),
    "a copy in another order": (
        ATEN.clone.default,
        lambda x: x.transpose(1, 2).clone(memory_format=torch.contiguous_format),
    ),
    "put in order": (ATEN.contiguous.default, lambda x: x.transpose(2, 3).contiguous()),
    "another shape": (ATEN.reshape.default, lambda x: x.view(-1, 2, 12)),
    "a part": (ATEN.slice.Tensor, lambda x: x[:, 1:]),
    "every second": (ATEN.slice.Tensor, lambda x: x[:, ::2]),
    "there and elsewhere": (ATEN.transpose.int, lambda x: x.transpose(1, 2).transpose(1, 3)),
    "expanded": (ATEN.expand.default, lambda x: x[:, :1].expand(x.shape)),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_changes_something_stays(case):
    operation, what = KEPT[case]
    left, found, wanted = results(what)
    assert operation in left
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_view_of_a_copy_needs_no_copy():
    """Without the copy a view would be refused; a reshape makes one where it has to."""
    left, found, wanted = results(lambda x: x[:, :1].expand(x.shape).clone().view(-1, 24).view(-1, 2, 3, 4))
    assert ATEN.view.default not in left
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_every_rule_has_a_case():
    tried = {operation for operation, _ in REMOVED.values()}
    # Scalars come as tensors, and conversions as `to`, before operators are decomposed.
    others = {ATEN.mul.Scalar, ATEN.div.Scalar, ATEN.to.dtype_layout, ATEN._to_copy.default}
    assert RULES.keys() - others == tried
