"""The torch backend on a GPU: what is computed before the loop, against the module that computes all of it."""

from __future__ import annotations

import numpy as np
import pytest
import step_networks
import torch
from step_networks import EveryTime, assert_predicts, tables
from tiny_networks import Blind, Curve, GaussianEps, Labelled, Running, Timeless, Wide, tiny_unet
from tolerances import BFLOAT16_NETWORK, FLOAT16_NETWORK, FLOAT32_NETWORK
from torch import Tensor, nn

from skipstep.backends.denoiser import Target
from skipstep.backends.torch import TorchDenoiser, prepare_module
from skipstep.backends.torch_cuda import denoisers
from skipstep.backends.torch_split import SplitNetworks
from skipstep.calls.conditioning import LABELS, PROMPTS, Conditioning
from skipstep.model_source import ModelSource
from skipstep.networks.spec import NetworkSpec

UNET = NetworkSpec((1, 8, 8), fractional_timesteps=True)
SMALL = NetworkSpec((1, 4, 4))


class InPlace(nn.Module):
    """Writes to its own intermediate values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.conv = nn.Linear(1, 4), nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(t.to(x.dtype)[:, None] * 0.001)
        time.mul_(2).tanh_()
        h = self.conv(x)
        h += time[:, :, None, None]
        return nn.functional.silu(h, inplace=True).mean(1, keepdim=True)


class Pieces(nn.Module):
    """Splits what follows from the timestep by channels, and turns its rows around."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Linear(1, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.time(t.to(x.dtype)[:, None] * 0.001).chunk(2, dim=1)
        return x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


class Branching(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * 2 if t[0] > 500 else x


class Counting(nn.Module):
    """Changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return x * 0.5


class OneSize(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x.view(2, 1, 4, 4)


class Viewing(nn.Module):
    """Takes samples in plain order only."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x.view(x.shape[0], -1) * 0.5).view(x.shape)


class Noisy(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + torch.rand_like(t.to(x.dtype)).view(-1, 1, 1, 1)


CASES = {
    "unconditional UNet": (lambda: tiny_unet(), UNET),
    "conditional UNet": (lambda: tiny_unet(num_class_embeds=4), NetworkSpec((1, 8, 8), 4)),
    "attention": (lambda: tiny_unet(down_block_types=("DownBlock2D", "AttnDownBlock2D")), NetworkSpec((1, 8, 8))),
    "closed form": (Labelled, NetworkSpec((1, 4, 4), 10)),
    "a curve": (Curve, SMALL),
    "a batch's mean": (Wide, SMALL),
    "two channels": (Curve, NetworkSpec((2, 4, 4))),
    "views": (Viewing, NetworkSpec((2, 4, 4))),
    "no time": (Timeless, SMALL),
    "in place": (InPlace, SMALL),
    "in pieces": (Pieces, SMALL),
    "float64": (lambda: GaussianEps(np.linspace(0.999, 0.001, 1000)), SMALL),
}


def make(network: nn.Module, spec: NetworkSpec, precision: str = "float32"):
    module, spec = prepare_module(network, spec)
    source = ModelSource("a network", spec, module, None)
    return module, spec, denoisers(source, Target("cpu", precision))


def predictions(denoiser, given) -> np.ndarray:
    timesteps, conditioning, states = given
    values = tables(denoiser.compute(timesteps, conditioning), denoiser.step_inputs)
    enqueue, found = denoiser.new_context(), []
    for stage, state in enumerate(states):
        denoiser.input.copy_(torch.from_numpy(state))
        enqueue(values, stage)
        found.append(denoiser.output.float().numpy().copy())
    return np.stack(found)


def a_call(spec: NetworkSpec, batch_size: int):
    """Some timesteps are repeated, and meet again with another label."""
    rng = np.random.default_rng(0)
    timesteps = rng.choice([999.0, 500.0, 20.0], (4, batch_size))
    rows = {} if spec.num_classes is None else {LABELS: np.array([0, spec.num_classes - 1])}
    index = rng.integers(0, 2, batch_size) if rows else np.zeros(batch_size, np.int64)
    states = rng.standard_normal((4, batch_size, *spec.sample_shape), dtype=np.float32)
    return timesteps, Conditioning(rows, index), states


def expected(module, spec: NetworkSpec, given) -> np.ndarray:
    timesteps, conditioning, states = given
    host = TorchDenoiser(module, spec, batch_size=timesteps.shape[1])
    values, enqueue, found = host.compute(timesteps, conditioning), host.new_context(), []
    for stage, state in enumerate(states):
        host.input[...] = state
        enqueue(values, stage)
        found.append(host.output.copy())
    return np.stack(found)


# The conditional UNet has all that the other has.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case == "unconditional UNet" else case for case in CASES]
)
def test_the_parts_give_what_the_module_gives(case):
    network, spec = CASES[case]
    module, spec, of_size = make(network(), spec)
    for batch_size in (1, 3):
        denoiser, given = of_size(batch_size), a_call(spec, batch_size)
        assert denoiser.fallback is None
        assert denoiser.input.is_contiguous() == (case != "two channels")
        wanted = expected(module, spec, given)
        np.testing.assert_allclose(
            predictions(denoiser, given), wanted, rtol=0, atol=FLOAT32_NETWORK * np.abs(wanted).max()
        )


@pytest.mark.parametrize("precision", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_in_half_precision_the_earlier_parts_are_float32(precision):
    module, spec, of_size = make(*(make() if callable(make) else make for make in CASES["conditional UNet"]), precision)
    denoiser, given = of_size(2), a_call(spec, 2)
    wanted = expected(module, spec, given)
    tolerance = {"float16": FLOAT16_NETWORK, "bfloat16": BFLOAT16_NETWORK}[precision]
    np.testing.assert_allclose(predictions(denoiser, given), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    values = denoiser.compute(*given[:2])
    assert {array.dtype.kind for array in values.call.values()} == {"f"}
    assert {array.dtype for array in values.call.values()} == {np.dtype(np.float32)}
    assert {each.dtype for each in denoiser.step_inputs.values()} == {precision}


@pytest.mark.parametrize("counted", [False, True])
def test_values_of_every_binding_time(counted):
    _, _, of_size = make(EveryTime(), step_networks.SPEC)
    denoiser, given = of_size(3), step_networks.call(4, 3)
    values = denoiser.compute(*given[:2])
    assert values.plan
    assert values.call
    assert values.prompt.keys() > {PROMPTS, LABELS}
    assert_predicts(denoiser, given, counted=counted)


def split_of(network: nn.Module, spec: NetworkSpec, batch_size: int = 2):
    module, spec = prepare_module(network, spec)
    return module, SplitNetworks(module, module, spec).at(batch_size)


def test_a_unets_time_path_leaves_the_step_whole():
    """One step input for each residual block; no weight of the time embedding stays, and no weight is held twice."""
    module, network = split_of(tiny_unet(), UNET)
    own = {parameter.data_ptr(): name for name, parameter in module.named_parameters()}
    of_time = {name for name in own.values() if "time_emb" in name}
    kept = {own[tensor.data_ptr()] for tensor in network.step.state_dict().values()}
    assert kept == set(own.values()) - of_time
    assert len(network.inputs) - 1 == sum(name.endswith("time_emb_proj.weight") for name in of_time)
    before = {own[tensor.data_ptr()] for part in network.early.graphs.values() for tensor in part.state_dict().values()}
    assert before == of_time


def test_each_distinct_timestep_is_computed_once():
    *_, of_size = make(tiny_unet(), UNET)
    values = of_size(3).compute(np.array([[9.0, 9.0, 5.0], [5.0, 5.0, 0.0]]), Conditioning({}, np.zeros(3, np.int64)))
    assert {len(value) for value in values.plan.values()} == {3}


def test_a_size_that_the_module_treats_apart_is_traced_apart():
    """diffusers' UNets copy a value before they enlarge it from a batch of 64 on."""
    module, spec = prepare_module(tiny_unet(), UNET)
    networks = SplitNetworks(module, module, spec)
    small, large = networks.at(1), networks.at(64)
    assert networks.at(63) is small
    assert networks.at(200) is large
    assert small is not large
    assert {t.data_ptr() for t in small.step.state_dict().values()} == {
        t.data_ptr() for t in large.step.state_dict().values()
    }


def test_randomness_stays_in_the_step():
    _, network = split_of(Noisy(), SMALL)
    assert not network.early.crossing["plan"] or "rand" not in str(network.early.graphs["plan"].code)
    assert "rand" in str(network.step.code)


REFUSED = {
    "control flow": (Branching, "torch.export cannot trace it"),
    "rows that mix": (Running, "depends on other samples"),
    "a buffer that changes": (Counting, "changes its buffers"),
    "no state": (Blind, "does not follow from its sample"),
    "a batch size that is a constant": (OneSize, "batch size a constant"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_module_that_cannot_be_split_runs_as_it_is(case):
    network, reason = REFUSED[case]
    module, spec, of_size = make(network(), SMALL)
    denoiser, given = of_size(2), a_call(SMALL, 2)
    assert reason in denoiser.fallback
    assert list(denoiser.step_inputs) == ["timestep"]
    np.testing.assert_array_equal(predictions(denoiser, given), expected(module, spec, given))
