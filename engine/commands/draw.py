"""skipstep draw: draw very many samples into shards, here or on a Ray cluster, and go on where it was."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from skipstep.demo import SHIPPED_BUNDLE

DESCRIPTION = "Draw many samples into numbered files, each whole or absent. The same command again goes on."
EPILOG = """\
examples:
  skipstep draw --num 50000 --out shards/ --workers 2
      two processes of this machine, with half of its cores each
  skipstep draw --num 50000 --out /shared/shards --model /shared/my.bundle --ray auto --workers 32
      32 workers of the Ray cluster that runs, whose machines share a folder

A sample is its seed: the files do not depend on who draws them, and one that was not finished is drawn again.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=SHIPPED_BUNDLE, help="a bundle (default: the shipped one)")
    parser.add_argument("--num", type=int, required=True, help="how many samples")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="seeds N, N + 1, … (default: 0)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--steps", type=int, default=20, metavar="S", help="the plan of so many steps (default: 20)")
    which.add_argument("--plan", metavar="KEY", help="a plan of the bundle, as skipstep inspect names it")
    parser.add_argument("--classes", nargs="+", metavar="C", help="as for skipstep sample (default: all in turn)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none (default: none)")
    parser.add_argument("--format", default="parquet", help="parquet (with pyarrow), or tar for WebDataset")
    parser.add_argument("--shard-size", type=int, default=500, metavar="N", help="samples of a file (default: 500)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes, or workers of Ray (default: 1)")
    parser.add_argument("--ray", metavar="ADDRESS", help="auto, or the address of a Ray cluster (default: without Ray)")
    parser.add_argument("--device", default="cpu", help="of each worker: cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each worker (default: its share of the cores)")
    parser.add_argument("--require-signature", type=Path, metavar="KEY", help="the public key of the bundle's signer")


def run(options: argparse.Namespace) -> None:
    from skipstep.commands.progress import elapsed_progress
    from skipstep.commands.sample import resolve_classes
    from skipstep.errors import check_integer
    from skipstep.loading import LoadOptions
    from skipstep.serving.requests import call_arguments
    from skipstep.serving.shards import Drawing, ShardWriter, draw_shards, verified_engine

    workers = check_integer("workers", options.workers, low=1, high=1 << 16)
    threads = options.threads or (None if workers == 1 and not options.ray else 1 if options.ray else _share(workers))
    load = LoadOptions(device=options.device, num_threads=threads, allow_hard_links=options.model == SHIPPED_BUNDLE)
    if options.require_signature is not None:
        load["require_signature"] = str(options.require_signature.absolute())
    with verified_engine(str(options.model), None, compile_on_miss=True, **{**load, "device": "cpu"}) as engine:
        which = {"steps": options.steps} if options.plan is None else {"plan": options.plan}
        plan = call_arguments(engine, {"seeds": 0, **which})["plan"]
        labels = resolve_classes(engine, options.classes, engine.network.num_classes or 0)
        network = engine.plans.network_digest
    drawing = Drawing(
        network=network,
        plan=plan.key,
        steps=plan.steps,
        num=options.num,
        first_seed=options.first_seed,
        shard_size=options.shard_size,
        labels=None if labels is None else tuple(labels),
        guidance_scale=options.guidance,
        format=options.format,
    )
    writer = ShardWriter(str(options.model.absolute()), str(options.out.absolute()), drawing, load)
    missing, report, started, drawn = drawing.missing(options.out), elapsed_progress(), time.perf_counter(), 0
    print(f"{len(drawing) - len(missing)} of {len(drawing)} files are there")
    if not missing:
        return
    if options.ray:
        from skipstep.serving.ray import draw_with_ray

        done = draw_with_ray(writer, missing, address=options.ray, num=workers)
    else:
        done = draw_shards(writer, missing, workers=workers)
    for count, each in enumerate(done, 1):
        drawn += each["samples"]
        rate = drawn / (time.perf_counter() - started)
        report(f"{count} of {len(missing)} files, {rate:.1f} samples a second, {each['shard']:05d} by {each['pid']}")
    print(f"wrote {len(missing)} files to {options.out}")


def _share(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)
