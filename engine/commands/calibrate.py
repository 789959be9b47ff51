"""skipstep calibrate: measure a bundle's plans on this machine and store the latencies in it, for `deadline_ms=`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from skipstep.commands.progress import elapsed_progress, say_unsigned

DESCRIPTION = """\
Time whole calls of every plan and batch size on this machine, and add the latencies to the bundle. An engine that is
loaded from it here then answers sample(deadline_ms=…) with the largest step count whose p99 fits."""
EPILOG = """\
examples:
  skipstep calibrate my-bundle
      every plan at the bundle's batch sizes: 100 calls each in about two minutes, fewer of slow plans, at least three
  skipstep calibrate my-bundle --steps 10 20 --batch 1 4 --repeats 1000 --seconds 600
      a p99 from a thousand calls
  skipstep calibrate my-bundle --dry-run
      print the table and leave the bundle as it is

Run nothing else on the machine meanwhile, or exactly what will run beside sampling later. Latencies count on machines
with the same processor, cores and threads, and the same versions of skipstep and of the runtime; a bundle stores one
set for each such machine. Every file is verified on its way into the new bundle. A signature is removed, because the
manifest changes: sign the bundle again afterwards.
"""

_SECONDS_BETWEEN_REPORTS = 5.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="its folder")
    parser.add_argument("--steps", type=int, nargs="+", metavar="S", help="plans, by step count (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="batch sizes (default: the bundle's)")
    parser.add_argument("--repeats", type=int, default=100, metavar="N", help="calls of each (default: 100)")
    parser.add_argument("--seconds", type=float, default=120.0, help="about how long to measure (default: 120)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the runtime (default: one a core)")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, and change nothing")
    parser.add_argument(
        "--require-signature", type=Path, metavar="KEY", help="the public key that must have signed the bundle"
    )


def run(options: argparse.Namespace) -> None:
    from skipstep import load
    from skipstep.bundles.bundle import open_bundle
    from skipstep.export.bundle_rewriter import add_calibration
    from skipstep.latency.calibration import describe_latencies
    from skipstep.latency.measure import calibrate

    bundle = open_bundle(options.bundle, require_signature=options.require_signature)
    engine = load(options.bundle, num_threads=options.threads, require_signature=options.require_signature)
    calibration = calibrate(
        engine,
        engine.identity(),
        repeats=options.repeats,
        max_seconds=options.seconds,
        plans=options.steps,
        batch_sizes=options.batch,
        progress=_progress(),
    )
    if not options.dry_run:
        calibration = add_calibration(
            options.bundle,
            calibration,
            digest=bundle.manifest.digest,
            require_signature=options.require_signature,
        )
    print("\n".join(describe_latencies(calibration, engine.plans)))
    if options.dry_run:
        return
    print(f"stored in {options.bundle}")
    if bundle.signed:
        say_unsigned()


def _progress() -> Callable[[int, int], None]:
    report = elapsed_progress()
    report("warm-up, two calls of each")
    last = time.perf_counter()

    def count(done: int, total: int) -> None:
        nonlocal last
        if done == total or (sys.stderr.isatty() and time.perf_counter() - last >= _SECONDS_BETWEEN_REPORTS):
            last = time.perf_counter()
            report(f"{done} of {total} calls")

    return count
