"""A plan with tables that were stored, in place of those that this machine would compute."""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import PlanError
from skipstep.plans.key import plan_key
from skipstep.plans.plan import Plan


def with_tables(plan: Plan, coefficients: NDArray[np.float32], evaluation_timesteps: NDArray[np.float64]) -> Plan:
    """The plan with the tables that another machine computed from the same options, and its key.

    Logarithms may differ in their last bit from one mathematical library to the next; keys and samples must not.
    Raises PlanError for tables that are not this plan's.
    """
    stored = copy.copy(plan)
    for name, array in (("coefficients", coefficients), ("evaluation_timesteps", evaluation_timesteps)):
        own = getattr(plan, name)
        same = isinstance(array, np.ndarray) and array.shape == own.shape and array.dtype == own.dtype
        if not same or not np.allclose(array, own, 1e-5, 1e-7):
            raise PlanError(
                got=f"{name} that are not those of {plan!r}",
                expected="the tables that these options give",
                remedy="export the bundle again with this version of skipstep",
            )
        array = array.copy()
        array.setflags(write=False)
        object.__setattr__(stored, name, array)
    key = plan_key(
        stored.stage_flags,
        stored.thresholding,
        evaluation_timesteps=stored.evaluation_timesteps,
        coefficients=stored.coefficients,
    )
    object.__setattr__(stored, "key", key)
    return stored
