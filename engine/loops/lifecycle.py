"""Whether an engine may still be used: after `close`, in a forked child and with a lost CUDA context it may not.

A child of fork has the parent's memory but not its threads, and a CUDA context does not survive the fork: ONNX Runtime
would wait forever, and CUDA would fail later. So the first use raises an error that says what happened.
"""

from __future__ import annotations

import os

from skipstep.errors import EngineStateError


class Lifecycle:
    """`check` before every use; everything that serves one engine shares it."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._ended: str | None = None
        self._remedy = ""

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

    def close(self) -> None:
        if self._ended is None:
            self._ended, self._remedy = "an engine that was closed", "build or load another one"

    def lose(self, reason: str) -> None:
        """The CUDA context has failed for good: nothing on this device works any more in this process."""
        self._ended = f"an engine whose CUDA context is lost ({reason})"
        self._remedy = "start a new process; run it with CUDA_LAUNCH_BLOCKING=1 to find the kernel that failed"
