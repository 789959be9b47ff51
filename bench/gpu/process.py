"""A task as a process: started in a group of its own, ended with the whole group when its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TAIL_BYTES = 4000
_GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class EndedProcess:
    """`status` as a shell has it, None where the time was up; `tail` is the end of what it printed."""

    status: int | None
    seconds: float
    tail: str


def run_limited(command: Sequence[str], *, seconds: float, environment: Mapping[str, str], log: Path) -> EndedProcess:
    """Run a command to its end or for so many seconds; what it prints goes to `log`."""
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            # Compilers and test workers start processes of their own, which must end with it.
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # An interrupted gate must leave nothing on the GPU either.
            _end_group(process)
    return EndedProcess(status, time.monotonic() - started, _tail(log))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    # A process stuck in the driver cannot be waited for; the gate goes on without it.


def _tail(log: Path) -> str:
    with log.open("rb") as printed:
        printed.seek(0, os.SEEK_END)
        printed.seek(max(0, printed.tell() - _TAIL_BYTES))
        return printed.read().decode("utf-8", errors="replace")
