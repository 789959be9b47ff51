"""From the start of a process to its first image: `python -m skipstep.bench.cold_start --out FILE`.

Ten steps at batch 1 of the shipped model, from its bundle and from its checkpoint with diffusers' pipeline. Processes
take turns; what is timed is the whole of each, interpreter and imports included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from skipstep.bench.record import write_json
from skipstep.bench.timing import median_ratio
from skipstep.demo import SHIPPED_BUNDLE, SHIPPED_MODEL

_PROCESSES = {
    "interpreter": "pass",
    "bundle": f"import skipstep; skipstep.load({str(SHIPPED_BUNDLE)!r}, allow_hard_links=True)"
    ".sample(steps=10, seeds=0, class_labels=9)",
    # Its class embedding is the one thing that the pipeline does not know of.
    "diffusers": f"""
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
unet = UNet2DModel.from_pretrained({str(SHIPPED_MODEL)!r}, subfolder="unet")
forward = unet.forward
unet.forward = lambda sample, timestep: forward(sample, timestep, torch.tensor([9]))
scheduler = DDIMScheduler.from_pretrained({str(SHIPPED_MODEL)!r}, subfolder="scheduler")
pipeline = DDIMPipeline(unet, scheduler)
pipeline.set_progress_bar_config(disable=True)
pipeline(1, num_inference_steps=10, output_type="np")
""",
}


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each process, by name: one to warm the file cache, then `rounds` turns."""
    seconds: dict[str, list[float]] = {name: [] for name in _PROCESSES}
    # Compiled modules are written once and read afterwards, as in any installation.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    for turn in range(rounds + 1):
        for name, code in _PROCESSES.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=11, help="processes of each kind (default: 11)")
    options = parser.parse_args()
    seconds = measure(options.rounds)
    write_json(
        options.out,
        {
            "steps": 10,
            "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
            "ratio_to_diffusers": median_ratio(seconds["diffusers"], seconds["bundle"]),
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
