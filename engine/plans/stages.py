"""The tables that a loop reads: of one plan for all samples of a batch, or of one plan per sample."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import PlanError
from skipstep.kernels.layout import StepFlags
from skipstep.kernels.statistics import Thresholding
from skipstep.plans.plan import Plan


@dataclass(frozen=True, slots=True)
class Stages:
    """E evaluations: `table` float32 `[E, 1 or B, NUM_COLUMNS]`, `timesteps` float64 `[E, 1 or B]`.

    `flags` and `ends_step`, E of each: what the step does after an evaluation, and whether it completes a step.
    """

    table: NDArray[np.float32]
    timesteps: NDArray[np.float64]
    flags: tuple[StepFlags, ...]
    ends_step: tuple[bool, ...]
    thresholding: Thresholding | None
    # What loops found out about them, by kind of call (skipstep.loops.structure.Structure).
    structures: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    adds_noise: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "adds_noise", any(flags.add_noise for flags in self.flags))

    def __len__(self) -> int:
        return len(self.flags)

    @classmethod
    def of(cls, plans: Sequence[Plan]) -> Stages:
        """Stages of one plan, or of one plan per sample. Raises PlanError where the plans differ in structure.

        Per-sample plans run the same number of evaluations and use the same parts of the step; their timesteps, levels
        and eta are their own.
        """
        first = plans[0]
        if len(plans) == 1 or len({plan.key for plan in plans}) == 1:
            return _of_one(_Same(first))
        for plan in plans[1:]:
            if _structure(plan) != _structure(first):
                raise PlanError(
                    got=f"plans of unequal structure in one batch: {first!r} and {plan!r}",
                    expected="the same solver, number of evaluations, clipping and convention for every sample",
                    remedy="sample them in separate calls",
                )
        return cls(
            table=np.stack([plan.coefficients for plan in plans], axis=1),
            timesteps=np.stack([plan.evaluation_timesteps for plan in plans], axis=1),
            flags=tuple(
                replace(flags[0], add_noise=any(f.add_noise for f in flags), add_state=any(f.add_state for f in flags))
                for flags in zip(*(plan.stage_flags for plan in plans), strict=True)
            ),
            ends_step=first.ends_step,
            thresholding=first.thresholding,
        )

    def chunk(self, start: int, batch_size: int) -> Stages:
        """The stages of samples start … start + batch_size - 1; past the end those of the last sample are repeated."""
        if self.table.shape[1] == 1:
            return self
        index = np.minimum(np.arange(start, start + batch_size), self.table.shape[1] - 1)
        return replace(
            self, table=np.ascontiguousarray(self.table[:, index]), timesteps=self.timesteps[:, index], structures={}
        )

    def network_timesteps(self, copies: int, batch_size: int) -> NDArray[np.float64]:
        """Timesteps `[E, copies·B]` of the network's batch; `copies` is the batch multiplier."""
        rows = self.timesteps.shape[1]
        return np.concatenate([self.timesteps] * (copies if rows == batch_size else copies * batch_size), axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """A plan, equal to itself alone: tables of equal plans may have been read from different bundles."""

    plan: Plan

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.plan is other.plan

    def __hash__(self) -> int:
        return id(self.plan)


# An engine draws with the same few plans again and again, and loops know what they filled their tables with.
@lru_cache(maxsize=128)
def _of_one(same: _Same) -> Stages:
    plan = same.plan
    return Stages(
        table=plan.coefficients[:, None],
        timesteps=plan.evaluation_timesteps[:, None],
        flags=plan.stage_flags,
        ends_step=plan.ends_step,
        thresholding=plan.thresholding,
    )


def _structure(plan: Plan) -> tuple[object, ...]:
    flags = tuple(replace(flags, add_noise=False, add_state=False) for flags in plan.stage_flags)
    return flags, plan.thresholding
