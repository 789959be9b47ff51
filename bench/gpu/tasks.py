"""What the gate does, in order: each task a process of its own, with the seconds that are set aside for it.

A task may take what earlier ones left of theirs, and never what is set aside for later ones, so the whole stays within
BUDGET. Contenders that torch compiles come last: they take minutes where the compiler's cache is empty, and get what is
left; a second run on the same machine finds the cache full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Status = Literal["ok", "failed", "timed out", "absent", "not run"]

# Seconds for all tasks together: ten minutes, less what installing takes.
BUDGET: Final = 575.0


@dataclass(frozen=True, slots=True)
class Task:
    """`seconds` are set aside for it. It is not run unless all that it `needs` are ok.

    `decides`: the gate fails unless it is ok or absent. `file` receives its results; those of several latency tasks are
    merged into one.
    """

    name: str
    seconds: float
    file: str
    needs: tuple[str, ...] = ()
    decides: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a task ended: `reason` where it is not ok."""

    status: Status
    reason: str = ""


LATENCY_FILE: Final = "latency.json"
AIMS_FILE: Final = "aims.json"
SUMMARY_FILE: Final = "summary.json"

# The contenders that the aims are about.
CAPTURED: Final = "skipstep-captured"
EAGER: Final = "diffusers"
REPLAYED: Final = "network-graph"

TASKS: Final = (
    Task("kernels", 90, "kernels.json"),
    Task("engine", 70, "engine.json"),
    Task("memory-check", 35, "memory-check.json"),
    Task("proofs", 25, "proofs.json"),
    Task("step-kernel", 55, "step-kernel.json", needs=("kernels",)),
    Task("latency-skipstep", 80, LATENCY_FILE, needs=("kernels", "engine")),
    Task("latency-diffusers", 65, LATENCY_FILE, decides=False),
    Task("latency-tensorrt", 15, LATENCY_FILE, needs=("kernels", "engine")),
    Task("latency-reduce-overhead", 60, LATENCY_FILE, decides=False),
    Task("latency-compiled", 40, LATENCY_FILE, needs=("kernels", "engine"), decides=False),
    Task("latency-max-autotune", 40, LATENCY_FILE, decides=False),
)


def limit_for(later: Sequence[Task], *, remaining: float) -> float:
    """Seconds that a task may take, `remaining` being left of the whole and `later` those after it."""
    return max(1.0, remaining - sum(task.seconds for task in later))


def passed(tasks: Sequence[Task], verdicts: Mapping[str, Verdict]) -> bool:
    """Whether everything that decides was done, and is ok or absent for a reason that the machine gives."""
    return all(
        task.name in verdicts and verdicts[task.name].status in ("ok", "absent") for task in tasks if task.decides
    )
