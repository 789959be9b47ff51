"""The loop contract: what functions over an engine ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from skipstep.networks.spec import NetworkSpec
from skipstep.plans.plan import Plan


class Sampler(Protocol):
    """What functions over an engine ask of it: `skipstep.Engine` is one."""

    @property
    def network(self) -> NetworkSpec: ...
    @property
    def plans(self) -> Mapping[str, Plan]: ...
    @property
    def batch_sizes(self) -> tuple[int, ...]: ...
    def select_plan(self, *, steps: int | None = None, plan: Plan | None = None) -> Plan: ...
    def split(self, num_samples: int) -> list[int]: ...
    # Arguments as for skipstep.Engine.sample.
    @property
    def sample(self) -> Callable[..., Any]: ...
