"""What happens during long work: each phase goes to the logger "skipstep", and to the caller's `progress`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from skipstep.errors import check_callable

LOGGER: Final = logging.getLogger("skipstep")
Report = Callable[[str], None]


def reporter(progress: Report | None) -> Report:
    """A function that reports a phase, in words, to the logger and to `progress`. Raises InputError for no function."""
    check_callable("progress", progress, "message")

    def report(phase: str) -> None:
        LOGGER.info(phase)
        if progress is not None:
            progress(phase)

    return report
