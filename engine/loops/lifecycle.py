"""Whether an engine may still be used: after `close`, in a forked child and with a lost CUDA context it may not.

A child of fork has the parent's memory but not its threads, and a CUDA context does not survive the fork: ONNX Runtime
would wait forever, and CUDA would fail later. So the first use raises an error that says what happened.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from skipstep.errors import EngineStateError


class Lifecycle:
    """`check` before every use; everything that serves one engine shares it. Calls run side by side, a change of the
    network `alone`."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._ended: str | None = None
        self._remedy = ""
        self._changed = threading.Condition()
        self._callers: list[int] = []

    def check(self) -> None:
        """Raise EngineStateError unless the engine may be used here and now."""
        if self._ended is not None:
            raise EngineStateError(got=self._ended, expected="an engine in use", remedy=self._remedy)
        if os.getpid() != self._process:
            raise EngineStateError(
                got=f"an engine of process {self._process} in its forked child {os.getpid()}",
                expected="the process that made it: threads and CUDA contexts do not survive a fork",
                remedy="build or load the engine in the child, or start it with multiprocessing's 'spawn' method",
            )

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around what reads the network. Raises EngineStateError, as `check`."""
        self.check()
        caller = threading.get_ident()
        with self._changed:
            self._callers.append(caller)
        try:
            yield
        finally:
            with self._changed:
                self._callers.remove(caller)
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits for the calls under way, and holds up later ones. Raises EngineStateError inside of a call."""
        with self._changed:
            if threading.get_ident() in self._callers:
                raise EngineStateError(
                    got="a change of the network from a callback of a call that runs it",
                    expected="one between calls",
                    remedy="let the call return first",
                )
            self._changed.wait_for(lambda: not self._callers)
            yield

    def close(self) -> None:
        if self._ended is None:
            self._ended, self._remedy = "an engine that was closed", "build or load another one"

    def lose(self, reason: str) -> None:
        """The CUDA context has failed for good: nothing on this device works any more in this process."""
        self._ended = f"an engine whose CUDA context is lost ({reason})"
        self._remedy = "start a new process; run it with CUDA_LAUNCH_BLOCKING=1 to find the kernel that failed"
