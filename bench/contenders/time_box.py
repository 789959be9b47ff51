"""A bound on how long something may take, for compilers that know none."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def time_box(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer. Outside the main thread it is told only at the block's end.

    A timer that is running already, as a test runner's, goes on with what is left of it.
    """
    message = f"{what} took longer than {seconds:g} s"

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(message)

    started = time.monotonic()
    interrupts = threading.current_thread() is threading.main_thread()
    if interrupts:
        handler = signal.signal(signal.SIGALRM, stop)
        running, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:  # A compiler wraps what it is interrupted with.
        if time.monotonic() - started >= seconds:
            raise TimeoutError(message) from error
        raise
    finally:
        if interrupts:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, handler)
            if running:
                left = max(running - (time.monotonic() - started), 1e-3)
                signal.setitimer(signal.ITIMER_REAL, left, interval)
    if time.monotonic() - started >= seconds:
        raise TimeoutError(message)
