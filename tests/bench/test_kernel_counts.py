"""How many kernels an evaluation launches: the rule, and that no change adds a launch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skipstep.bench.kernel_counts import KernelCount, kernels_of, torch_counts
from skipstep.bench.models import open_subject

# Of the whole module, of the step with torch's norms and of the step with ours, at batch 1 in channels-last order.
# Another release of torch may take an operation apart in another way.
MOST = {"fashion-mnist": (347, 292, 136), "cifar10-architecture": (629, 540, 245)}


def counted(work) -> KernelCount:
    with torch.inference_mode(), KernelCount() as found:
        work()
    return found


def test_the_rule():
    x = torch.zeros(1, 4, 6, 6)
    conv, norm, linear = nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Linear(6, 3)
    last, conv_last = (each.contiguous(memory_format=torch.channels_last) for each in (x, conv.weight))
    cases = {
        "a convolution and its bias": (lambda: conv(x), 1, 2),
        "without a bias": (lambda: nn.functional.conv2d(x, conv.weight), 1, 1),
        "an image in another order": (lambda: nn.functional.conv2d(x, conv_last), 1, 2),
        "an image in the same order": (lambda: nn.functional.conv2d(last, conv_last), 1, 1),
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


@pytest.mark.slow
@pytest.mark.parametrize("model", MOST)
def test_no_change_adds_a_launch(model, tmp_path):
    found = torch_counts(open_subject(model, folder=tmp_path)).values()
    for counted_kernels, most in zip((each.kernels.total() for each in found), MOST[model], strict=True):
        assert counted_kernels <= most
    assert sorted(MOST[model], reverse=True) == list(MOST[model])


@pytest.mark.slow
def test_the_cifar_step_is_of_few_operations(tmp_path):
    found = torch_counts(open_subject("cifar10-architecture", folder=tmp_path))["torch, the step"]
    assert found.operations.total() <= 179


def test_the_rule_for_norms_of_ours():
    from skipstep.kernels.group_norm import add_group_norm, group_norm

    x, large = torch.zeros(1, 4, 6, 6), torch.zeros(1, 4, 128, 128)
    last = x.contiguous(memory_format=torch.channels_last)
    rest = (2, None, None, 1e-5, True)
    cases = {
        "one launch": (lambda: group_norm(x, *rest, None), 1),
        "channels-last": (lambda: group_norm(last, *rest, None), 1),
        "a sequence": (lambda: group_norm(last.flatten(2), *rest, None), 1),
        "groups that are split": (lambda: group_norm(large, *rest, None), 2),
        "another order": (lambda: group_norm(x.mT, *rest, None), 2),
        "with an image": (lambda: add_group_norm(last, last, *rest), 1),
        "an image in another order": (lambda: add_group_norm(last, x, *rest), 2),
    }
    for name, (work, kernels) in cases.items():
        found = counted(work)
        assert (found.operations.total(), found.kernels.total()) == (1, kernels), (name, found.kernels)
