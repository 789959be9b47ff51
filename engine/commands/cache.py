"""skipstep cache: list or clear the cache of exported networks and engines."""

from __future__ import annotations

import argparse
import time

from skipstep.bundles.cache import ArtefactCache
from skipstep.latency.table import format_table

DESCRIPTION = "List the cache of exported networks and engines, or clear it."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove everything")
    parser.add_argument("--remove", metavar="KEY", help="remove one entry")


def run(options: argparse.Namespace) -> None:
    cache = ArtefactCache()
    if options.clear or options.remove:
        print(f"removed {cache.clear(options.remove)} entries from {cache.folder}")
        return
    entries = cache.entries()
    rows = [
        (
            entry.key[:16],
            f"{entry.bytes / 1e6:.1f}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used)),
            entry.description,
        )
        for entry in entries
    ]
    print(f"{cache.folder}: {len(entries)} entries, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB")
    if rows:
        print(format_table(("key", "MB", "last used", "what"), rows))
