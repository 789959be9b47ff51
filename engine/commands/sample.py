"""skipstep sample: draw samples with one or several step counts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstep.commands.models import MODEL_FORMS, add_model_options, model_options, plan_options
from skipstep.commands.progress import elapsed_progress
from skipstep.demo import PICTOGRAMS, PICTOGRAMS_GUIDANCE, SHIPPED_BUNDLE, SHIPPED_BUNDLES, checked_model
from skipstep.errors import InputError
from skipstep.latency.table import format_table
from skipstep.storage.atomic import check_writable, storage_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from skipstep.engine import Engine
    from skipstep.plans.plan import Plan

_SECONDS_WITHOUT_BAR = 2.0
_LONGEST_NAME = 40

DESCRIPTION = "Draw the same samples with each step count; write a labelled grid and the single pictures."
EPILOG = """\
examples:
  skipstep sample
      the shipped model (Fashion-MNIST clothes), 20 steps, ten samples
  skipstep sample --prompt "red apple" "blue heart" --steps 6 20
      the pictograms' model (in a checkout of the repository), which draws them from their names
  skipstep sample --steps 10 20 50 --classes sneaker bag --num 8 --guidance 2
      the same eight samples with three step counts: what skipping steps costs
  skipstep sample --model ./my-bundle --steps 20
      a bundle that skipstep export wrote, without torch
  skipstep sample --model ./my-ddpm --steps 50 --eta 1 --seeds 7 8 9
      your own checkpoint, a folder written by diffusers' save_pretrained, with DDPM-like noise
  skipstep sample --model ./my-sd-bundle --prompt "a cat" "a dog" --steps 20
      a latent pipeline, prompts in and pictures out, without torch
  skipstep sample --model unet.onnx --inputs sample=noisy timestep=sigma --scheduler scheduler_config.json
      an existing .onnx file; what is left out of --inputs is found by name or shape

A sample is a function of its seed: --seeds 7 draws the same picture alone, in a batch, and tomorrow.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        help=f"a bundle, {MODEL_FORMS} (default: the shipped clothes; with --prompt the pictograms)",
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[20], metavar="S", help="step counts, one grid row each (default: 20)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, nargs="+", metavar="N", help="one seed per sample")
    which.add_argument("--num", type=int, help="number of samples, seeds 0, 1, 2, … (default: 10, or one per prompt)")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="C",
        help="class names or numbers, repeated over the samples (default: all in turn)",
    )
    parser.add_argument("--prompt", nargs="+", metavar="P", help="prompts of a pipeline, repeated over the samples")
    parser.add_argument("--negative-prompt", metavar="P", help="what guidance leads away from (default: nothing)")
    parser.add_argument(
        "--prompt-syntax", choices=("plain", "a1111"), help="a1111: weights in brackets, (cat:1.3) (default: plain)"
    )
    parser.add_argument(
        "--control-image", type=Path, nargs="+", metavar="FILE", help="what each ControlNet of the model reads"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        help="classifier-free guidance scale, 1 for none (default: 2 where the model can, 7.5 with prompts; 3 for "
        "the pictograms)",
    )
    parser.add_argument("--eta", type=float, default=0.0, help="0: deterministic DDIM … 1: DDPM's noise (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/sample"),
        help="folder for the pictures, or FILE.npz for the numbers (default: out/sample)",
    )
    parser.add_argument(
        "--backend", default="auto", help="auto, torch, onnxruntime, openvino or webgpu (default: auto)"
    )
    parser.add_argument(
        "--precision",
        default="auto",
        help="of the network: auto, float32, tf32, float16 or bfloat16 (default: auto, which is float32)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_model_options(parser)


def run(options: argparse.Namespace) -> None:
    from skipstep.bundles.bundle import is_bundle

    if options.model is None:
        options.model = SHIPPED_BUNDLE if options.prompt is None else checked_model(PICTOGRAMS)
    number = len(options.prompt or range(10)) if options.num is None else options.num
    seeds = options.seeds if options.seeds is not None else list(range(number))
    if not seeds:
        raise InputError(got=f"--num {number}", expected="at least one sample", remedy="pass --num 1 or more")
    as_arrays = options.out.suffix == ".npz"
    check_writable(options.out.parent if as_arrays else options.out)
    started = time.perf_counter()
    engine = open_engine(options, batch_sizes=sorted({1, min(len(seeds), 16)}))
    if not as_arrays:
        _check_pictures(engine, options.out)
    plans = [_plan_of(engine, steps, options.eta) for steps in options.steps]
    made = "loaded" if is_bundle(options.model) else "compiled"
    print(f"{made} {options.model.name} for {engine.backend} in {time.perf_counter() - started:.2f} s")

    labels = resolve_classes(engine, options.classes, len(seeds))
    names = (
        [_class_name(engine, label) for label in labels] if labels is not None else [f"seed {seed}" for seed in seeds]
    )
    guidance = options.guidance
    if guidance is None and engine.network.null_label is not None:
        guidance = 2.0
    prompts = None if options.prompt is None else [options.prompt[i % len(options.prompt)] for i in range(len(seeds))]
    if prompts is not None:
        names = prompts
        if guidance is None and engine.network.can_guide:
            guidance = PICTOGRAMS_GUIDANCE if options.model == PICTOGRAMS else 7.5
    asked = {"prompt": prompts, "negative_prompt": options.negative_prompt, "prompt_syntax": options.prompt_syntax}
    if options.control_image is not None:
        pictures = [_read_picture(file) for file in options.control_image]
        asked["control_image"] = pictures if len(pictures) > 1 else pictures[0]
    drawn: dict[Plan, NDArray[np.float32]] = {}
    table = []
    for plan in plans:
        started = time.perf_counter()
        drawn[plan] = draw(engine, plan, seeds=seeds, class_labels=labels, guidance_scale=guidance, **asked)
        milliseconds = (time.perf_counter() - started) * 1e3 / len(seeds)
        table.append((str(plan.steps), f"{milliseconds:.1f}", f"{engine.backend} on {engine.device}", plan.key))
    with storage_errors(options.out):
        if as_arrays:
            written = _write_arrays(options.out, drawn, seeds)
        else:
            written = _write_pictures(options.out, drawn, seeds, names, labels is not None or prompts is not None)
    print(format_table(("steps", "ms per image", "backend", "plan key"), table))
    print(written)


def _read_picture(file: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(
            got=f"--control-image {file}, which cannot be read ({error})",
            expected="a picture, such as a PNG file",
            remedy="check the path, or convert the file",
        ) from error


def _write_arrays(file: Path, drawn: Mapping[Plan, NDArray[np.float32]], seeds: Sequence[int]) -> str:
    import numpy as np

    arrays: dict[str, NDArray[Any]] = {f"steps_{plan.num_evaluations}": samples for plan, samples in drawn.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays, seeds=np.array(seeds, np.uint64))  # type: ignore[arg-type]
    return f"wrote {file} with {', '.join(arrays)} and seeds"


def _write_pictures(
    folder: Path, drawn: Mapping[Plan, NDArray[np.float32]], seeds: Sequence[int], names: Sequence[str], named: bool
) -> str:
    from skipstep.calls.images import labelled_grid, to_pil

    rows = []
    for plan, samples in drawn.items():
        rows.append(to_pil(samples))
        single = folder / f"{plan.num_evaluations:04d}-steps"
        single.mkdir(parents=True, exist_ok=True)
        for index, (picture, seed, name) in enumerate(zip(rows[-1], seeds, names, strict=True)):
            suffix = "-" + _file_name(name) if named else ""
            picture.save(single / f"{index:04d}-seed{seed}{suffix}.png")
    grid = labelled_grid(rows, row_labels=[_row_label(plan) for plan in drawn], column_labels=names)
    grid.save(folder / "grid.png")
    return f"wrote {folder / 'grid.png'} and {len(drawn) * len(seeds)} single pictures beside it"


def _plan_of(engine: Engine, steps: int, eta: float) -> Plan:
    """The plan that the model holds for so many steps, which may be a fitted one, or a new one."""
    held = [plan for plan in engine.plans.values() if plan.steps == steps and plan.eta == eta]
    return held[0] if len(held) == 1 else engine.add_plan(steps, eta=eta)


def _row_label(plan: Plan) -> str:
    return f"{plan.steps} steps" + (", fitted" if plan.solver == "fitted" else "")


def open_engine(options: argparse.Namespace, *, batch_sizes: Sequence[int]) -> Engine:
    """The engine of `options.model`: loaded from a bundle, or compiled from a diffusers folder."""
    from skipstep import load
    from skipstep.bundles.bundle import is_bundle
    from skipstep.calls.plan_set import make_plan
    from skipstep.engine import Engine

    said = model_options(options)
    if not is_bundle(options.model):
        defaults = plan_options(options)
        return Engine.build(
            options.model,
            plans=[make_plan(steps, defaults, eta=options.eta) for steps in options.steps],
            batch_sizes=batch_sizes,
            backend=options.backend,
            device=options.device,
            precision=options.precision,
            compile_on_miss=True,
            progress=elapsed_progress(),
            **said,
        )
    if said:
        raise InputError(
            got=f"{', '.join('--' + name.replace('_', '-') for name in said)} for a bundle",
            expected="a model that is compiled here; a bundle says everything of itself",
            remedy="leave them out",
        )
    if options.backend == "torch" or options.device not in ("auto", "cpu"):
        raise InputError(
            got=f"--backend {options.backend} --device {options.device} for a bundle",
            expected="onnxruntime, openvino or webgpu with --device cpu, which run bundles",
            remedy="leave both out, or pass the diffusers folder that the bundle was made from",
        )
    # Package managers install by hard links, and what came with this package is this package's.
    return load(
        options.model,
        backend=options.backend,
        precision=options.precision,
        allow_hard_links=options.model in SHIPPED_BUNDLES,
        compile_on_miss=True,
    )


def _check_pictures(engine: Engine, out: Path) -> None:
    shape = engine.network.sample_shape
    if engine.runner.pipeline is not None:
        shape = (engine.runner.pipeline.channels, *shape[1:])
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InputError(
            got=f"samples of {'×'.join(map(str, shape))}, which are no pictures",
            expected="1 (grey) or 3 (RGB) channels by height by width, for PNG files",
            remedy=f"pass --out {out.with_suffix('.npz')} for the numbers",
        )


def draw(engine: Engine, plan: Plan, **arguments: Any) -> NDArray[np.float32]:
    """`Engine.sample`, with a progress bar if it takes longer than two seconds."""
    started, bars = time.perf_counter(), list[Any]()

    def progress(done: int, total: int) -> None:
        if not bars and time.perf_counter() - started > _SECONDS_WITHOUT_BAR:
            from tqdm import tqdm  # An import that a process which draws at once can do without.

            bars.append(tqdm(desc=f"{plan.steps} steps", unit="eval", total=total, leave=False, disable=None))
        for bar in bars:
            bar.update(done - bar.n)

    try:
        drawn: NDArray[np.float32] = engine.sample(plan=plan, progress=progress, **arguments)
    finally:
        for bar in bars:
            bar.close()
    return drawn


def resolve_classes(engine: Engine, classes: Sequence[str] | None, num_samples: int) -> list[int] | None:
    """Labels for `num_samples` from class names or numbers, repeated in turn; all classes where none are named."""
    network = engine.network
    if network.num_classes is None:
        if classes is not None:
            raise InputError(
                got=f"--classes {' '.join(classes)} for an unconditional model",
                expected="no classes",
                remedy="leave --classes out",
            )
        return None
    known = {name: label for label, name in enumerate(network.class_names or ())}
    labels = list(range(network.num_classes))
    if classes is not None:
        try:
            labels = [known[name] if name in known else int(name) for name in classes]
        except ValueError as error:
            raise InputError(
                got=f"--classes {' '.join(classes)}",
                expected=f"numbers below {network.num_classes}" + (f", or {', '.join(known)}" if known else ""),
                remedy="pick from these",
            ) from error
    return [labels[i % len(labels)] for i in range(num_samples)]


def _class_name(engine: Engine, label: int) -> str:
    names = engine.network.class_names
    return names[label] if names and 0 <= label < len(names) else f"class {label}"


def _file_name(name: str) -> str:
    """A class name comes from a downloaded file: nothing of it but letters, digits and dashes reaches a path."""
    return "".join(c if c.isalnum() or c == "-" else "_" for c in name[:_LONGEST_NAME])
