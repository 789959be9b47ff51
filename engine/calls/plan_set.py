"""The plans that an engine holds, and the choice of one for a call."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from skipstep.errors import InputError, PlanError, PlanNotFoundError, check_flag, check_integer, shown
from skipstep.networks.spec import NetworkSpec, check_plan_fits
from skipstep.plans.fit import Fit, check_fit, check_guidance, fits_guidance
from skipstep.plans.plan import Plan


def make_plan(plan: int | Plan, defaults: Mapping[str, Any], *, eta: float = 0.0) -> Plan:
    """`plan`, or the plan of that step count with `defaults` and `eta`. Raises PlanError for one of another kind."""
    if not isinstance(plan, Plan):
        if "schedule" not in defaults:
            raise PlanError(
                got=f"the step count {shown(plan)} for a model without a scheduler configuration",
                expected="a noise schedule",
                remedy="pass schedule=, e.g. NoiseSchedule.linear(1000), or a Plan",
            )
        plan = Plan(**{**defaults, "steps": plan, "eta": eta})
    trained = defaults.get("prediction_type")
    if trained is not None and plan.prediction_type != trained:
        raise PlanError(
            got=f"a plan for {plan.prediction_type} prediction",
            expected=f"{trained}, which this network was trained to predict",
            remedy=f"make the plan with prediction_type={trained!r}",
        )
    return plan


class PlanSet(Mapping[str, Plan]):
    """Plans by key, made for `network`. `defaults` are the options of a plan that is requested by step count.

    `compile_on_miss`: a plan that is requested and not held is added, instead of being an error. `network_digest`:
    sha256 of the network, None where it is unknown; plans that were fitted to another are refused.
    """

    def __init__(
        self,
        network: NetworkSpec,
        plans: Iterable[Plan] = (),
        *,
        defaults: Mapping[str, Any],
        compile_on_miss: bool = False,
        network_digest: str | None = None,
    ) -> None:
        plans = list(plans)
        self._network = network
        self.network_digest = network_digest
        # Networks that plans may be fitted to. What came together belongs together.
        self._fitted_to = {network_digest, *(plan.fit.network for plan in plans if isinstance(plan.fit, Fit))}
        self._mismatched: frozenset[str] = frozenset()
        # Replaced, never changed: a caller who goes through the plans is not disturbed by one who adds a plan.
        self._plans: dict[str, Plan] = {}
        self._adding = threading.Lock()
        self.defaults = defaults
        self._compile_on_miss = compile_on_miss
        for plan in plans:
            self.add(plan)

    def __getitem__(self, key: str) -> Plan:
        return self._plans[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def add(self, plan: int | Plan, *, eta: float = 0.0, allow_mismatch: bool = False) -> Plan:
        """Hold one more plan and return it; `eta` is that of a step count. Raises PlanError where it does not fit.

        `allow_mismatch`: a plan that was fitted to another network, or at another guidance scale, is used all the same.
        """
        plan = make_plan(plan, self.defaults, eta=eta)
        check_plan_fits(plan, self._network)
        if not check_flag("allow_mismatch", allow_mismatch) and self.network_digest is not None:
            check_fit(plan.fit, networks=self._fitted_to)
        with self._adding:
            self._mismatched = self._mismatched | {plan.key} if allow_mismatch else self._mismatched - {plan.key}
            self._plans = {**self._plans, plan.key: plan}
        return plan

    def select(self, *, steps: int | None = None, plan: Plan | None = None) -> Plan:
        """The held plan with that step count, or the given one. Raises PlanNotFoundError, listing what is held."""
        if (steps is None) == (plan is None):
            raise InputError(
                got="neither steps nor plan" if steps is None else "both steps and plan",
                expected="one of them",
                remedy="pass steps=20, or plan=",
            )
        if plan is not None:
            if not isinstance(plan, Plan):
                raise InputError(
                    got=f"plan of type {type(plan).__name__}", expected="a Plan", remedy="pass one, or use steps=20"
                )
            if plan.key not in self._plans and not self._compile_on_miss:
                raise self._miss(f"{plan!r}, which this engine does not hold")
            return self._plans.get(plan.key) or self.add(plan)
        steps = check_integer("steps", steps, low=1, remedy="pass steps=20, or another step count of the plans")
        held = [p for p in self._plans.values() if p.steps == steps]
        if len(held) == 1:
            return held[0]
        if len(held) > 1:
            raise PlanNotFoundError(
                got=f"steps={steps}, which {len(held)} plans have: {', '.join(map(repr, held))}",
                expected="a choice between them",
                remedy="pass plan=",
            )
        if self._compile_on_miss:
            return self.add(steps)
        raise self._miss(f"steps={steps!r}, which no plan of this engine has")

    def choose(self, steps: int | None, plan: Plan | Sequence[Plan] | None) -> list[Plan]:
        """The plan of a call, or one for each sample. Raises InputError and PlanNotFoundError."""
        if plan is not None and isinstance(plan, Sequence) and not isinstance(plan, str | bytes | bytearray):
            if not plan or steps is not None:
                raise InputError(
                    got="an empty list of plans" if not plan else "both steps and plan",
                    expected="a plan per sample",
                    remedy="pass plan=[...], one for each sample, and leave steps out",
                )
            return [self.select(plan=each) for each in plan]
        return [self.select(steps=steps, plan=plan)]

    def check_guidance(self, plans: Sequence[Plan], scales: Any) -> None:
        """Raise InputError where a call's guidance is far from that of a plan's fit."""
        for plan in plans:
            if plan.fit is not None and not self.fits_guidance(plan, scales):
                check_guidance(plan.fit, scales)

    def fits_guidance(self, plan: Plan, scales: Any) -> bool:
        """Whether a plan may be used at these scales: one that was fitted at another is added with allow_mismatch."""
        return plan.fit is None or plan.key in self._mismatched or fits_guidance(plan.fit, scales)

    def _miss(self, got: str) -> PlanNotFoundError:
        return PlanNotFoundError(
            got=got,
            expected=f"one of {', '.join(repr(p) for p in self._plans.values()) or 'none yet'}",
            remedy="call add_plan() first, or build the engine with compile_on_miss=True",
        )
