"""skipstep calibrate: how long a bundle's plans take on this machine, kept in the bundle for `deadline_ms=`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

DESCRIPTION = """\
Time whole calls of every plan and batch size on this machine, and add the latencies to the bundle. An engine that is
loaded from it here then answers sample(deadline_ms=…) with the most steps whose p99 fits."""
EPILOG = """\
examples:
  skipstep calibrate my-bundle
      every plan at the bundle's batch sizes: 100 calls each, or fewer of the slow ones in about two minutes,
      but three at least
  skipstep calibrate my-bundle --steps 10 20 --batch 1 4 --repeats 1000 --seconds 600
      a p99 that a thousand calls stand behind
  skipstep calibrate my-bundle --dry-run
      print the table and leave the bundle as it is

Let the machine do nothing else meanwhile, or what it will do beside sampling in earnest. Latencies count on a machine
with the same processor, cores and threads, and with the same versions of skipstep and of the runtime; a bundle keeps
one set for each that it was measured on. Every file of the bundle is verified on its way into the new one. A signature
is of the manifest as it was: sign the bundle again afterwards.
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
    from skipstep.bundles.bundle import open_bundle
    from skipstep.export.bundle_rewriter import add_calibration
    from skipstep.latency.calibration import describe_latencies
    from skipstep.latency.measure import calibrate
    from skipstep.loading import load, loaded_identity

    bundle = open_bundle(options.bundle, require_signature=options.require_signature)
    engine = load(options.bundle, num_threads=options.threads, require_signature=options.require_signature)
    calibration = calibrate(
        engine,
        loaded_identity(num_threads=options.threads),
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
    print(f"kept in {options.bundle}")
    if bundle.signed:
        print(
            "skipstep: the manifest has changed, so its signature was left out: sign the bundle again (skipstep sign)",
            file=sys.stderr,
        )


def _progress() -> Callable[[int, int], None]:
    started = said = time.perf_counter()
    print("[   0.0 s] warm-up, two calls of each", file=sys.stderr)

    def report(done: int, total: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if now - said >= _SECONDS_BETWEEN_REPORTS or done == total:
            said = now
            print(f"[{now - started:6.1f} s] {done} of {total} calls", file=sys.stderr)

    return report
