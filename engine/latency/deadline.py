"""The plan for a deadline: the best of those whose measured p99 fits, with a margin.

    (1 + margin) · Σ over the request's runs of p99(plan, batch size of the run, guided)  ≤  deadline

The best is the one whose images are the nearest to the converged ones, where that was measured of every plan that fits
(skipstep.plans.fit.Quality, which engine.tune measures); else the one with the most steps. Adding the runs' p99 is
cautious: the runs of a call are rarely all slow. Only plans with latencies are chosen: nothing is inferred from other
batch sizes, or from plans of other lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from skipstep.errors import DeadlineError, InputError, check_number
from skipstep.latency.calibration import Calibration, RunKind
from skipstep.latency.identity import DeviceIdentity
from skipstep.plans.fit import Quality
from skipstep.plans.plan import Plan
from skipstep.plans.solvers import SOLVERS

MARGIN = 0.1


def choose_plan(
    calibration: Calibration | None,
    plans: Iterable[Plan],
    sizes_of_runs: Sequence[int],
    *,
    deadline_ms: float,
    guided: bool,
    margin: float = MARGIN,
    identity: DeviceIdentity | None = None,
) -> Plan:
    """The best plan that meets the deadline; of equally good ones that with the lower p99.

    calibration    of this device; None where nothing was measured.
    plans          to choose from. Inversions are left out.
    sizes_of_runs  the batch sizes that the request is split over (Sampler.split).
    margin         the share of the p99 that is added to it, ≥ 0.
    identity       of this device, to check that the calibration was measured on it.

    Raises DeadlineError where no plan fits, with the shortest possible deadline; InputError for an invalid deadline or
    margin, without a calibration of this device, and where no plan was measured at these batch sizes.
    """
    remedy = "pass milliseconds, such as deadline_ms=50.0, or steps="
    deadline_ms = check_number("deadline_ms", deadline_ms, low=0.0, above=True, remedy=remedy)
    margin = check_number("margin", margin, low=0.0, remedy="pass a share of the p99, such as 0.1, or 0 for none")
    latencies = _checked(calibration, identity).latencies
    factor, measured, unmeasured = 1.0 + margin, [], []
    for plan in sorted(plans, key=lambda plan: (len(plan.timesteps), plan.key)):
        if SOLVERS[plan.solver].upward:
            continue
        runs = [latencies.get(RunKind(plan.key, size, guided)) for size in sizes_of_runs]
        times = [run.p99_ms for run in runs if run is not None]
        if len(times) == len(runs):
            measured.append((plan, math.fsum(times)))
        else:
            unmeasured.append(plan)
    fitting = [(plan, total) for plan, total in measured if total * factor <= deadline_ms]
    if fitting:
        return min(fitting, key=lambda each: (_rank(each[0], fitting), each[1], each[0].key))[0]
    if not measured:
        raise _not_measured(unmeasured, sizes_of_runs, guided)
    left_out = f"; not measured at these batch sizes: {_names(unmeasured)}" if unmeasured else ""
    raise DeadlineError(
        got=f"deadline_ms={deadline_ms:g} for {_request(sizes_of_runs, guided)}",
        expected=f"at least {_rounded_up(min(total for _, total in measured) * factor)} ms, with the margin of "
        f"{margin:.0%}; p99 is {', '.join(f'{total:.4g} ms for {_name(plan)}' for plan, total in measured)}{left_out}",
        remedy="allow more time, add a plan of fewer steps and calibrate it, or draw fewer samples in a call",
    )


def _rank(plan: Plan, fitting: Sequence[tuple[Plan, float]]) -> float:
    """Less is better: the distance to the converged images where all have one, at one scale; else more steps are."""
    found = [each.quality for each, _ in fitting if isinstance(each.quality, Quality)]
    if isinstance(plan.quality, Quality) and len(found) == len(fitting) and len({q.guidance_scale for q in found}) == 1:
        return plan.quality.rmse
    return -len(plan.timesteps)


def _checked(calibration: Calibration | None, identity: DeviceIdentity | None) -> Calibration:
    got = None
    if calibration is None:
        got = "deadline_ms= for an engine that was not calibrated on this device"
    elif identity is not None and calibration.identity != identity:
        got = f"deadline_ms= with latencies of another setting: {', '.join(calibration.identity.differences(identity))}"
    if calibration is None or got is not None:
        raise InputError(
            got=str(got),
            expected="latencies that were measured here",
            remedy="call engine.calibrate(), or run skipstep calibrate on the bundle and load it again",
        )
    return calibration


def _not_measured(plans: Sequence[Plan], sizes_of_runs: Sequence[int], guided: bool) -> InputError:
    return InputError(
        got=f"deadline_ms= for {_request(sizes_of_runs, guided)}, with no plan measured so: {_names(plans)} were not"
        if plans
        else "deadline_ms= for an engine without plans to choose from",
        expected="at least one plan that was measured at the batch sizes of the call",
        remedy=f"call engine.calibrate(batch_sizes={sorted(set(sizes_of_runs))}), or pass steps=",
    )


def _request(sizes_of_runs: Sequence[int], guided: bool) -> str:
    sizes = " + ".join(map(str, sizes_of_runs)) if len(sizes_of_runs) <= 4 else f"{sum(sizes_of_runs)}"
    return f"{sizes} sample{'s' if sizes != '1' else ''}" + (" with guidance" if guided else "")


def _names(plans: Iterable[Plan]) -> str:
    return ", ".join(map(_name, plans))


def _name(plan: Plan) -> str:
    return f"{plan.steps} step{'s' if len(plan.timesteps) > 1 else ''} ({plan.solver}, {plan.key})"


def _rounded_up(milliseconds: float) -> str:
    """With two decimals, rounded up: a deadline of this length fits."""
    rounded = round(milliseconds, 2)
    return f"{rounded if rounded >= milliseconds else rounded + 0.01:.2f}"
