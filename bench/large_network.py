"""A network above 2 GiB on the CPU: a UNet of Stable Diffusion 1.5's size, random weights in half precision.

python -m skipstep.bench.large_network [--side 32] [--json FILE]

Build (export, partition, comparison with torch), save (the bundle, drawn again from what was written), then in a new
process load and one step of the network. Peak memory is that of each process so far. It needs 20 GB of memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipstep import Engine, NoiseSchedule, load
from skipstep.bench.measurements import peak_bytes
from skipstep.bench.record import write_finding

HEADER = ["stage", "seconds", "peak memory of its process, GB", "result"]
# The tokens of a prompt and their width.
PROMPT = (77, 768)


def sd15_sized(side: int) -> torch.nn.Module:
    """UNet2DConditionModel in the configuration of Stable Diffusion 1.5, random weights in float16."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: torch.nn.Module = UNet2DConditionModel(sample_size=side, cross_attention_dim=PROMPT[1], attention_head_dim=8)
    return unet.half().eval()


@contextmanager
def stage(name: str, rows: list[list[str]]) -> Iterator[list[str]]:
    """Its time, its process's peak memory and what the body says of it become a row."""
    begun, said = time.perf_counter(), list[str]()
    yield said
    rows.append([name, f"{time.perf_counter() - begun:.0f}", f"{peak_bytes() / 1e9:.1f}", ", ".join(said)])
    print(*rows[-1], sep=" | ", flush=True)


def make(folder: Path, side: int, rows: list[list[str]]) -> None:
    schedule = NoiseSchedule.scaled_linear(1000)
    with stage("build", rows) as said:
        unet = sd15_sized(side)
        said.append(f"{sum(each.numel() for each in unet.parameters()) / 1e6:.0f} M parameters")
        options: dict[str, Any] = {
            "device": "cpu",
            "backend": "onnxruntime",
            "batch_sizes": [1],
            "prompt_shape": PROMPT,
        }
        engine = Engine.build(unet, plans=[1], schedule=schedule, **options)
        del unet
    with stage("save", rows) as said:
        engine.save(folder, license="CC0-1.0")
        sizes = [each.stat().st_size for each in folder.rglob("*") if each.is_file()]
        said.append(f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} files, the largest of {max(sizes) / 1e9:.2f} GB")
    with stage("one step", rows) as said:
        said.append(drawn(engine))


def use(folder: Path, rows: list[list[str]]) -> None:
    with stage("load, in a new process", rows):
        engine = load(folder)
    with stage("one step", rows) as said:
        said.append(drawn(engine))


def drawn(engine: Engine) -> str:
    prompt = np.random.default_rng(0).standard_normal((1, *PROMPT), np.float32)
    sample = engine.sample(steps=1, seeds=0, prompt_embeds=prompt)
    return f"mean {sample.mean():.9g}, deviation {sample.std():.9g}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, save, load and run a network above 2 GiB on the CPU.")
    parser.add_argument("--side", type=int, default=32, help="of the latent image")
    parser.add_argument("--load", type=Path, help="a bundle: only load it and draw a sample")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows: list[list[str]] = []
    if chosen.load is not None:
        use(chosen.load, rows)
    else:
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder, "bundle")
            make(bundle, chosen.side, rows)
            command = [sys.executable, "-m", "skipstep.bench.large_network", "--load", str(bundle)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="")
            rows += [line.split(" | ") for line in done.stdout.splitlines()]
    if chosen.json is not None:
        run = f"python -m skipstep.bench.large_network --side {chosen.side}"
        note = "float32 on the CPU. The prediction of a random network says only that it is the same one."
        write_finding(chosen.json, command=run, header=HEADER, rows=rows, note=note)


if __name__ == "__main__":
    main()
