"""What a benchmark run is asked to measure, checked before anything is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from skipstep.bench.contenders import contenders_named
from skipstep.bench.measurements import MEASUREMENTS
from skipstep.bench.models import subject_name
from skipstep.errors import InputError


@dataclass(frozen=True, slots=True)
class CaseKey:
    model: str
    steps: int
    batch_size: int

    @property
    def group(self) -> str:
        return f"{self.model}, {self.steps} steps, batch {self.batch_size}"


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. `budget_seconds` is for one contender in one case. `paired`: the textbook loop is timed before
    every round; without it there are no ratios, and only the fewest steps are checked. `simulated`: the model
    that stands for those of a GPU in a dry run of the GPU gate.

    Raises InputError for numbers that are not positive, and for unknown models, contenders and measurements.
    """

    models: tuple[str, ...] = ("fashion-mnist",)
    steps: tuple[int, ...] = (10,)
    batch_sizes: tuple[int, ...] = (1,)
    contenders: tuple[str, ...] = ()
    budget_seconds: float = 20.0
    max_rounds: int = 15
    measure: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0
    compile_seconds: float = 180.0
    paired: bool = True
    simulated: str = ""

    def __post_init__(self) -> None:
        numbers = {
            "plans": self.steps,
            "batch": self.batch_sizes,
            "budget": (self.budget_seconds,),
            "rounds": (self.max_rounds,),
        }
        for name, values in numbers.items():
            if not values or any(value <= 0 for value in values):
                raise InputError(
                    got=f"{name} {', '.join(map(str, values)) or 'none'}",
                    expected="positive numbers",
                    remedy=f"pass e.g. --{name} {'30' if name == 'budget' else '1,10'}",
                )
        measure = tuple(MEASUREMENTS) if self.measure == ("all",) else self.measure
        if unknown := [name for name in measure if name not in MEASUREMENTS]:
            raise InputError(
                got=f"measurements {', '.join(unknown)}",
                expected=f"names among {', '.join(MEASUREMENTS)}, or all",
                remedy="correct --measure, or leave it out",
            )
        contenders_named(self.contenders)
        object.__setattr__(self, "measure", measure)
        object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(self.batch_sizes))))
        object.__setattr__(self, "models", tuple(dict.fromkeys(self.models)))
        object.__setattr__(self, "threads", self.threads or torch.get_num_threads())
        for model, _ in self.sized_models():
            subject_name(model)

    def sized_models(self) -> list[tuple[str, tuple[int, ...]]]:
        """Models with their batch sizes: those that follow an @ in the model's name, else those of all."""
        found = []
        for model in self.models:
            own = re.fullmatch(r"(.+)@([\d,]+)", model)
            sizes = tuple(sorted(int(each) for each in own[2].split(",") if each)) if own else self.batch_sizes
            found.append((own[1] if own else model, sizes))
        return found
