"""Ways to draw samples on a GPU: our loops, and what people use in their place, from the same network and noise.

All get x_T on the device and leave x_0 there; networks compute in half precision, with timesteps on the device. The
loops in Python use diffusers' DDIMScheduler with the state in the network's dtype, as its pipeline does, and give it
timesteps as numbers, so that it need not read them back from the device.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from skipstep.bench.gpu.device import BenchDevice
from skipstep.bench.gpu.tasks import CAPTURED, EAGER, REPLAYED
from skipstep.bench.models import BenchModel
from skipstep.plans.plan import Plan

# steps, x_T float32 [B, C, H, W] -> x_0 float32 [B, C, H, W], both on the device; all work may still be under way.
Draw = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Ready:
    """A contender that is ready to draw at one batch size. `captures` are reports of our engine, `close` frees it."""

    draw: Draw
    captures: list[dict[str, Any]] = field(default_factory=list)
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class GpuContender:
    """`prepare` takes the device, the model, its network in half precision, the batch size and plans by step count.

    `lacks` says what this machine has not of what it needs, empty if all is there. `half_state`: it keeps x_t in half
    precision. `only_first`: it is measured with the first network at the first batch size alone.
    """

    name: str
    backend: str
    loop: str
    prepare: Callable[[BenchDevice, BenchModel, torch.nn.Module, int, Mapping[int, Plan]], Ready]
    lacks: Callable[[], str] = lambda: ""
    half_state: bool = False
    only_first: bool = False


def ours(loop: str, **options: Any) -> Callable[..., Ready]:
    """Our engine with that loop and those options of Engine.build."""

    def prepare(
        device: BenchDevice, model: BenchModel, network: torch.nn.Module, batch_size: int, plans: Mapping[int, Plan]
    ) -> Ready:
        # From the float32 module: the engine makes its own of the dtype and layout that it wants.
        engine = device.build(model.unet, plans=plans.values(), batch_sizes=[batch_size], loop=loop, **options)

        def draw(steps: int, x_T: Tensor) -> Tensor:
            drawn: Tensor = engine.sample(steps=steps, x_T=x_T, output_type="pt")
            return drawn

        return Ready(draw, device.captures(engine), engine.close)

    return prepare


def scheduler_loop(model: BenchModel, predict: Callable[[Tensor, int], Tensor], dtype: torch.dtype) -> Draw:
    """diffusers' DDIMScheduler around `predict(x_t, t)`."""
    scheduler = copy.deepcopy(model.scheduler)

    @torch.inference_mode()
    def draw(steps: int, x_T: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        x = x_T.to(dtype)
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(predict(x, t), t, x).prev_sample
        return x.float()

    return draw


def eager(
    device: BenchDevice, model: BenchModel, network: torch.nn.Module, batch_size: int, plans: Mapping[int, Plan]
) -> Ready:
    return Ready(scheduler_loop(model, _predictor(network, device, batch_size), device.dtype))


def compiled(mode: str) -> Callable[..., Ready]:
    def prepare(
        device: BenchDevice, model: BenchModel, network: torch.nn.Module, batch_size: int, plans: Mapping[int, Plan]
    ) -> Ready:
        predict = _predictor(device.compiled(network, mode), device, batch_size)
        return Ready(scheduler_loop(model, predict, device.dtype))

    return prepare


def replayed(
    device: BenchDevice, model: BenchModel, network: torch.nn.Module, batch_size: int, plans: Mapping[int, Plan]
) -> Ready:
    """The network as one graph, replayed at every step by a scheduler in Python."""
    x_t, timestep, output, replay = network_graph(device, network, sample_shape(model), batch_size)

    def predict(x: Tensor, t: int) -> Tensor:
        x_t.copy_(x)
        timestep.fill_(t)
        replay()
        return output

    return Ready(scheduler_loop(model, predict, device.dtype))


def network_graph(
    device: BenchDevice, network: torch.nn.Module, shape: tuple[int, int, int], batch_size: int
) -> tuple[Tensor, Tensor, Tensor, Callable[[], None]]:
    """Input, timestep and output of a network that is recorded into a graph of its own, and how to replay it."""
    x_t = torch.zeros(batch_size, *shape, device=device.torch_device, dtype=device.dtype)
    timestep = torch.zeros(batch_size, device=device.torch_device, dtype=torch.int64)
    output = torch.zeros_like(x_t)

    @torch.inference_mode()
    def evaluate() -> None:
        output.copy_(network(x_t, timestep).sample)

    return x_t, timestep, output, device.graph(evaluate)


def sample_shape(model: BenchModel) -> tuple[int, int, int]:
    size = int(model.unet.config.sample_size)
    return int(model.unet.config.in_channels), size, size


def _predictor(network: Any, device: BenchDevice, batch_size: int) -> Callable[[Tensor, int], Tensor]:
    timestep = torch.zeros(batch_size, device=device.torch_device, dtype=torch.int64)

    def predict(x: Tensor, t: int) -> Tensor:
        timestep.fill_(t)
        predicted: Tensor = network(x, timestep).sample
        return predicted

    return predict


def _lacks_tensorrt() -> str:
    found = [name for name in ("tensorrt", "tensorrt_rtx") if importlib.util.find_spec(name)]
    return "" if found else "no package tensorrt or tensorrt_rtx"


def timed(prepare: Callable[[], Ready], device: BenchDevice) -> tuple[Ready, float]:
    """What `prepare` returns, and the seconds that it took with all its work finished."""
    started = time.perf_counter()
    ready = prepare()
    device.synchronize()
    return ready, time.perf_counter() - started


# By the task that measures them, in order.
CONTENDERS: Final[Mapping[str, tuple[GpuContender, ...]]] = {
    "latency-skipstep": (
        GpuContender(CAPTURED, "torch", "captured", ours("captured")),
        GpuContender("skipstep-step-graph", "torch", "step_graph", ours("step_graph"), only_first=True),
        GpuContender("skipstep-stepwise", "torch", "stepwise", ours("stepwise"), only_first=True),
    ),
    "latency-diffusers": (
        GpuContender(REPLAYED, "torch", "graph per step", replayed, half_state=True),
        GpuContender(EAGER, "torch", "python", eager, half_state=True),
    ),
    "latency-tensorrt": (
        GpuContender(
            "skipstep-tensorrt", "tensorrt", "captured", ours("captured", backend="tensorrt"), _lacks_tensorrt
        ),
    ),
    "latency-compiled": (
        GpuContender(
            "skipstep-captured-compiled",
            "torch, compiled",
            "captured",
            ours("captured", compile_network=True),
            only_first=True,
        ),
    ),
    "latency-reduce-overhead": (
        GpuContender(
            "diffusers-reduce-overhead", "torch.compile", "python", compiled("reduce-overhead"), half_state=True
        ),
    ),
    "latency-max-autotune": (
        GpuContender("diffusers-max-autotune", "torch.compile", "python", compiled("max-autotune"), half_state=True),
    ),
}
