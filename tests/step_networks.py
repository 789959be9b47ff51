"""A network that looks something up from every binding time, for the backends that run its step on a device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from engines import parts_of
from tiny_networks import tiny_unet
from tolerances import FLOAT16_NETWORK, FLOAT32_NETWORK
from torch import Tensor, nn

from skipstep.backends.denoiser import StepInput
from skipstep.backends.onnxruntime import EarlyGraphs, LazySession, OnnxRuntimeDenoiser, make_session
from skipstep.backends.torch import DenoisingModule, prepare_module
from skipstep.calls.conditioning import LABELS, PROMPTS, Conditioning
from skipstep.model_source import ModelSource
from skipstep.networks.graphs import Partition, StepInputs
from skipstep.networks.spec import NetworkSpec

SPEC = NetworkSpec((2, 4, 4), num_classes=5, null_label=5, prompt_shape=(3, 6))


class EveryTime(nn.Module):
    """Scales by the timestep, shifts by timestep and label, adds what the prompt says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.labels = nn.Linear(4, 2), nn.Embedding(6, 2)
        self.both, self.prompt = nn.Linear(2, 2), nn.Linear(6, 16)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, prompts: Tensor, labels: Tensor) -> Tensor:
        phase = t.float()[:, None] / torch.tensor([1000.0, 300.0, 100.0, 30.0])
        time = self.time(torch.sin(phase))
        both = torch.tanh(self.both(time + self.labels(labels)))
        told = torch.tanh(self.prompt(prompts)).mean(1).view(-1, 1, 4, 4)
        return self.conv(x * (1 + torch.tanh(time)[:, :, None, None]) + both[:, :, None, None]) + told


@cache
def parts() -> Partition:
    return parts_of(EveryTime(), SPEC)


def source() -> ModelSource:
    return ModelSource("EveryTime", SPEC, DenoisingModule(EveryTime()), None, _partition=parts())


def early_graphs() -> EarlyGraphs:
    return EarlyGraphs(parts().graphs.before_loop, SPEC)


@cache
def unet_step(**options: Any) -> bytes:
    """The step network of a small UNet for 1×8×8, its batch open."""
    module, spec = prepare_module(tiny_unet(**options), NetworkSpec((1, 8, 8), fractional_timesteps=True))
    return parts_of(module, spec).graphs.step


def call(num_stages: int, batch_size: int, seed: int = 0) -> tuple[np.ndarray, Conditioning, np.ndarray]:
    """Timesteps of each stage and sample, who is told what, and a state of each stage."""
    rng = np.random.default_rng(seed)
    # Few enough that some meet again with another prompt: then pairs are not numbered as timesteps are.
    timesteps = rng.choice(rng.integers(0, 1000, 3), (num_stages, batch_size)).astype(np.float64)
    rows = {
        PROMPTS: rng.standard_normal((2, 3, 6), dtype=np.float32),
        LABELS: rng.integers(0, 5, 2),
    }
    states = rng.standard_normal((num_stages, batch_size, *SPEC.sample_shape), dtype=np.float32)
    return timesteps, Conditioning(rows, rng.integers(0, 2, batch_size)), states


def expected(timesteps: np.ndarray, conditioning: Conditioning, states: np.ndarray) -> list[np.ndarray]:
    """What the CPU's backend predicts at each stage."""
    session = LazySession(lambda: make_session(parts().graphs.step))
    host = OnnxRuntimeDenoiser(session, early_graphs(), SPEC, batch_size=timesteps.shape[1])
    values, enqueue = host.compute(timesteps, conditioning), host.new_context()
    predictions = []
    for stage, state in enumerate(states):
        host.input[...] = state
        enqueue(values, stage)
        predictions.append(host.output.copy())
    return predictions


def assert_predicts(
    network: Any,
    given: tuple[np.ndarray, Conditioning, np.ndarray],
    *,
    enqueue: Any = None,
    counted: bool = False,
    looked_up: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """`network` predicts at each stage, in `dtype`, what the CPU's backend does.

    `counted`: the stage is a number on the device. Without `looked_up` step inputs stand in memory without gaps.
    """
    looked_up = looked_up or tables(network.compute(*given[:2]), network.step_inputs)
    looked_up = {name: value.to(network.input.device) for name, value in looked_up.items()}
    enqueue = enqueue or network.new_context()
    found = []
    for stage, state in enumerate(given[2]):
        network.input.copy_(torch.from_numpy(state))
        counter = torch.tensor([stage], dtype=torch.int32, device=network.input.device)
        enqueue(looked_up, counter if counted else stage)
        found.append(network.output.float().cpu().numpy().copy())
    assert network.output.dtype == dtype
    assert_close(found, given, dtype)


def assert_close(found: Any, given: tuple[np.ndarray, Conditioning, np.ndarray], dtype: torch.dtype) -> None:
    wanted = np.stack(expected(*given))
    tolerance = {torch.float32: FLOAT32_NETWORK, torch.float16: FLOAT16_NETWORK}[dtype]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def tables(values: StepInputs, wanted: Mapping[str, StepInput], *, pitch: int = 1) -> dict[str, Tensor]:
    """`values` as a loop holds them on its device: rows of stages follow each other at multiples of `pitch` bytes."""
    laid_out = {}
    for name, each in wanted.items():
        value, dtype, per_stage = values.expanded(name), getattr(torch, each.dtype), each.per_stage
        rows = torch.from_numpy(value if per_stage else value[None]).to(dtype)
        row_bytes = -(-rows[0].nbytes // pitch) * pitch
        memory = torch.full((len(rows) * row_bytes + 256,), 0x7F, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 256 :][: len(rows) * row_bytes]
        steps = memory.view(len(rows), row_bytes)[:, : rows[0].nbytes]
        table = steps.view(dtype).unflatten(1, rows.shape[1:])
        table.copy_(rows)
        laid_out[name] = table if per_stage else table[0]
    return laid_out
