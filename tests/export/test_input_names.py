"""Names of step inputs: of layers where there are some, of no two alike, and fit for a file."""

from __future__ import annotations

import pytest
import torch
from engines import parts_of
from step_networks import parts
from tiny_networks import Labelled
from torch import nn

from skipstep.export.input_names import layer_names, layer_of
from skipstep.networks.spec import NetworkSpec

SHAPE = (1, 4, 4)


class Modulated(nn.Module):
    """Three values of one layer reach the step, and one of the timestep alone that a layer reads there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.modulation = nn.Linear(2, 3)
        self.blocks = nn.ModuleList([nn.Conv2d(1, 1, 3, padding=1)])

    def forward(self, x, t):
        time = torch.stack([torch.sin(t.float() * 0.01), torch.cos(t.float() * 0.01)], dim=1)
        shift, scale, gate = self.modulation(time)[:, :, None, None].chunk(3, dim=1)
        return gate * self.blocks[0](x * scale + shift) + torch.exp(-t.float() * 0.001).view(-1, 1, 1, 1)


def test_a_value_is_called_after_the_layer_that_made_it():
    assert sorted(layer_names(parts()).values()) == ["both", "prompt", "time"]


def test_several_values_of_a_layer_are_numbered():
    split = parts_of(Modulated(), NetworkSpec(SHAPE))
    names = layer_names(split)
    assert names == layer_names(split)
    assert len(set(names.values())) == len(names) >= 4
    of_the_layer = [name for name in names.values() if name.startswith("modulation.")]
    assert of_the_layer == [f"modulation.{number}" for number in range(3)]


def test_without_layers_values_keep_their_names():
    names = layer_names(parts_of(Labelled(), NetworkSpec(SHAPE, num_classes=4, null_label=1)))
    assert names
    assert names == {name: name for name in names}


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("network.down.0.conv.weight", "down.0.conv"),
        ("down.0.conv.weight", "down.0.conv"),
        ("network.scale", "scale"),
        ("val_7", None),
        ("onnx::MatMul_12", None),
    ],
)
def test_only_a_parameter_has_a_layer(parameter, layer):
    assert layer_of(parameter) == layer
