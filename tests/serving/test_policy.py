"""Which samples an evaluation takes, decided without a network: random arrivals in simulated time."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest

from skipstep.errors import DeadlineError
from skipstep.serving.cost import Cost
from skipstep.serving.policy import Job, Policy

LAUNCHES = Cost((1, 16), (5.0, 8.0), (6.0, 9.0))
ARITHMETIC = Cost((1, 16), (5.0, 80.0), (6.0, 90.0))
KNEE = Cost((1, 4, 16), (5.0, 8.0, 31.0), (6.0, 9.0, 33.0))


def jobs(*deadlines: float, rows: int = 1, evaluations: int = 10) -> list[Job]:
    return [Job(arrival, (rows,) * evaluations, deadline) for arrival, deadline in enumerate(deadlines)]


def test_the_earliest_deadline_goes_first_and_no_deadline_last():
    none, late, soon = jobs(math.inf, 3.0, 2.0)
    assert Policy(2, LAUNCHES).choose([none, late, soon], now=0.0) == [soon, late]


def test_a_deadline_that_cannot_be_met_any_more_has_no_precedence():
    first, missed, soon = jobs(math.inf, 0.04, 2.0)
    assert Policy(16, LAUNCHES).order([first, missed, soon], now=0.0) == [soon, first, missed]


def test_no_request_joins_where_a_larger_batch_gains_nothing():
    waiting = jobs(*[math.inf] * 5)
    assert Policy(16, ARITHMETIC).choose(waiting, now=0.0) == waiting[:1]
    assert Policy(16, KNEE).choose(waiting, now=0.0) == waiting[:4]
    assert Policy(16, LAUNCHES).choose(waiting, now=0.0) == waiting
    assert Policy(3).choose(waiting, now=0.0) == waiting[:3]


def test_a_guided_sample_goes_alone_where_its_two_rows_are_more_than_pays():
    guided = jobs(math.inf, math.inf, rows=2)
    assert Policy(16, ARITHMETIC).choose(guided, now=0.0) == guided[:1]


def test_a_sample_that_would_make_another_late_does_not_join():
    # Ten evaluations in 55 ms: 5 ms each alone, 5.2 ms with a second row, more than 5.5 ms with a fifth.
    waiting = jobs(0.055, *[math.inf] * 9)
    chosen = Policy(16, LAUNCHES).choose(waiting, now=0.0)
    assert chosen == waiting[:3]
    assert LAUNCHES.ms(3) <= 5.5 < LAUNCHES.ms(4)


def test_a_job_that_was_passed_over_too_often_goes_first():
    patient, urgent = jobs(math.inf, 2.0)
    patient.passed = 64
    assert Policy(1, patience=64).choose([patient, urgent], now=0.0) == [patient]


def test_a_deadline_is_refused_that_cannot_be_met_or_would_break_another():
    policy = Policy(1, ARITHMETIC)
    first, new = jobs(0.08, 0.15)
    policy.admit([], [first], now=0.0)
    policy.admit([first], [new], now=0.0)
    with pytest.raises(DeadlineError, match=r"at least 66\.0 ms"):
        policy.admit([], jobs(0.05), now=0.0)
    with pytest.raises(DeadlineError, match="deadlines of accepted requests"):
        policy.admit([first], jobs(0.07), now=0.0)


def test_expected_finish_times_are_those_of_the_simulation():
    rng = np.random.default_rng(5)
    for _ in range(200):
        waiting = [
            Job(n, (int(rng.integers(1, 3)),) * int(rng.integers(1, 9)), math.inf) for n in range(rng.integers(1, 30))
        ]
        policy = Policy(16, KNEE)
        expected = policy.finish_times(waiting, now=0.0)
        done, now = {}, 0.0
        while left := [job for job in waiting if job.remaining]:
            chosen = policy.choose(left, now)
            now += 1e-3 * KNEE.ms(sum(job.width for job in chosen), cautious=True)
            for job in chosen:
                job.stage += 1
                done[job] = now
        # An odd row may stay empty beside guided samples, so the last of a long queue may take a little longer.
        assert all(done[job] <= 1.34 * expected[job] for job in waiting)


@pytest.mark.parametrize("cost", [LAUNCHES, ARITHMETIC, KNEE, None])
@pytest.mark.parametrize("hostile", [False, True])
def test_all_arrivals_end_and_none_starves(cost, hostile):
    """`hostile`: seven of eight have a deadline that only just can be met, so the others are passed over."""
    rng = np.random.default_rng(1)
    policy, most, longest, num_arrivals = Policy(8, cost), 64, 12, 2_000
    true_cost = cost or KNEE
    gap = (
        1e-3 * true_cost.ms(policy.limit) / policy.limit * 9.0
    )  # A little more than can be done: 6.5 evaluations of 1.5 rows.
    arrivals = [(float(at), n) for n, at in enumerate(np.cumsum(rng.exponential(gap, num_arrivals)))]
    heapq.heapify(arrivals)
    present: list[Job] = []
    served, refused, passed, now = 0, 0, 0, 0.0
    while arrivals or present:
        while arrivals and (arrivals[0][0] <= now or not present):
            at, number = heapq.heappop(arrivals)
            now = max(now, at)
            if len(present) == most:
                refused += 1
                continue
            rows = (int(rng.integers(1, 3)),) * int(rng.integers(1, longest + 1))
            patient = cost is None or (number % 8 == 0 if hostile else number % 2 == 0)
            room = 1e-3 * true_cost.ms(policy.limit) * len(rows) * (1.05 if hostile else rng.uniform(2.0, 30.0))
            present.append(Job(number, rows, math.inf if patient else now + room))
        chosen = policy.choose(present, now)
        check_choice(policy, present, chosen, now)
        for job in present:
            job.passed += job not in chosen
        for job in chosen:
            job.stage += 1
        now += 1e-3 * true_cost.ms(sum(job.rows[job.stage - 1] for job in chosen)) * rng.uniform(0.8, 1.5)
        passed = max(passed, *(job.passed for job in present))
        served += sum(not job.remaining for job in present)
        present = [job for job in present if job.remaining]
    assert served + refused == num_arrivals
    assert passed <= policy.most_passed(most, longest)
    assert passed > policy.patience, "the bound was put to the test"


def check_choice(policy: Policy, present: list[Job], chosen: list[Job], now: float) -> None:
    """The rules, each on its own, of what was chosen and what was not."""
    assert len(set(map(id, chosen))) == len(chosen)
    rows = sum(job.width for job in chosen)
    assert chosen
    assert rows <= max(policy.limit, chosen[0].width)
    ms = policy.cost.ms if policy.cost else lambda rows: 0.0

    def left(job: Job) -> float:
        return 1e3 * (job.deadline - now) / job.remaining

    def meets(job: Job) -> bool:
        return job.deadline < math.inf and left(job) >= ms(job.width)

    starving = [job for job in present if job.passed >= policy.patience]
    others = [job for job in present if job not in chosen]
    if starving:
        assert chosen[0] is min(starving, key=lambda job: job.arrival)
    elif any(map(meets, present)):
        assert chosen[0] is min(filter(meets, present), key=lambda job: (job.deadline, job.arrival))
    else:
        assert chosen[0] is min(present, key=lambda job: job.arrival)
    for job in others:
        fits = rows + job.width <= policy.limit
        harms = any(ms(rows) <= left(each) < ms(rows + job.width) for each in chosen)
        assert not fits or harms, "room was left although a job waited that would have made no other late"
        assert not (fits and job in starving)
