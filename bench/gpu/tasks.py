"""What the gate does, in order: each task a process of its own, with the seconds that are set aside for it.

A task may take what earlier ones left of theirs, and never what is set aside for later ones, so the whole stays within
BUDGET. What compiles comes last, TensorRT's builds after all others: they take minutes where the caches are empty, get
the time that is left, and do not decide the verdict; a second run on the same machine finds the caches full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Status = Literal["ok", "failed", "timed out", "absent", "not run"]

# Seconds for all tasks together: ten minutes, less what installing takes.
BUDGET: Final = 540.0


@dataclass(frozen=True, slots=True)
class Task:
    """`seconds` are set aside for it. It is not run unless all that it `needs` are ok.

    `decides`: the gate fails unless it is ok or absent. `contenders`: it measures their latency, with `models` and
    batch sizes as the benchmark's --model takes them.
    """

    name: str
    seconds: float
    needs: tuple[str, ...] = ()
    decides: bool = True
    contenders: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return f"{self.name}.json"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a task ended: `reason` where it is not ok."""

    status: Status
    reason: str = ""


AIMS_FILE: Final = "aims.json"
SUMMARY_FILE: Final = "summary.json"

# The contenders that the aims are about.
CAPTURED: Final = "skipstep-captured"
EAGER: Final = "diffusers"
REPLAYED: Final = "network-graph"

_FIRST: Final = ("cifar10-architecture@1",)
_ALL: Final = ("cifar10-architecture@1,8,64", "celeba64-architecture@1,8", "celebahq256-architecture@1")
_CHECKED: Final = ("kernels", "engine")

TASKS: Final = (
    Task("kernels", 60),
    Task("engine", 70),
    Task("memory-check", 35),
    Task("proofs", 25),
    Task("step-kernel", 50, needs=("kernels",)),
    Task("latency-skipstep", 65, _CHECKED, contenders=(CAPTURED,), models=_ALL),
    Task("latency-loops", 15, _CHECKED, contenders=("skipstep-step-graph", "skipstep-stepwise"), models=_FIRST),
    Task("latency-diffusers", 60, decides=False, contenders=(REPLAYED, EAGER), models=_ALL),
    Task("latency-reduce-overhead", 50, decides=False, contenders=("diffusers-reduce-overhead",), models=_ALL),
    Task("latency-compiled", 30, _CHECKED, decides=False, contenders=("skipstep-compiled",), models=_FIRST),
    Task("latency-max-autotune", 25, decides=False, contenders=("diffusers-max-autotune",), models=_ALL),
    Task("latency-tensorrt", 40, _CHECKED, decides=False, contenders=("skipstep-tensorrt",), models=_ALL),
)


def limit_for(later: Sequence[Task], *, remaining: float) -> float:
    """Seconds that a task may take, `remaining` being left of the whole and `later` those after it."""
    return max(1.0, remaining - sum(task.seconds for task in later))


def passed(tasks: Sequence[Task], verdicts: Mapping[str, Verdict]) -> bool:
    """Whether everything that decides was done, and is ok or absent for a reason that the machine gives."""
    return all(
        task.name in verdicts and verdicts[task.name].status in ("ok", "absent") for task in tasks if task.decides
    )
