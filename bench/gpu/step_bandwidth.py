"""The step kernel's memory bandwidth beside a device copy's, over sizes.

A step moves the state in and out (4 + 4 bytes an element), the network's output in and its next input out, both twice
where guidance doubles the batch. A copy moves as many bytes. Both are recorded into graphs of many launches, as loops
launch them, and walk over as many sets of operands as it takes to find none of them in the last cache; small sizes,
which would take thousands, say that they were served by it. Ratios are formed within a turn.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from skipstep import NoiseSchedule, Plan
from skipstep.bench.gpu.device import BenchDevice
from skipstep.kernels.launch import StepLaunch
from skipstep.kernels.layout import StepFlags
from skipstep.kernels.step import ddim_step

# Bytes of the float32 state.
SIZES: Final = tuple(4 << (10 + shift) for shift in (0, 4, 8, 12, 14, 16, 18))  # 4 KiB to 1 GiB
DRY_SIZES: Final = (4 << 10,)
DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
# eta, guided
VARIANTS: Final = ((0.0, False), (1.0, False), (0.0, True))
_ROUNDS: Final = 15
_MAX_LAUNCHES: Final = 256
_BYTES_PER_GRAPH: Final = 2 << 30
_SMALL_STATE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Operands:
    """One set of what a step reads and writes."""

    state: torch.Tensor
    model_output: torch.Tensor
    network_input: torch.Tensor


def measure_bandwidth(device: BenchDevice) -> list[dict[str, Any]]:
    """A case for every size, dtype and variant; those that the memory does not hold say so and have no numbers."""
    cases = []
    sizes = DRY_SIZES if device.simulated else SIZES
    for state_bytes, dtype, (eta, guided) in itertools.product(sizes, DTYPES, VARIANTS):
        case = {"state_bytes": state_bytes, "dtype": str(dtype).removeprefix("torch."), "eta": eta, "guided": guided}
        device.forget_peak()
        try:
            case |= _measure(device, state_bytes, dtype, eta=eta, guided=guided)
        except torch.OutOfMemoryError as error:
            case["reason"] = str(error).splitlines()[0]
        cases.append(case)
    return cases


def _measure(device: BenchDevice, state_bytes: int, dtype: torch.dtype, *, eta: float, guided: bool) -> dict[str, Any]:
    batch_size = 1 if state_bytes <= _SMALL_STATE else 16
    shape = (batch_size, state_bytes // 4 // batch_size, 1, 1)
    copies = 2 if guided else 1
    num_bytes = 2 * (state_bytes + copies * math.prod(shape) * dtype.itemsize)
    launches = 2 if device.simulated else max(2, min(_MAX_LAUNCHES, _BYTES_PER_GRAPH // num_bytes))
    num_sets = min(launches, 2 * device.cache_bytes // num_bytes + 2)
    sets = [_operands(device, shape, dtype, copies) for _ in range(num_sets)]
    halves = [torch.empty(num_bytes // 2, dtype=torch.uint8, device=device.torch_device) for _ in range(2 * num_sets)]

    launch = device.launch(num_elements=shape[1], batch_size=batch_size, item_size=dtype.itemsize)
    launch_step = _stepper(device, batch_size, launch, eta=eta, guided=guided)

    def steps() -> None:
        for index in range(launches):
            launch_step(sets[index % num_sets])

    def copying() -> None:
        for index in range(launches):
            halves[2 * (index % num_sets)].copy_(halves[2 * (index % num_sets) + 1])

    step, copy = device.graph(steps), device.graph(copying)
    for work in (step, copy):
        device.seconds(work)
    rounds = 2 if device.simulated else _ROUNDS
    turns = [(device.seconds(step) / launches, device.seconds(copy) / launches) for _ in range(rounds)]
    if not all(bool(each.state.isfinite().all()) for each in sets):
        raise ArithmeticError("the step left NaN or infinity in the state")
    return {
        "bytes": num_bytes,
        "launches": launches,
        "block_size": launch.block_size,
        "num_warps": launch.num_warps,
        "beyond_cache": num_sets * num_bytes > 2 * device.cache_bytes,
        "step_seconds": statistics.median(s for s, _ in turns),
        "copy_seconds": statistics.median(c for _, c in turns),
        "step_gb_per_s": num_bytes / statistics.median(s for s, _ in turns) / 1e9,
        "copy_gb_per_s": num_bytes / statistics.median(c for _, c in turns) / 1e9,
        "step_against_copy": statistics.median(c / s for s, c in turns),
    }


def _operands(device: BenchDevice, shape: tuple[int, ...], dtype: torch.dtype, copies: int) -> Operands:
    output = torch.randn(copies * shape[0], *shape[1:], device=device.torch_device, dtype=dtype)
    return Operands(torch.randn(shape, device=device.torch_device), output, torch.empty_like(output))


def _stepper(
    device: BenchDevice, batch_size: int, launch: StepLaunch, *, eta: float, guided: bool
) -> Callable[[Operands], None]:
    # With x0 clipped, the same step may be taken on its own result however often, and the state stays bounded.
    plan = Plan(schedule=NoiseSchedule.linear(1000), steps=10, eta=eta, convention="diffusers")
    stage = 5
    flags: StepFlags = replace(plan.stage_flags[stage], guided=guided)
    table = torch.tensor(plan.coefficients[:, None], device=device.torch_device)
    seeds = torch.arange(batch_size, device=device.torch_device)
    guidance = torch.full((batch_size,), 2.0, device=device.torch_device)

    def step(operands: Operands) -> None:
        ddim_step(
            state=operands.state,
            model_output=operands.model_output,
            network_input=operands.network_input,
            table=table,
            stage=stage,
            flags=flags,
            seeds=seeds if flags.add_noise else None,
            guidance=guidance if guided else None,
            launch=launch,
        )

    return step
