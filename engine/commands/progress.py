"""Progress of long commands: lines on standard error, each with the seconds since the start."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def say_unsigned() -> None:
    """After a signed bundle was rewritten."""
    print(
        "skipstep: the manifest has changed, so its signature was removed: sign the bundle again (skipstep sign)",
        file=sys.stderr,
    )


def elapsed_progress() -> Callable[[str], None]:
    """A function that prints a message with the time since this call."""
    started = time.perf_counter()

    def report(message: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {message}", file=sys.stderr)

    return report
