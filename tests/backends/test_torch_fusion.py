"""GroupNorms of a graph as operators: which are taken, and that the graph still computes what it did."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from step_networks import tables
from tiny_networks import tiny_unet
from tolerances import FLOAT16_NETWORK, FLOAT32_NETWORK, GROUP_NORM
from torch import Tensor, fx, nn

from skipstep.backends.denoiser import Target
from skipstep.backends.torch import prepare_module
from skipstep.backends.torch_cuda import TorchDeviceDenoiser, denoisers
from skipstep.backends.torch_fusion import fuse_norms
from skipstep.backends.torch_graph import runnable, trace
from skipstep.backends.torch_rules import simplify
from skipstep.calls.conditioning import Conditioning
from skipstep.kernels.group_norm import launch_group_norm
from skipstep.model_source import ModelSource
from skipstep.networks.spec import NetworkSpec

SPEC = NetworkSpec((4, 6, 6), fractional_timesteps=True)
ATEN, OURS = torch.ops.aten, torch.ops.skipstep
NORM, ADD_NORM = OURS.group_norm.default, OURS.add_group_norm.default


class Does(nn.Module):
    """`what` of itself, a state of eight channels, another, and a row of eight for each sample."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.first, self.other, self.time = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1), nn.Linear(1, 8)
        self.norm, self.bare, self.last = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8, affine=False), nn.Conv2d(8, 4, 1)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        row = self.time(t.to(x.dtype)[:, None] * 0.001)
        return self.last(self.what(self, self.first(x), self.other(x), row))


def attentive() -> nn.Module:
    return tiny_unet(down_block_types=("DownBlock2D", "AttnDownBlock2D"))


def silu(x: Tensor) -> Tensor:
    return nn.functional.silu(x)


def spread(row: Tensor) -> Tensor:
    return row[:, :, None, None]


def attend(m: Does, x: Tensor, r: Tensor) -> Tensor:
    total = x + r
    rows = m.norm(total.view(x.shape[0], 8, -1)).transpose(1, 2)
    return (rows.softmax(1).transpose(1, 2).reshape(x.shape) + total).tanh()


def shared(m: Does, x: Tensor, r: Tensor) -> Tensor:
    total = x + r
    return silu(m.norm(total)) + m.bare(total) + total


# What is computed; how many of each of our operators it takes, and which of torch's are left.
TAKEN = {
    "a norm": (lambda m, x, r, e: m.norm(x), (1, 0), {}),
    "with SiLU": (lambda m, x, r, e: silu(m.norm(x)), (1, 0), {}),
    "without weights": (lambda m, x, r, e: silu(m.bare(x)), (1, 0), {}),
    "the norm has another reader": (
        lambda m, x, r, e: (lambda y: silu(y) * y)(m.norm(x)), (1, 0), {ATEN.silu.default: 1},
    ),
    "an embedding": (lambda m, x, r, e: silu(m.norm(x + spread(e))), (1, 0), {}),
    "an embedding, first": (lambda m, x, r, e: m.norm(spread(e) + x), (1, 0), {}),
    "an embedding whose sum is read": (
        lambda m, x, r, e: (lambda s: m.norm(s) * s)(x + spread(e)), (1, 0), {ATEN.add.Tensor: 1},
    ),
    "an image": (lambda m, x, r, e: silu(m.norm(x + r)), (0, 1), {}),
    "an image whose sum is read": (lambda m, x, r, e: (lambda s: m.norm(s) * s)(x + r), (0, 1), {}),
    "a sum of two norms": (lambda m, x, r, e: shared(m, x, r), (1, 1), {ATEN.add.Tensor: 2}),
    "a norm after a norm": (lambda m, x, r, e: m.bare(silu(m.norm(x)) + r), (1, 1), {}),
    "before attention": (lambda m, x, r, e: attend(m, x, r), (0, 1), {ATEN.add.Tensor: 1}),
    "a weighted sum": (lambda m, x, r, e: m.norm(torch.add(x, r, alpha=2)), (1, 0), {ATEN.add.Tensor: 1}),
    "a value for each position": (lambda m, x, r, e: m.norm(x + r[:, :1]), (1, 0), {ATEN.add.Tensor: 1}),
    "a number": (lambda m, x, r, e: m.norm(x + 1), (1, 0), {ATEN.add.Tensor: 1}),
    "channels that are put together": (
        lambda m, x, r, e: m.norm((x + r).reshape(x.shape[0], 16, -1)[:, ::2]).reshape(x[:, :, ::2].shape), (1, 0),
        {ATEN.add.Tensor: 1},
    ),
    "double precision": (lambda m, x, r, e: m.bare(x.double()).to(x.dtype), (0, 0), {ATEN.group_norm.default: 1}),
    "an epsilon of 0": (
        lambda m, x, r, e: nn.functional.group_norm(x, 2, eps=0.0), (0, 0), {ATEN.group_norm.default: 1},
    ),
}  # fmt: skip
LEFT = (ATEN.group_norm.default, ATEN.silu.default, ATEN.add.Tensor)


def traced(what: Any, *, channels_last: bool = False) -> tuple[fx.Graph, Any, Does]:
    module = Does(what).eval()
    if channels_last:
        module.to(memory_format=torch.channels_last)
    found = trace(module, SPEC, batch_size=2)
    simplify(found.graph)
    return found.graph, found.tensors, module


def given(batch_size: int, channels_last: bool) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch_size, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x, torch.arange(batch_size) * 300.0


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken_computes_the_same(case, channels_last):
    what, (alone, with_image), left = TAKEN[case]
    graph, tensors, module = traced(what, channels_last=channels_last)
    fuse_norms(graph)
    graph.lint()
    count = Counter(node.target for node in graph.nodes if node.op == "call_function")
    assert (count[NORM], count[ADD_NORM]) == (alone, with_image)
    assert {target: count[target] for target in LEFT if count[target]} == left
    fused = runnable(graph, tensors)
    for batch_size in (1, 3):
        x, t = given(batch_size, channels_last)
        expected = module(x, t)
        assert expected.isfinite().all()
        torch.testing.assert_close(fused(x, t), expected, rtol=0, atol=10 * GROUP_NORM)


@pytest.mark.parametrize("case", ["an embedding", "a sum of two norms", "before attention"])
def test_with_the_kernel_in_place_of_the_operator(case, kernel_device):
    """What a GPU runs, in Triton's interpreter where there is none."""
    graph, tensors, module = traced(TAKEN[case][0], channels_last=True)
    fuse_norms(graph)

    def alone(x, groups, weight, bias, eps, with_silu, vector):
        return launch_group_norm(x, groups, weight, bias, eps=eps, silu=with_silu, vector=vector)[0]

    def with_image(x, image, groups, weight, bias, eps, with_silu):
        return launch_group_norm(x, groups, weight, bias, eps=eps, silu=with_silu, image=image, store_sum=True)

    for node in graph.find_nodes(op="call_function", target=NORM):
        node.target = alone
    for node in graph.find_nodes(op="call_function", target=ADD_NORM):
        node.target = with_image
    x, t = given(2, True)
    fused = runnable(graph, {name: each.to(kernel_device) for name, each in tensors.items()})
    found = fused(x.to(kernel_device), t.to(kernel_device)).cpu()
    torch.testing.assert_close(found, module(x, t), rtol=0, atol=10 * GROUP_NORM)


def test_the_sum_is_known_before_its_other_readers():
    """The operator stands where the sum stood, not where the norm did."""
    graph, _, _ = traced(lambda m, x, r, e: (lambda s: s.tanh() * m.norm(s))(x + r))
    fuse_norms(graph)
    order = [node.target for node in graph.nodes if node.op == "call_function"]
    assert order.index(ADD_NORM) < order.index(ATEN.tanh.default)


def predicted(denoiser: TorchDeviceDenoiser, timesteps: np.ndarray, states: Tensor) -> Tensor:
    """Of each stage."""
    values = tables(
        denoiser.compute(timesteps, Conditioning({}, np.zeros(len(states[0]), np.int64))), denoiser.step_inputs
    )
    enqueue, found = denoiser.new_context(), []
    for stage, state in enumerate(states):
        denoiser.input.copy_(state)
        enqueue(values, stage)
        found.append(denoiser.output.float().clone())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("precision", "tolerance", "batch_size"),
    [
        ("float16", FLOAT16_NETWORK, 4),
        pytest.param("float32", FLOAT32_NETWORK, 4, marks=pytest.mark.slow),
        pytest.param("float32", FLOAT32_NETWORK, 1, marks=pytest.mark.slow),
    ],
)
def test_a_network_predicts_what_it_did(precision, tolerance, batch_size):
    module, spec = prepare_module(attentive(), NetworkSpec((1, 8, 8), fractional_timesteps=True))
    source = ModelSource("UNet", spec, module, None)
    fused = denoisers(source, Target("cpu", precision), fuse_norms=True)(batch_size)
    assert fused.fallback is None
    targets = {node.target for node in fused._forward.graph.nodes}
    assert {NORM, ADD_NORM} <= targets
    assert not targets & {ATEN.group_norm.default, ATEN.silu.default}
    timesteps = np.tile([[999.0], [500.0], [20.0]], (1, batch_size))
    states = torch.randn(3, batch_size, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = denoisers(source, Target("cpu", "float32"))(batch_size)
    expected = predicted(exact, timesteps, states)
    torch.testing.assert_close(
        predicted(fused, timesteps, states), expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def test_not_in_host_memory_of_itself():
    module, spec = prepare_module(attentive(), NetworkSpec((1, 8, 8), fractional_timesteps=True))
    denoiser = denoisers(ModelSource("UNet", spec, module, None), Target("cpu", "float32"))(1)
    assert NORM not in {node.target for node in denoiser._forward.graph.nodes}
