"""Text to picture on the CPU: skipstep, diffusers and openvino_genai, the same pipeline, and what each part takes.

python -m skipstep.bench.pipeline_latency --out FILE [--side 512] [--guidance 1 7.5] [--rounds 1] [--model FOLDER]

Batch 1, random weights of Stable Diffusion 1.5's size or those of a diffusers folder, the same prompt and noise. Every
contender and guidance is a process of its own, in rounds, so that they take turns and each has its own peak memory;
its first call is not counted. Results are written after each process, and are kept, also by a command for
further rounds, contenders or guidances at the same commit.
The forms of the pipeline are made in --work first, and kept: some 20 GB of memory, more for pictures above 256 pixels.
openvino_genai and openvino_tokenizers may be in an environment that sees this one: `make pipeline-latency`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from skipstep import load
from skipstep.bench.measurements import peak_bytes
from skipstep.bench.pipeline_forms import FORMS, STEPS
from skipstep.bench.record import environment, write_finding

PROMPT: Final = "a red apple"
PARTS: Final = ("text encoder", "UNet", "decoder")
HEADER: Final = ["contender", "guidance", "steps", "seconds", "× diffusers", "UNet, seconds a step", *PARTS, "rest",
                 "peak memory, GB", "off by, of 255"]  # fmt: skip
# Of 99.9 % of the values, in units of an 8-bit picture. openvino_genai cuts off what is behind the point.
TOLERANCES: Final = {"float32": 2.0, "bfloat16": 64.0}


class Clock:
    """Seconds by part, of functions that were made `of` others."""

    def __init__(self) -> None:
        self.seconds = defaultdict[str, float](float)

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            result = function(*given, **named)
            self.seconds[part] += time.perf_counter() - begun
            return result

        return timed


# A call of so many steps: the picture [H, W, 3] in units of an 8-bit one.
Call = Callable[[int], NDArray[Any]]


@dataclass(frozen=True)
class Case:
    root: Path
    side: int
    guidance: float
    precision: str
    backend: str
    noise: NDArray[np.float32]
    clock: Clock


def skipstep(case: Case) -> Call:
    threads, clock = torch.get_num_threads(), case.clock
    runs: dict[str, Any] = {"backend": case.backend, "precision": case.precision, "num_threads": threads}
    engine: Any = load(case.root / "bundle", allow_hard_links=True, **runs)
    parts = engine.runner.pipeline
    parts.embed, parts.decode = clock.of("text encoder", parts.embed), clock.of("decoder", parts.decode)
    with engine.runner.loop.buffers(2 if case.guidance > 1 else 1) as network:
        new_context, network.compute = network.new_context, clock.of("UNet", network.compute)
        network.new_context = lambda: clock.of("UNet", new_context())

    def call(steps: int) -> NDArray[Any]:
        made = engine.sample(prompt=PROMPT, steps=steps, guidance_scale=case.guidance, x_T=case.noise)
        return np.asarray((made[0].transpose(1, 2, 0) + 1) * 127.5)

    return call


def diffusers(case: Case) -> Call:
    from diffusers import StableDiffusionPipeline

    clock, dtype = case.clock, getattr(torch, case.precision)
    pipe = StableDiffusionPipeline.from_pretrained(case.root / "diffusers", torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.forward = clock.of("text encoder", pipe.text_encoder.forward)
    pipe.unet.forward, pipe.vae.decode = clock.of("UNet", pipe.unet.forward), clock.of("decoder", pipe.vae.decode)
    given = {"guidance_scale": case.guidance, "height": case.side, "width": case.side, "output_type": "np"}

    def call(steps: int) -> NDArray[Any]:
        latents = torch.from_numpy(case.noise).to(dtype)
        return np.asarray(pipe(PROMPT, num_inference_steps=steps, latents=latents, **given).images[0] * 255)

    return call


def openvino_genai(case: Case) -> Call:
    import openvino
    import openvino_genai as genai

    class Noise(genai.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            genai.Generator.__init__(self)

        def randn_tensor(self, shape: Any) -> Any:
            assert tuple(shape) == case.noise.shape
            return openvino.Tensor(case.noise.copy())

    pipe = genai.Text2ImagePipeline(case.root / "openvino")
    pipe.reshape(1, case.side, case.side, case.guidance)
    hint = {"float32": "f32", "bfloat16": "bf16"}[case.precision]
    pipe.compile("CPU", INFERENCE_PRECISION_HINT=hint, INFERENCE_NUM_THREADS=torch.get_num_threads())
    given = {"guidance_scale": case.guidance, "height": case.side, "width": case.side}

    def call(steps: int) -> NDArray[Any]:
        made = pipe.generate(PROMPT, num_inference_steps=steps, generator=Noise(), **given).data[0]
        told = pipe.get_performance_metrics()
        case.clock.seconds["text encoder"] += sum(told.get_text_encoder_infer_duration().values()) / 1e3
        case.clock.seconds["UNet"] += sum(told.raw_metrics.unet_inference_durations) / 1e6
        case.clock.seconds["decoder"] += told.get_vae_decoder_infer_duration() / 1e3
        return np.asarray(made, np.float32)

    return call


# How it is called, what it reads, its precision and our backend.
CONTENDERS: Final[dict[str, tuple[Callable[[Case], Call], str, str, str]]] = {
    "diffusers": (diffusers, "diffusers", "float32", ""),
    "skipstep": (skipstep, "bundle", "float32", "onnxruntime"),
    "skipstep-openvino": (skipstep, "bundle", "float32", "openvino"),
    "openvino-genai": (openvino_genai, "openvino", "float32", ""),
    "diffusers-bfloat16": (diffusers, "diffusers", "bfloat16", ""),
    "skipstep-openvino-bfloat16": (skipstep, "bundle", "bfloat16", "openvino"),
    "openvino-genai-bfloat16": (openvino_genai, "openvino", "bfloat16", ""),
}


def measure(name: str, root: Path, side: int, guidance: float) -> dict[str, Any]:
    """In a process of its own. What diffusers drew in float32 before is the reference; raises SystemExit where the
    picture is another one."""
    make, _, precision, backend = CONTENDERS[name]
    vae = json.loads((root / "diffusers/vae/config.json").read_text())
    latent = side // 2 ** (len(vae["block_out_channels"]) - 1)
    noise = np.random.default_rng(0).standard_normal((1, vae["latent_channels"], latent, latent), np.float32)
    clock, calls = Clock(), []
    call = make(Case(root, side, guidance, precision, backend, noise, clock))
    call(min(STEPS))
    for steps in STEPS:
        clock.seconds.clear()
        begun = time.perf_counter()
        picture = call(steps)
        seconds, parts = time.perf_counter() - begun, [clock.seconds[part] for part in PARTS]
        reference = root / f"picture-{guidance:g}-{steps}.npy"
        if name == "diffusers":
            np.save(reference, picture)
        off = float(np.quantile(np.abs(picture - np.load(reference)), 0.999))
        if not off <= TOLERANCES[precision]:
            raise SystemExit(f"another picture than diffusers': off by {off:.3g} of 255")
        calls.append({"steps": steps, "seconds": seconds, "parts": [*parts, seconds - sum(parts)], "off": off})
    return {"calls": calls, "peak": peak_bytes()}


def table(measured: list[dict[str, Any]]) -> list[list[str]]:
    """Medians over rounds; the ratios are those within a round."""
    names, calls = list(CONTENDERS), dict[tuple[float, int, int, int], dict[str, Any]]()
    for each in measured:
        for call in each["calls"]:
            calls[each["guidance"], call["steps"], names.index(each["contender"]), each["round"]] = each | call
    lines = []
    for (guidance, steps, who), keys in itertools.groupby(sorted(calls), key=lambda key: key[:3]):
        turns = [(key[3], calls[key]) for key in keys]
        seconds, parts = (np.array([call[name] for _, call in turns]) for name in ("seconds", "parts"))
        theirs = [calls.get((guidance, steps, 0, turn), {"seconds": np.nan})["seconds"] for turn, _ in turns]
        times = np.median(seconds), np.nanmedian(theirs / seconds), np.median(parts[:, 1]) / steps
        shares = np.median(parts / seconds[:, None], axis=0)
        peak, off = (max(call[name] for _, call in turns) for name in ("peak", "off"))
        row = [names[who], f"{guidance:g}", str(steps), *(f"{each:.3g}" for each in times)]
        lines.append([*row, *(f"{each:.1%}" for each in shares), f"{peak / 1e9:.1f}", f"{off:.2g}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write, or to go on with")
    parser.add_argument("--side", type=int, default=256, help="pixels of the picture")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 7.5])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--model", type=Path, help="a folder of a Stable Diffusion pipeline, not random weights")
    parser.add_argument("--work", type=Path, default=Path("out/pipeline-latency"), help="for the forms of the pipeline")
    for hidden in ("--make", "--measure"):  # What this command's own processes do: a form, or a contender.
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    root = chosen.work / f"{chosen.model.name if chosen.model else 'random'}-{chosen.side}"
    if chosen.make is not None:
        part = root / f"{chosen.make}.part"
        shutil.rmtree(part, ignore_errors=True)
        FORMS[chosen.make](part, chosen.side, chosen.model)
        part.rename(root / chosen.make)
    elif chosen.measure is not None:
        print(json.dumps(measure(chosen.measure, root, chosen.side, chosen.guidance[0])))
    else:
        run(chosen, root)


def run(chosen: argparse.Namespace, root: Path) -> None:
    command = f"python -m skipstep.bench.pipeline_latency {' '.join(sys.argv[1:])}"
    before = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    case = [str(chosen.model), chosen.side, torch.get_num_threads(), environment()["commit"]]
    measured = [each for each in before["measured"] if each["calls"]] if before.get("case") == case else []
    own = [sys.executable, "-m", "skipstep.bench.pipeline_latency", "--work", chosen.work, "--side", str(chosen.side)]
    own += ["--model", chosen.model] if chosen.model else []
    for form in FORMS:
        if not (root / form).exists() and form in {"diffusers", *(CONTENDERS[name][1] for name in chosen.contenders)}:
            subprocess.run([*own, "--make", form], check=False)
    for turn, guidance, name in itertools.product(range(chosen.rounds), chosen.guidance, chosen.contenders):
        key = {"contender": name, "guidance": guidance, "round": turn}
        if not any(key.items() <= each.items() for each in measured):
            do = [*own, "--measure", name, "--guidance", str(guidance)]
            done = subprocess.run(do, check=False, capture_output=True, text=True)
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]
            made = {"calls": [], "reason": said} if done.returncode else json.loads(done.stdout.splitlines()[-1])
            measured.append(key | made)
            print(json.dumps(measured[-1]), flush=True)
        absent = sorted({f"{each['contender']}: {each['reason']}" for each in measured if not each["calls"]})
        note = (
            f"Batch 1, {chosen.side}x{chosen.side} pixels, {torch.get_num_threads()} threads, medians of {turn + 1} "
            f"rounds; shares of the call. Without a number: {'; '.join(absent) or 'none'}."
        )
        rows = table(measured)
        write_finding(chosen.out, command=command, header=HEADER, rows=rows, note=note, case=case, measured=measured)


if __name__ == "__main__":
    main()
