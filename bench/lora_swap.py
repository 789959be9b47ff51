"""Ways to swap LoRAs on the CPU: the swap, at the attention layers of Stable Diffusion 1.5, and its cost in a step.

python -m skipstep.bench.lora_swap [--json FILE]

A swap reads a float16 file from the page cache and does what Engine.swap_loras does. Steps are those of a network with
the two outer widths of Stable Diffusion, 320 and 640, one sample of 32x32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save_file

from skipstep import Engine, NoiseSchedule
from skipstep.backends.onnxruntime import make_session
from skipstep.bench.large_network import PROMPT, sd15_sized
from skipstep.bench.record import write_finding
from skipstep.networks.lora import fit, read_loras
from skipstep.networks.lora_layers import Loras, layers_of, put

HEADER = ["measured", "processor ms", "least to most", "least ms of the clock", "memory that is written"]


def measured(runs: Mapping[str, Callable[[], object]], repeats: int) -> Iterator[list[str]]:
    """Medians of one thread, in turns: other load on the machine, which the clock counts, meets all of them."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            begun = time.process_time(), time.perf_counter()
            run()
            spent = 1e3 * (time.process_time() - begun[0]), 1e3 * (time.perf_counter() - begun[1])
            times[name] += [spent] if repeat >= 0 else []
    for name, found in times.items():
        processor, clock = zip(*found, strict=True)
        least, most = min(processor), max(processor)
        yield [name, f"{statistics.median(processor):.1f}", f"{least:.1f} to {most:.1f}", f"{min(clock):.1f}"]


def swaps(folder: Path, rank: int, repeats: int) -> Iterator[list[str]]:
    with torch.device("meta"):
        network = sd15_sized(64)
    shapes = {path: each.weight.shape for path, each in layers_of(network).items() if ".attn" in path}
    files = []
    for name in "ab":
        tensors = {}
        for path, (out, inner) in shapes.items():
            tensors[f"unet.{path}.lora_A.weight"] = torch.randn(rank, inner).half()
            tensors[f"unet.{path}.lora_B.weight"] = torch.randn(out, rank).half()
        files.append(folder / f"{name}.safetensors")
        save_file(tensors, files[-1])
    loras, turns = Loras(rank=rank), cycle(files)
    loras.apply("unet", network, "network")
    weights = {path: torch.randn(shape) for path, shape in shapes.items()}
    changed = {path: torch.empty_like(each) for path, each in weights.items()}

    def beside() -> None:
        put(loras.changes(read_loras([next(turns)], digests=False)))

    def replaced() -> None:
        for path, (one,) in fit(read_loras([next(turns)], digests=False), "unet", loras.names["unet"]).items():
            up, down = torch.from_numpy(one.up), torch.from_numpy(one.down)
            torch.addmm(weights[path], up, down, alpha=one.factor, out=changed[path])

    written = [sum(each.nbytes for each in loras.inputs["unet"].values())]
    written.append(sum(each.nbytes for each in changed.values()))
    runs = {f"swap, factors beside {len(loras.slots['unet'])} layers, rank {rank}": beside}
    runs[f"swap, new weights of {len(shapes)} layers, rank {rank}"] = replaced
    for row, size in zip(measured(runs, repeats), written, strict=True):
        yield [*row, f"{size / 1e6:.0f} MB"]


def steps(repeats: int) -> Iterator[list[str]]:
    from diffusers import UNet2DConditionModel

    sizes = {"block_out_channels": (320, 640), "layers_per_block": 1, "attention_head_dim": 8}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    torch.manual_seed(0)
    network = UNet2DConditionModel(sample_size=32, cross_attention_dim=PROMPT[1], **sizes, **blocks)
    options: dict[str, Any] = {"backend": "onnxruntime", "device": "cpu", "prompt_shape": PROMPT}
    options |= {"plans": [1], "schedule": NoiseSchedule.scaled_linear(1000)}
    graphs = {}
    for rank in (None, 16, 64):
        with Engine.build(network, lora_rank=rank, **options) as engine:
            graphs["step" if rank is None else f"step, factors of rank {rank} beside"] = engine.source.step_graph(
                "float32"
            )
    model = onnx.load_from_string(graphs["step"])
    read = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    free = [each for each in model.graph.initializer if each.name in read and len(each.dims) == 2]
    for each in free:
        model.graph.input.append(onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims))
        model.graph.initializer.remove(each)
    graphs[f"step, {len(free)} weights as inputs"] = model.SerializeToString()
    yield from ([*row, ""] for row in measured({name: _runner(graph) for name, graph in graphs.items()}, repeats))


def _runner(graph: bytes) -> Callable[[], object]:
    session, rng = make_session(graph, num_threads=1), np.random.default_rng(0)
    binding = session.io_binding()
    for each in session.get_inputs():
        shape = [side if isinstance(side, int) else 1 for side in each.shape]
        binding.bind_cpu_input(each.name, rng.standard_normal(shape, np.float32) * 0.02)
    for each in session.get_outputs():
        binding.bind_output(each.name)
    return lambda: session.run_with_iobinding(binding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in (16, 64):
            rows += list(swaps(Path(folder), rank, options.repeats))
    rows += list(steps(options.repeats))
    for row in rows:
        print(*row, sep=" | ")
    if options.json is not None:
        command = "python -m skipstep.bench.lora_swap --json bench/results/findings/lora-swap.json"
        note = f"One thread, {options.repeats} repeats in turns."
        write_finding(options.json, command=command, header=HEADER, rows=rows, note=note)


if __name__ == "__main__":
    main()
