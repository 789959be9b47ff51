"""A network above 2 GiB on the CPU: a UNet of Stable Diffusion 1.5's size, random weights in half precision.

python -m skipstep.bench.large_network [--side 32] [--encoder] [--json FILE]

Build (export, partition, comparison with torch), save (the bundle, drawn again from what was written), then in a new
process load and one step of the network. Peak memory is that of each process so far. It needs 20 GB of memory.
With --encoder the large part is SDXL's second text encoder, OpenCLIP bigG's, in a pipeline that is otherwise small.
"""

from __future__ import annotations

import argparse
import json
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


def sdxl_folder(folder: Path, side: int) -> Path:
    """An SDXL pipeline whose second text encoder has the true size, random weights in float16."""
    import diffusers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    units = sorted(ByteLevel.alphabet())
    words = [*units, *(f"{unit}</w>" for unit in units), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    large = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    parts = {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**small, **ends)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**large, **ends, projection_dim=1280)).half(),
        "vae": diffusers.AutoencoderKL(sample_size=side),
        "unet": diffusers.UNet2DConditionModel(
            sample_size=side,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64 + 1280,
            projection_class_embeddings_input_dim=1280 + 6 * 8,
            **added,
        ),
        "scheduler": diffusers.DDIMScheduler(),
    }
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")
        (folder / name / "tokenizer_config.json").write_text('{"model_max_length": 77}')
        index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@contextmanager
def stage(name: str, rows: list[list[str]]) -> Iterator[list[str]]:
    """Its time, its process's peak memory and what the body says of it become a row."""
    begun, said = time.perf_counter(), list[str]()
    yield said
    rows.append([name, f"{time.perf_counter() - begun:.0f}", f"{peak_bytes() / 1e9:.1f}", ", ".join(said)])
    print(*rows[-1], sep=" | ", flush=True)


def make(folder: Path, side: int, encoder: bool, rows: list[list[str]]) -> None:
    options: dict[str, Any] = {"plans": [1], "device": "cpu", "backend": "onnxruntime", "batch_sizes": [1]}
    if encoder:
        pipeline = sdxl_folder(folder.with_name("pipeline"), side)
        size = (pipeline / "text_encoder_2/model.safetensors").stat().st_size
    with stage("build", rows) as said:
        if encoder:
            said.append(f"{size / 2e6:.0f} M parameters in the encoder")
            engine = Engine.build(str(pipeline), **options)
        else:
            unet = sd15_sized(side)
            said.append(f"{sum(each.numel() for each in unet.parameters()) / 1e6:.0f} M parameters")
            schedule = NoiseSchedule.scaled_linear(1000)
            engine = Engine.build(unet, schedule=schedule, prompt_shape=PROMPT, **options)
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
    if engine.runner.pipeline is None:
        prompt: dict[str, Any] = {"prompt_embeds": np.random.default_rng(0).standard_normal((1, *PROMPT), np.float32)}
    else:
        prompt = {"prompt": "a red apple"}
    sample = engine.sample(steps=1, seeds=0, **prompt)
    return f"mean {sample.mean():.9g}, deviation {sample.std():.9g}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, save, load and run a network above 2 GiB on the CPU.")
    parser.add_argument("--side", type=int, default=32, help="of the latent image")
    parser.add_argument("--encoder", action="store_true", help="the second text encoder of SDXL instead of a UNet")
    parser.add_argument("--load", type=Path, help="a bundle: only load it and draw a sample")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows: list[list[str]] = []
    if chosen.load is not None:
        use(chosen.load, rows)
    else:
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder, "bundle")
            make(bundle, chosen.side, chosen.encoder, rows)
            command = [sys.executable, "-m", "skipstep.bench.large_network", "--load", str(bundle)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="")
            rows += [line.split(" | ") for line in done.stdout.splitlines()]
    if chosen.json is not None:
        run = f"python -m skipstep.bench.large_network --side {chosen.side}"
        run += " --encoder" if chosen.encoder else ""
        note = "float32 on the CPU. The prediction of a random network says only that it is the same one."
        write_finding(chosen.json, command=run, header=HEADER, rows=rows, note=note)


if __name__ == "__main__":
    main()
