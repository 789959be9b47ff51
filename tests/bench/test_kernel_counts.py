"""How many kernels an evaluation launches: the rule, and that no change adds a launch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skipstep.bench.kernel_counts import KernelCount, kernels_of, torch_counts
from skipstep.bench.models import open_subject

# Of the whole module and of the step, at batch 1 in channels-last order. Another release of torch may take an operation
# apart in another way.
MOST = {"fashion-mnist": (348, 293), "cifar10-architecture": (628, 541)}


def counted(work) -> KernelCount:
    with torch.inference_mode(), KernelCount() as found:
        work()
    return found


def test_the_rule():
    x = torch.zeros(1, 4, 6, 6)
    conv, norm, linear = nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Linear(6, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    cases = {
        "a convolution and its bias": (lambda: conv(x), 1, 2),
        "without a bias": (lambda: nn.functional.conv2d(x, conv.weight), 1, 1),
        "views": (lambda: x.view(4, 36).transpose(0, 1)[1:].unsqueeze(0).expand(2, -1, -1), 0, 0),
        "an allocation": (lambda: torch.empty_like(x), 0, 0),
        "a copy that is needed": (lambda: x.transpose(1, 2).reshape(-1), 1, 1),
        "a norm": (lambda: norm(x), 1, 3),
        "a norm of channels-last": (lambda: norm(last), 1, 5),
        "dropout that is off": (lambda: nn.functional.dropout(x, 0.5, training=False), 0, 0),
        "an operation in place": (lambda: x.clone().add_(1), 2, 2),
        "a product with a bias": (lambda: linear(x), 1, 1),
        "twice as large": (lambda: nn.functional.interpolate(x, scale_factor=2.0), 1, 1),
    }
    for name, (work, operations, kernels) in cases.items():
        found = counted(work)
        assert (found.operations.total(), found.kernels.total()) == (operations, kernels), (name, found.kernels)
    assert kernels_of(torch.ops.aten.view.default, ()) == 0


@pytest.mark.parametrize("model", MOST)
def test_no_change_adds_a_launch(model, tmp_path):
    whole, step = (each.kernels.total() for each in torch_counts(open_subject(model, folder=tmp_path)).values())
    most_whole, most_step = MOST[model]
    assert whole <= most_whole
    assert step <= most_step < most_whole
