"""The command line: `skipstep sample` draws pictures, `skipstep evaluate` measures the samplers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstep import __version__
from skipstep.errors import InputError, MissingDependencyError, SkipstepError

if TYPE_CHECKING:
    from PIL import Image

    from skipstep.engine import Engine
    from skipstep.plan import Plan

SHIPPED_MODEL = Path(__file__).parent / "demo" / "fashion-mnist"

_EXAMPLES = """\
examples:
  skipstep sample
      the shipped model (Fashion-MNIST clothes), 20 steps, ten samples
  skipstep sample --steps 10 20 50 --classes sneaker bag --num 8 --guidance 2
      the same eight samples with three step counts: what skipping steps costs
  skipstep sample --model ./my-ddpm --steps 50 --eta 1 --seeds 7 8 9
      your own checkpoint, a folder written by diffusers' save_pretrained, with DDPM-like noise

A sample is a function of its seed: --seeds 7 draws the same picture alone, in a batch, and tomorrow.
"""


_EVALUATE_NOTES = """\
needs Fashion-MNIST (apt-get install dataset-fashion-mnist) and skipstep[evaluate].

Time goes by --num: about 27 seconds a sample on two CPU cores, most of it for the rows of 1000 steps. Samples are kept
in OUT/cache as they are judged: interrupt and repeat the command to go on, or repeat it with a larger --num.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after a message on standard error."""
    parser = argparse.ArgumentParser(
        prog="skipstep", description="A compiled sampling engine for diffusion models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"skipstep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser(
        "sample",
        help="draw samples with one or several step counts",
        description="Draw the same samples with each step count; write a labelled grid and the single pictures.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_sample_options(sample)
    sample.set_defaults(run=sample_command)
    evaluate = commands.add_parser(
        "evaluate",
        help="measure quality, spread, inversion and time of every sampler",
        description="Measure the samplers on the shipped model and write tables (CSV, Markdown) and plots (PNG).",
        epilog=_EVALUATE_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_evaluate_options(evaluate)
    evaluate.set_defaults(run=evaluate_command)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except SkipstepError as error:
        print(f"skipstep: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("skipstep: interrupted", file=sys.stderr)
        return 130
    return 0


def _add_sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=SHIPPED_MODEL,
        help="diffusers folder with unet/ and scheduler/ (default: the shipped model)",
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[20], metavar="S", help="step counts, one grid row each (default: 20)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, nargs="+", metavar="N", help="one seed per sample")
    which.add_argument("--num", type=int, default=10, help="number of samples, seeds 0, 1, 2, … (default: 10)")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="C",
        help="class names or numbers, repeated over the samples (default: all in turn)",
    )
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance scale, 1 for none (default: 2 where the model can)"
    )
    parser.add_argument("--eta", type=float, default=0.0, help="0: deterministic DDIM … 1: DDPM's noise (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/sample"), help="folder for the pictures (default: out/sample)"
    )
    parser.add_argument("--backend", default="auto", help="auto, torch or onnxruntime (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def _add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=SHIPPED_MODEL, help="diffusers folder (default: the shipped model)"
    )
    parser.add_argument("--num", type=int, default=64, help="samples a case (default: 64)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/evaluation"), help="folder for all of it (default: out/evaluation)"
    )
    parser.add_argument("--backend", default="auto", help="auto, torch or onnxruntime (default: auto)")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four IDX files")


def evaluate_command(options: argparse.Namespace) -> None:
    try:
        from skipstep.bench.evaluation import Evaluation
        from skipstep.bench.evaluation_report import evaluate
    except ImportError as error:
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="torch, diffusers, torchmetrics and matplotlib",
            remedy="pip install 'skipstep[cpu,torch,export,diffusers,evaluate]'",
        ) from error
    data = {} if options.data is None else {"data": options.data}
    evaluation = Evaluation(options.model, options.out, num_samples=options.num, backend=options.backend, **data)
    command = f"skipstep evaluate --num {options.num}"
    print(f"wrote {evaluate(evaluation, options.out, command=command)}")


def sample_command(options: argparse.Namespace) -> None:
    from skipstep.engine import Engine
    from skipstep.grid import labelled_grid

    seeds = options.seeds if options.seeds is not None else list(range(options.num))
    if not seeds:
        raise InputError(got=f"--num {options.num}", expected="at least one sample", remedy="pass --num 1 or more")
    started = time.perf_counter()
    engine = Engine.build(
        options.model,
        plans=[],
        batch_sizes=sorted({1, min(len(seeds), 16)}),
        backend=options.backend,
        device=options.device,
        compile_on_miss=True,
    )
    plans = [engine.add_plan(steps, eta=options.eta) for steps in options.steps]
    print(f"compiled {options.model.name} for {engine.backend} in {time.perf_counter() - started:.1f} s")

    labels = resolve_classes(engine, options.classes, len(seeds))
    names = (
        [_class_name(engine, label) for label in labels] if labels is not None else [f"seed {seed}" for seed in seeds]
    )
    guidance = options.guidance
    if guidance is None and engine.network.null_label is not None:
        guidance = 2.0
    rows, table = [], []
    for plan in plans:
        started = time.perf_counter()
        pictures = draw(engine, plan, seeds=seeds, class_labels=labels, guidance_scale=guidance)
        milliseconds = (time.perf_counter() - started) * 1e3 / len(seeds)
        folder = options.out / f"{plan.num_evaluations:04d}-steps"
        folder.mkdir(parents=True, exist_ok=True)
        for index, (picture, seed, name) in enumerate(zip(pictures, seeds, names, strict=True)):
            suffix = "" if labels is None else "-" + _file_name(name)
            picture.save(folder / f"{index:04d}-seed{seed}{suffix}.png")
        rows.append(pictures)
        table.append((str(plan.steps), f"{milliseconds:.1f}", f"{engine.backend} on {engine.device}", plan.key))
    grid = labelled_grid(rows, row_labels=[f"{plan.steps} steps" for plan in plans], column_labels=names)
    grid.save(options.out / "grid.png")
    print(format_table(("steps", "ms per image", "backend", "plan key"), table))
    print(f"wrote {options.out / 'grid.png'} and {len(plans) * len(seeds)} single pictures beside it")


def draw(engine: Engine, plan: Plan, **arguments: Any) -> list[Image.Image]:
    """`Engine.sample` to pictures, with a progress bar if it takes longer than two seconds."""
    from tqdm import tqdm

    with tqdm(desc=f"{plan.steps} steps", unit="eval", delay=2.0, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        pictures: list[Image.Image] = engine.sample(plan=plan, output_type="pil", progress=progress, **arguments)
    return pictures


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
    return "".join(c if c.isalnum() or c == "-" else "_" for c in name)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(len(row[c]) for row in (header, *rows)) for c in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(w) if cell[:1].isdigit() and c < 2 else cell.ljust(w)
            for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
