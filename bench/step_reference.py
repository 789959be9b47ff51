"""The step's reference on the CPU beside a copy in memory: `python -m skipstep.bench.step_reference --out FILE`.

skipstep.kernels.step_numpy does the kernel's operations one array at a time, so it moves each operand several times;
the kernel on a GPU moves each once. Both counts are given as what the kernel has to move: state and network's tensor,
in and out. A copy moves as many bytes. The two take turns, and ratios are formed within a turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from skipstep import NoiseSchedule, Plan
from skipstep.bench.markdown import describe_environment, markdown, read_result
from skipstep.bench.record import write_json
from skipstep.bench.timing import median_ratio
from skipstep.calls.noise import StageNoise
from skipstep.kernels.step_numpy import NumpyStep

# Bytes of the float32 state: 4 KiB to 64 MiB.
SIZES = tuple(1 << shift for shift in (12, 16, 20, 24, 26))
_ROUNDS = 15
_SECONDS_A_TURN = 0.02


def measure(state_bytes: int, *, eta: float, rounds: int = _ROUNDS) -> dict[str, Any]:
    """GB/s of the step and of a copy of as many bytes."""
    plan = Plan(schedule=NoiseSchedule.linear(1000), steps=10, eta=eta)
    rng = np.random.default_rng(0)
    num_elements = state_bytes // 4
    state, output = (rng.standard_normal((1, 1, num_elements, 1), dtype=np.float32) for _ in range(2))
    kept = state.copy()
    seeds = np.zeros(1, np.uint64)
    step = NumpyStep(
        state=state,
        model_output=output,
        network_input=np.empty_like(output),
        table=plan.coefficients[:, None],
        flags=plan.stage_flags,
        noise=StageNoise(seeds, num_elements, 1, max_elements=num_elements),
    )
    moved = 4 * state_bytes
    source, target = np.ones(moved // 2, np.uint8), np.empty(moved // 2, np.uint8)

    def run_step() -> None:
        np.copyto(state, kept)
        step(0)

    def run_copy() -> None:
        np.copyto(target, source)

    calls = [_calls_for_a_turn(run) for run in (run_step, run_copy)]
    seconds = [(_seconds(run_step, calls[0]), _seconds(run_copy, calls[1])) for _ in range(rounds)]
    steps, copies = ([each[place] for each in seconds] for place in (0, 1))
    return {
        "state_bytes": state_bytes,
        "eta": eta,
        "moved_bytes": moved,
        "step_gb_per_s": moved / statistics.median(steps) / 1e9,
        "copy_gb_per_s": moved / statistics.median(copies) / 1e9,
        "step_against_copy": median_ratio(copies, steps),
    }


def _calls_for_a_turn(run: Callable[[], None]) -> int:
    run()
    return max(1, round(_SECONDS_A_TURN / _seconds(run, 1)))


def _seconds(run: Callable[[], None], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def reference_table(results: Path) -> str:
    """One line a size: GB/s of plain DDIM, with noise, and of a copy."""
    result = read_result(results / "step-reference.json")
    by_case = {(case["state_bytes"], case["eta"]): case for case in result["cases"]}
    rows = []
    for size in dict.fromkeys(case["state_bytes"] for case in result["cases"]):
        plain, noisy = by_case[size, 0.0], by_case[size, 1.0]
        name = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        rows.append(
            [name, *(f"{case['step_gb_per_s']:.2f}" for case in (plain, noisy)), f"{plain['copy_gb_per_s']:.1f}"]
        )
    header = ["state", "plain DDIM, GB/s", "with noise drawn, GB/s", "a copy, GB/s"]
    return markdown(header, rows) + f"\n\nMedians. {describe_environment(result['environment'])}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    write_json(options.out, {"cases": [measure(size, eta=eta) for size in SIZES for eta in (0.0, 1.0)]})


if __name__ == "__main__":
    main()
