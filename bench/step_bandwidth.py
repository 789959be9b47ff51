"""The step kernel's memory bandwidth beside a device copy's: `python -m skipstep.bench.step_bandwidth --out FILE`.

A step moves state in and out (4 + 4 bytes an element), the network's output in and its next input out. A copy moves
as many bytes in and out. The tensors exceed the GPU's cache, so both measure its memory.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from skipstep import NoiseSchedule, Plan
from skipstep.bench.record import write_json
from skipstep.kernels.step import ddim_step

SHAPE = (64, 4, 512, 512)
ROUNDS = 20


def measure(dtype: torch.dtype, *, eta: float, rounds: int = ROUNDS) -> dict[str, Any]:
    """GB/s of the step and of a copy of as many bytes, taking turns."""
    plan = Plan(schedule=NoiseSchedule.linear(1000), steps=10, eta=eta)
    state = torch.randn(SHAPE, device="cuda")
    output = torch.randn(SHAPE, device="cuda").to(dtype)
    network_input = torch.empty_like(output)
    table = torch.tensor(plan.coefficients[:, None], device="cuda")
    seeds = torch.arange(SHAPE[0], device="cuda")
    num_bytes = 2 * (state.nbytes + output.nbytes)
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def step() -> None:
        ddim_step(
            state=state,
            model_output=output,
            network_input=network_input,
            table=table,
            stage=0,
            flags=plan.stage_flags[0],
            seeds=seeds,
        )

    def copy() -> None:
        target.copy_(source)

    for run in (step, copy) * 3:
        run()
    seconds = [(device_seconds(step), device_seconds(copy)) for _ in range(rounds)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "eta": eta,
        "bytes": num_bytes,
        "step_gb_per_s": num_bytes / statistics.median(s for s, _ in seconds) / 1e9,
        "copy_gb_per_s": num_bytes / statistics.median(c for _, c in seconds) / 1e9,
        "step_against_copy": statistics.median(c / s for s, c in seconds),
    }


def device_seconds(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    cases = [measure(dtype, eta=eta) for dtype in (torch.float16, torch.bfloat16, torch.float32) for eta in (0.0, 1.0)]
    for case in cases:
        print(
            f"{case['dtype']:9s} eta {case['eta']:g}: {case['step_gb_per_s']:.0f} GB/s, "
            f"{case['step_against_copy']:.1%} of a copy"
        )
    write_json(options.out, {"shape": SHAPE, "cases": cases})


if __name__ == "__main__":
    main()
