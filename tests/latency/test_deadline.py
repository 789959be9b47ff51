"""Plans by deadline: what is chosen fits, nothing longer would have, and a refusal says what would do."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from engines import SCHEDULE
from hypothesis import example, given
from hypothesis import strategies as st
from identities import CPU

from skipstep import Plan
from skipstep.errors import DeadlineError, InputError
from skipstep.latency.calibration import Calibration, Latency, RunKind
from skipstep.latency.deadline import choose_plan
from skipstep.plans.fit import Quality, with_quality

# Two of ten steps, which differ in eta alone.
PLANS = [
    *(Plan(schedule=SCHEDULE, steps=steps) for steps in (1, 4, 10, 20, 50)),
    Plan(schedule=SCHEDULE, steps=10, eta=1.0),
]
SIZES = (1, 4)


def measured(p99: dict[RunKind, float]) -> Calibration:
    return Calibration(CPU, {kind: Latency(each / 2, each, each, 100) for kind, each in p99.items()})


def steady(*, ms_per_step: float = 1.0) -> Calibration:
    """A millisecond a step, whatever the batch size, and twice that with guidance."""
    return measured(
        {
            RunKind(plan.key, size, guided): ms_per_step * plan.steps * (2 if guided else 1)
            for plan in PLANS
            for size in SIZES
            for guided in (False, True)
        }
    )


def test_the_most_steps_that_fit():
    calibration = steady()
    for deadline_ms, steps in ((60, 50), (55.1, 50), (54.9, 20), (22.1, 20), (21.9, 10), (1.1, 1)):
        assert choose_plan(calibration, PLANS, [1], deadline_ms=deadline_ms, guided=False).steps == steps
    assert choose_plan(calibration, PLANS, [1], deadline_ms=50, guided=False, margin=0.0).steps == 50
    assert choose_plan(calibration, PLANS, [1], deadline_ms=55, guided=True).steps == 20
    # Three runs take as long as all of them.
    assert choose_plan(calibration, PLANS, [4, 4, 1], deadline_ms=66.1, guided=False).steps == 20
    assert choose_plan(calibration, PLANS, [1], deadline_ms=np.float32(60), guided=False).steps == 50


def test_of_equal_steps_the_lower_p99():
    tens = [plan for plan in PLANS if plan.steps == 10]
    for fast, slow in (tens, tens[::-1]):
        calibration = measured({RunKind(fast.key, 1, False): 5.0, RunKind(slow.key, 1, False): 6.0})
        for plans in (PLANS, PLANS[::-1]):
            assert choose_plan(calibration, plans, [1], deadline_ms=100, guided=False) is fast


def test_the_best_quality_that_fits_where_all_that_fit_have_one():
    rmse = {1: 0.5, 4: 0.02, 10: 0.3, 20: 0.1, 50: 0.01}
    plans = [with_quality(plan, Quality(rmse[plan.steps], 2.0)) for plan in PLANS[:5]]
    calibration = steady()
    for deadline_ms, steps in ((60, 50), (30, 4), (1.2, 1)):
        assert choose_plan(calibration, plans, [1], deadline_ms=deadline_ms, guided=False).steps == steps
    # One that was not measured, or at another guidance scale, is not compared: the most steps.
    for other in (None, Quality(0.1, 1.0)):
        mixed = [with_quality(plan, other) if plan.steps == 20 else plan for plan in plans]
        assert choose_plan(calibration, mixed, [1], deadline_ms=30, guided=False).steps == 20
        assert choose_plan(calibration, mixed, [1], deadline_ms=12, guided=False).steps == 4


def test_a_way_back_to_noise_is_no_sample():
    up = PLANS[4].inverted()
    calibration = steady().updated_by(measured({RunKind(up.key, 1, False): 0.1}))
    assert choose_plan(calibration, [*PLANS, up], [1], deadline_ms=1000, guided=False) is PLANS[4]
    with pytest.raises(InputError, match="without plans"):
        choose_plan(calibration, [up], [1], deadline_ms=1000, guided=False)


TIMES = st.floats(0.01, 1e5)


@given(
    st.dictionaries(
        st.builds(RunKind, st.sampled_from([plan.key for plan in PLANS]), st.sampled_from([1, 4, 16]), st.booleans()),
        TIMES,
    ),
    st.lists(st.sampled_from([1, 4, 16]), min_size=1, max_size=5),
    TIMES,
    st.booleans(),
    st.floats(0, 2),
)
@example({RunKind(PLANS[0].key, 1, False): 0.01}, [1], 0.01, False, 0.0)
def test_what_is_chosen_fits_and_nothing_longer_does(p99, sizes, deadline_ms, guided, margin):
    calibration = measured(p99)

    def total(plan: Plan) -> float | None:
        kinds = [RunKind(plan.key, size, guided) for size in sizes]
        return (1 + margin) * sum(p99[kind] for kind in kinds) if all(kind in p99 for kind in kinds) else None

    totals = {plan.key: total(plan) for plan in PLANS}
    arguments = {"guided": guided, "margin": margin}
    # Sums in another order may differ in their last bit: not what is tried here.
    near = any(each is not None and abs(each / deadline_ms - 1) < 1e-9 for each in totals.values())
    try:
        chosen = choose_plan(calibration, PLANS, sizes, deadline_ms=deadline_ms, **arguments)
    except InputError:
        assert all(each is None for each in totals.values())
        return
    except DeadlineError as error:
        shortest = float(re.search(r"at least ([\d.]+) ms", error.expected)[1])
        assert near or all(each is None or each > deadline_ms for each in totals.values())
        again = choose_plan(calibration, PLANS, sizes, deadline_ms=shortest, **arguments)
        assert totals[again.key] == pytest.approx(min(each for each in totals.values() if each is not None))
        return
    assert near or totals[chosen.key] <= deadline_ms
    for plan in PLANS:
        fits = totals[plan.key] is not None and totals[plan.key] <= deadline_ms
        assert near or not fits or plan.steps <= chosen.steps


def test_what_was_not_measured_is_not_chosen():
    calibration = steady()
    with pytest.raises(InputError, match="8 samples, with no plan measured so") as caught:
        choose_plan(calibration, PLANS, [8], deadline_ms=1e6, guided=False)
    assert "calibrate(batch_sizes=[8])" in caught.value.remedy
    with pytest.raises(InputError, match=r"calibrate\(batch_sizes=\[4, 8\]\)"):
        choose_plan(calibration, PLANS, [4, 4, 8], deadline_ms=1e6, guided=False)
    new = Plan(schedule=SCHEDULE, steps=100)
    assert choose_plan(calibration, [*PLANS, new], [1], deadline_ms=1e6, guided=False).steps == 50
    with pytest.raises(DeadlineError, match=f"not measured at these batch sizes: 100 steps .ddim, {new.key}"):
        choose_plan(calibration, [*PLANS, new], [1], deadline_ms=0.5, guided=False)


def test_a_miss_lists_every_plan_and_the_shortest_deadline():
    with pytest.raises(DeadlineError, match=r"at least 1\.10 ms") as caught:
        choose_plan(steady(), PLANS, [1], deadline_ms=0.5, guided=False)
    for plan in PLANS:
        assert (
            f"{plan.steps} ms for {plan.steps} step{'s' if plan.steps > 1 else ''} (ddim, {plan.key})"
            in caught.value.expected
        )
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("deadline_ms", [0, -1, float("nan"), float("inf"), True, "5", None, 10**400])
def test_a_deadline_is_a_positive_number(deadline_ms):
    with pytest.raises(InputError, match="deadline_ms="):
        choose_plan(steady(), PLANS, [1], deadline_ms=deadline_ms, guided=False)


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf"), None])
def test_a_margin_is_none_or_more(margin):
    with pytest.raises(InputError, match="margin="):
        choose_plan(steady(), PLANS, [1], deadline_ms=10, guided=False, margin=margin)


def test_without_a_calibration_of_this_device():
    with pytest.raises(InputError, match="not calibrated") as caught:
        choose_plan(None, PLANS, [1], deadline_ms=10, guided=False)
    assert "engine.calibrate()" in caught.value.remedy
    assert "skipstep calibrate" in caught.value.remedy
    assert choose_plan(steady(), PLANS, [1], deadline_ms=10000, guided=False, identity=CPU)
    with pytest.raises(InputError, match="threads 2 instead of 1"):
        choose_plan(steady(), PLANS, [1], deadline_ms=10, guided=False, identity=dataclasses.replace(CPU, threads=1))
