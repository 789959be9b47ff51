"""What modules above the loops may expect of an engine, without importing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from skipstep.networks.spec import NetworkSpec
    from skipstep.plans.plan import Plan


class Sampler(Protocol):
    """An engine, as calibration, golden samples and the bundle writer use it. See skipstep.Engine for each member.

    `calibration` is a skipstep.latency.calibration.Calibration or None, `identity` gives a
    skipstep.latency.identity.DeviceIdentity.
    """

    calibration: Any

    @property
    def network(self) -> NetworkSpec: ...

    @property
    def plans(self) -> Mapping[str, Plan]: ...

    @property
    def batch_sizes(self) -> tuple[int, ...]: ...

    @property
    def plan_defaults(self) -> Mapping[str, Any]: ...

    def select_plan(self, *, steps: int | None = None, plan: Plan | None = None) -> Plan: ...

    def split(self, num_samples: int) -> Sequence[int]: ...

    @property
    def sample(self) -> Callable[..., Any]: ...

    def identity(self) -> Any: ...
