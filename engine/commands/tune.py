"""skipstep tune: fit plans of few steps to a bundle's network, and store those that are better in it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skipstep.commands.progress import say_unsigned
from skipstep.errors import needs_packages
from skipstep.storage.atomic import atomic_write, check_writable

if TYPE_CHECKING:
    from skipstep import Engine, Plan

DESCRIPTION = """\
Fit timesteps and weights to many-step trajectories of a bundle's network, for each number of steps; draw with them for
noises that the fit did not see, beside DDIM, DPM-Solver++ 2M and UniPC-2, and add the fitted plans that are better."""
EPILOG = """\
examples:
  skipstep tune my-bundle --guidance 2
      plans of 4, 6 and 8 steps; minutes on a CPU for a small network
  skipstep tune my-bundle --guidance 1 2 4
      plans for this whole range of guidance scales
  skipstep tune my-sd-bundle --guidance 7.5 --prompt "a cat" "a dog on a beach" "an old house"
      plans of a pipeline, for prompts like these: the more and the more different, the better
  skipstep tune my-bundle --steps 5 10 --noises 128 --dry-run
      print the comparison and leave the bundle as it is
  skipstep tune my-bundle --features inception.onnx --held-out 4096
      offer only what is no further from the converged images in the features of this network
  skipstep tune my-bundle --report out/tuned
      and time all plans here, and show quality against milliseconds

The same command finds the same plans; one that was interrupted goes on where it was. A fitted plan is used like any
other: sample(steps=6). It is for guidance scales near the one that it was fitted at. The bundle's other plans are
measured beside the fitted ones, and their quality is stored: sample(deadline_ms=...) then takes the best that fits.
Every file is verified on its way into the new bundle. A signature is removed, because the manifest changes: sign the
bundle again afterwards.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="its folder")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[4, 6, 8], metavar="S", help="numbers of steps (default: 4 6 8)"
    )
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0], metavar="G", help="guidance scales (default: 1, none)"
    )
    parser.add_argument("--prompt", nargs="+", metavar="P", help="of a pipeline, in turn for the noises of both kinds")
    parser.add_argument("--noises", type=int, default=64, metavar="N", help="trajectories to fit to (default: 64)")
    parser.add_argument("--held-out", type=int, default=64, metavar="N", help="others to compare on (default: 64)")
    parser.add_argument("--nodes", type=int, default=56, metavar="J", help="timesteps of a trajectory (default: 56)")
    parser.add_argument("--rounds", type=int, default=2, help="of moving each timestep (default: 2)")
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="ONNX network of features [N, F], F below --held-out, and perhaps logits: also compare distributions",
    )
    parser.add_argument("--dry-run", action="store_true", help="compare and print, and change nothing")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="also time the plans at batch 1; write pareto.txt and pareto.png"
    )
    parser.add_argument(
        "--require-signature", type=Path, metavar="KEY", help="the public key that must have signed the bundle"
    )


def run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from skipstep import load
    from skipstep.bundles.bundle import open_bundle
    from skipstep.bundles.kept import CacheSlot
    from skipstep.export.bundle_rewriter import add_plans
    from skipstep.fitting.judge import OnnxJudge

    if options.report is not None:
        check_writable(options.report)
    judge = None if options.features is None else OnnxJudge(options.features)
    bundle = open_bundle(options.bundle, require_signature=options.require_signature)
    with (
        load(options.bundle, require_signature=options.require_signature) as engine,
        tqdm(desc="tune", disable=None, leave=False) as bar,
    ):

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = engine.tune(
            steps=options.steps,
            guidance_scale=options.guidance,
            noises=options.noises,
            held_out=options.held_out,
            nodes=options.nodes,
            rounds=options.rounds,
            features=judge,
            progress=progress,
            keep=CacheSlot,
            **({} if options.prompt is None else {"prompt": options.prompt}),
        )
        print(report)
        better = [each.plan for each in report.found if each.offered]
        if options.report is not None:
            _write_report(engine, [*report.held, *better], options.report)
    if not better:
        print("no fitted plan is better")
    if options.dry_run:
        print("nothing was stored")
        return
    added = add_plans(
        options.bundle,
        [*better, *report.held],
        digest=bundle.manifest.digest,
        require_signature=options.require_signature,
    )
    print(f"stored {len(added)} plans in {options.bundle}, and the quality of {len(report.held)} that it held")
    if bundle.signed:
        say_unsigned()


def _write_report(engine: Engine, plans: Sequence[Plan], folder: Path) -> None:
    """Quality against milliseconds, printed and drawn."""
    for plan in plans:
        engine.add_plan(plan)
    engine.calibrate(batch_sizes=[1], repeats=50, max_seconds=60.0)
    table = engine.pareto(guided=engine.network.can_guide)
    print(table)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "pareto.txt", f"{table}\n".encode())
    with needs_packages("it, for the plot", remedy="pip install 'skipstep[bench]'"):
        from skipstep.bench.page.plots import pareto_plot, to_png
    atomic_write(folder / "pareto.png", to_png(pareto_plot(table)))
    print(f"wrote {folder / 'pareto.txt'} and {folder / 'pareto.png'}")
