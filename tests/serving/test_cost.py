"""What an evaluation costs follows from whole calls that were measured."""

from __future__ import annotations

import pytest
from engines import SCHEDULE
from identities import CPU

from skipstep import Plan
from skipstep.latency.calibration import Calibration, Latency, RunKind
from skipstep.serving.cost import Cost

SHORT = Plan(schedule=SCHEDULE, steps=2)
LONG = Plan(schedule=SCHEDULE, steps=10)
HALF_GUIDED = Plan(schedule=SCHEDULE, steps=4, guidance_interval=(0.1, 3.0))
PLANS = {plan.key: plan for plan in (SHORT, LONG, HALF_GUIDED)}


def calibration(*measured: tuple[Plan, int, bool, float]) -> Calibration:
    latencies = {RunKind(plan.key, size, guided): Latency(ms, ms, 2 * ms, 9) for plan, size, guided, ms in measured}
    return Calibration(CPU, latencies)


def test_an_evaluation_costs_a_calls_time_over_its_evaluations():
    cost = Cost.of(calibration((LONG, 1, False, 50.0), (LONG, 4, False, 80.0)), PLANS)
    assert cost == Cost((1, 4), (5.0, 8.0), (10.0, 16.0))
    assert cost.ms(2) == pytest.approx(6.0)
    assert cost.ms(3, cautious=True) == pytest.approx(14.0)
    assert cost.ms(8) == pytest.approx(16.0), "as much a row as at the largest size"


def test_guidance_doubles_the_rows_and_the_cheapest_call_counts():
    measured = calibration((SHORT, 2, False, 14.0), (LONG, 1, True, 60.0), (LONG, 1, False, 50.0))
    assert Cost.of(measured, PLANS) == Cost((1, 2), (5.0, 6.0), (10.0, 12.0))


@pytest.mark.parametrize(
    "measured",
    [
        None,
        calibration((LONG, 1, False, 50.0)),
        calibration((LONG, 1, False, 50.0), (HALF_GUIDED, 1, True, 60.0)),
        calibration((LONG, 1, False, 50.0), (Plan(schedule=SCHEDULE, steps=7), 4, False, 60.0)),
    ],
)
def test_one_size_says_nothing_of_larger_batches(measured):
    assert Cost.of(measured, PLANS) is None


def test_joining_pays_while_a_larger_batch_evaluates_more_rows_a_millisecond():
    bound_by_launches = Cost((1, 16), (5.0, 5.0), (5.0, 5.0))
    bound_by_arithmetic = Cost((1, 16), (5.0, 80.0), (5.0, 80.0))
    knee = Cost((1, 4, 16), (5.0, 8.0, 31.0), (5.0, 8.0, 31.0))
    assert bound_by_launches.paying_rows(16) == 16
    assert bound_by_arithmetic.paying_rows(16) == 1
    assert knee.paying_rows(16) == 4
    assert knee.paying_rows(2) == 2


def test_batches_of_given_sizes_cost_what_the_next_size_does():
    cost = Cost((1, 4, 8), (5.0, 8.0, 12.0), (6.0, 9.0, 13.0), batch_sizes=(1, 4, 8))
    assert [cost.ms(rows) for rows in (1, 2, 4, 5, 8)] == [5.0, 8.0, 8.0, 12.0, 12.0]
    assert cost.ms(3, cautious=True) == 9.0
    assert cost.paying_rows(8) == 8
    assert cost.paying_rows(5) == 4, "five rows take as long as eight"
