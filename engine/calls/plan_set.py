"""The plans that an engine holds, and which of them a call means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skipstep.errors import InputError, PlanError, PlanNotFoundError
from skipstep.networks.spec import NetworkSpec, check_plan_fits
from skipstep.plans.plan import Plan


class PlanHolder:
    """`plans` by key, made for `network`. `plan_defaults` are the options of a plan that is asked for by step count.

    `compile_on_miss`: a plan that is asked for and not held is added, instead of being an error.
    """

    def __init__(self, network: NetworkSpec, *, plan_defaults: Mapping[str, Any], compile_on_miss: bool) -> None:
        self.network = network
        self.plans: dict[str, Plan] = {}
        self.plan_defaults = plan_defaults
        self.compile_on_miss = compile_on_miss

    def add_plan(self, plan: int | Plan, *, eta: float = 0.0) -> Plan:
        """Hold one more plan and return it; `eta` is that of a step count. Raises PlanError where it does not fit."""
        if not isinstance(plan, Plan):
            if "schedule" not in self.plan_defaults:
                raise PlanError(
                    got=f"the step count {plan!r} for a model without a scheduler configuration",
                    expected="a noise schedule",
                    remedy="pass schedule=, e.g. NoiseSchedule.linear(1000), or a Plan",
                )
            plan = Plan(**{**self.plan_defaults, "steps": plan, "eta": eta})
        trained = self.plan_defaults.get("prediction_type")
        if trained is not None and plan.prediction_type != trained:
            raise PlanError(
                got=f"a plan for {plan.prediction_type} prediction",
                expected=f"{trained}, which this network was trained to predict",
                remedy=f"make the plan with prediction_type={trained!r}",
            )
        check_plan_fits(plan, self.network)
        self.plans[plan.key] = plan
        return plan

    def select_plan(self, *, steps: int | None = None, plan: Plan | None = None) -> Plan:
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
            if plan.key not in self.plans and not self.compile_on_miss:
                raise self._miss(f"{plan!r}, which this engine does not hold")
            return self.plans.get(plan.key) or self.add_plan(plan)
        held = [p for p in self.plans.values() if p.steps == steps]
        if len(held) == 1:
            return held[0]
        if len(held) > 1:
            raise PlanNotFoundError(
                got=f"steps={steps}, which {len(held)} plans have: {', '.join(map(repr, held))}",
                expected="a choice between them",
                remedy="pass plan=",
            )
        if self.compile_on_miss and steps is not None:
            return self.add_plan(steps)
        raise self._miss(f"steps={steps!r}, which no plan of this engine has")

    def chosen_plans(self, steps: int | None, plan: Plan | Sequence[Plan] | None) -> list[Plan]:
        if isinstance(plan, Sequence) and not isinstance(plan, str):
            if not plan or steps is not None:
                raise InputError(
                    got="an empty list of plans" if not plan else "both steps and plan",
                    expected="a plan per sample",
                    remedy="pass plan=[...], one for each sample, and leave steps out",
                )
            return [self.select_plan(plan=each) for each in plan]
        return [self.select_plan(steps=steps, plan=plan)]

    def _miss(self, got: str) -> PlanNotFoundError:
        return PlanNotFoundError(
            got=got,
            expected=f"one of {', '.join(repr(p) for p in self.plans.values()) or 'none yet'}",
            remedy="call add_plan() first, or build the engine with compile_on_miss=True",
        )
