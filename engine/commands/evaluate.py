"""skipstep evaluate: measure the quality of every sampler on a network, with intervals."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from skipstep.demo import SHIPPED_BUNDLE, checked_model
from skipstep.errors import InputError, MissingDependencyError, check_choice
from skipstep.storage.atomic import check_writable

DESCRIPTION = "Measure samplers on a network and write tables, plots and pictures (Markdown, PNG)."
EPILOG = """\
examples:
  skipstep evaluate
      the shipped bundle, with its classifier, beside Fashion-MNIST (apt-get install dataset-fashion-mnist)
  skipstep evaluate --model my-ddpm --features inception.onnx --reference my-pictures --num 5000
      any model, in the features of an ONNX network: float32 [N, C, H, W] in [-1, 1] to features [N, F], and to logits
      where it knows the model's classes

It needs skipstep[evaluate], and takes hours for a thousand samples or more on a CPU. What was measured is kept in OUT:
interrupt and repeat the command to go on.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=SHIPPED_BUNDLE, help="bundle or diffusers folder (default: the shipped bundle)"
    )
    parser.add_argument("--features", type=Path, metavar="FILE", help="ONNX network (default: the shipped classifier)")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="PATH",
        help="folder of pictures, or .npy (default: Fashion-MNIST's test split)",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompt embeddings [M, L, D] in a .npy file")
    parser.add_argument("--num", type=int, default=2000, help="samples a case (default: 2000)")
    parser.add_argument(
        "--num-long", type=int, default=500, help="samples of plans of more than 100 evaluations (default: 500)"
    )
    parser.add_argument(
        "--nodes", type=int, default=56, metavar="J", help="timesteps of the converged trajectories (default: 56)"
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        metavar="NAME",
        help="what to measure: fitted-plans, steps, spacings, solvers, spread, inversion, pictures (default: all)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/evaluation"), help="folder for all of it (default: out/evaluation)"
    )
    parser.add_argument("--backend", default="auto", help="of a folder: auto, torch or onnxruntime (default: auto)")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four IDX files")


def run(options: argparse.Namespace) -> None:
    try:
        from skipstep.bench.quality.data import DEFAULT_FOLDER, load_fashion_mnist
        from skipstep.bench.quality.evaluation import TABLES, Evaluation, Grid
        from skipstep.bench.quality.evaluation_report import evaluate
        from skipstep.bench.quality.judge import ShippedJudge, read_images
        from skipstep.fitting.judge import OnnxJudge
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("skipstep.bench"):
            raise MissingDependencyError(
                got="an installation without skipstep.bench.quality",
                expected="the evaluation, which is in skipstep's repository and not in its wheel",
                remedy="clone the repository, and run pip install -e '.[cpu,torch,export,diffusers,evaluate]' there",
            ) from error
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="torch, torchmetrics and matplotlib",
            remedy="pip install 'skipstep[cpu,torch,export,diffusers,evaluate]'",
        ) from error
    tables = options.tables or TABLES
    for name in tables:
        check_choice("--tables", name, TABLES, remedy="leave it out for all of them")
    check_writable(options.out)
    engine = _engine(options.model, options.backend)
    shape = engine.network.sample_shape
    if (options.features is None or options.reference is None) and shape != (1, 28, 28):
        raise InputError(
            got=f"a network of samples {list(shape)} without --features and --reference",
            expected="both: the shipped classifier and images are of Fashion-MNIST, [1, 28, 28]",
            remedy="pass --features FILE.onnx and --reference FOLDER",
        )
    judge = ShippedJudge() if options.features is None else OnnxJudge(options.features)
    if options.reference is None:
        reference = load_fashion_mnist("test", options.data or DEFAULT_FOLDER)[0]
    else:
        reference = read_images(options.reference, shape)
    prompts = None if options.prompts is None else _prompts(options.prompts)
    evaluation = Evaluation(
        engine,
        judge,
        reference,
        options.out,
        num=options.num,
        num_long=options.num_long,
        grid=Grid(tables=tuple(tables)),
        prompts=prompts,
        nodes=options.nodes,
    )
    print(f"wrote {evaluate(evaluation, command=_command(options))}")


def _command(options: argparse.Namespace) -> str:
    """The command that made the page: what was asked for, but where it was written and where data lie."""
    given = {"model": options.model if options.model != SHIPPED_BUNDLE else None}
    given |= {name: getattr(options, name) for name in ("features", "reference", "prompts")}
    given |= {"num": options.num, "num-long": options.num_long}
    said = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    if options.nodes != 56:
        said += ["--nodes", str(options.nodes)]
    if options.tables is not None:
        said += ["--tables", *options.tables]
    return shlex.join(["skipstep", "evaluate", *said])


def _engine(model: Path, backend: str) -> Any:
    from skipstep import Engine, load

    if (model / "manifest.json").exists():
        return load(model, compile_on_miss=True, allow_hard_links=model == SHIPPED_BUNDLE)
    return Engine.build(checked_model(model), plans=[], batch_sizes=[20], backend=backend, compile_on_miss=True)


def _prompts(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            got=f"{path} ({error})", expected="prompt embeddings [M, L, D]", remedy="write them with numpy.save"
        ) from error
