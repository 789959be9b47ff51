"""The samples under way, in simulated time: random requests on a real engine, one thread, no waiting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from serving_cases import random_request, serving_engine

from skipstep.calls.request import resolve_request
from skipstep.plans.stages import Stages
from skipstep.serving.cost import Cost
from skipstep.serving.flight import Call, Flight, Member
from skipstep.serving.policy import Policy

COST = Cost((1, 4, 16), (5.0, 8.0, 31.0), (6.0, 9.0, 33.0))
MOST = 48


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def member(engine: Any, mix: Any, arrival: int, arguments: dict[str, Any], deadline: float) -> Member:
    stages = Stages.of([arguments["plan"]])
    conditions = {name: value for name, value in arguments.items() if name != "plan"}
    request = resolve_request(engine.network, x_T=None, adds_noise=stages.adds_noise, **conditions)
    call = Call(1, engine, ends_step=stages.ends_step)
    sample = mix.sample(stages, request)
    return Member(arrival, sample.rows, deadline, call=call, index=0, sample=sample)


def images_alone(engine: Any, requests: list[dict[str, Any]]) -> list[Any]:
    """What engine.sample draws for each: many in one call where they can share it, for elementwise networks have the
    same bits in any batch."""
    groups: dict[Any, list[int]] = {}
    for place, each in enumerate(requests):
        groups.setdefault((each["plan"].key, "guidance_scale" in each), []).append(place)
    images: list[Any] = [None] * len(requests)
    for (_, guided), places in groups.items():
        members = [requests[place] for place in places]
        conditions: dict[str, Any] = {name: [each[name][0] for each in members] for name in ("seeds", "class_labels")}
        if guided:
            conditions["guidance_scale"] = [each["guidance_scale"] for each in members]
            conditions["guidance_rescale"] = [each.get("guidance_rescale", 0.0) for each in members]
        drawn = engine.sample(plan=members[0]["plan"], **conditions)
        for place, image in zip(places, drawn, strict=True):
            images[place] = image[None]
    return images


@pytest.mark.parametrize("num_arrivals", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_request_gets_the_image_it_would_have_alone_and_none_starves(num_arrivals):
    rng, clock = np.random.default_rng(3), Clock()
    with serving_engine() as engine:
        mix = engine.runner.loop.mix([], 16)
        flight = Flight(Policy(16, COST), mix, clock)
        requests: list[dict[str, Any]] = []
        members: list[Member] = []
        cancelled: set[int] = set()
        # The mean request has 3.6 evaluations of 1.5 rows: a little more arrives than can be served.
        arrivals = iter(np.cumsum(rng.exponential(5e-3 * COST.ms(4) / 4, num_arrivals)).tolist())
        next_arrival, refused = next(arrivals), 0
        while next_arrival < math.inf or flight.members:
            while next_arrival <= clock.now or (not flight.members and next_arrival < math.inf):
                clock.now = max(clock.now, next_arrival)
                next_arrival = next(arrivals, math.inf)
                if len(flight.members) == MOST:
                    refused += 1
                    continue
                request = random_request(engine, rng)
                deadline = clock.now + float(rng.uniform(0.03, 1.0)) if rng.random() < 0.6 else math.inf
                requests.append(request)
                members.append(member(engine, mix, len(members), request, deadline))
                flight.members.append(members[-1])
            if rng.random() < 0.02:
                chosen = flight.members[rng.integers(len(flight.members))]
                if chosen.call.future.cancel():
                    cancelled.add(chosen.arrival)
            rows = flight.rows
            flight.turn()
            clock.now += 1e-3 * COST.ms(max(1, flight.rows - rows)) * float(rng.uniform(0.8, 1.4))

        alone = images_alone(engine, requests)
        assert len(members) + refused == num_arrivals
        assert len(cancelled) > num_arrivals / 100
        for place, each in enumerate(members):
            assert each.call.future.done()
            assert each.call.future.cancelled() == (place in cancelled)
            if place not in cancelled:
                np.testing.assert_array_equal(each.call.future.result(), alone[place])
                assert not each.remaining
        served = sum(sum(each.rows[: each.stage]) for each in members)
        assert flight.rows == served, "every row that was evaluated was a sample's"
        assert flight.rows / flight.evaluations > 2.0
        longest = max(len(each.rows) for each in members)
        passed = max(each.passed for each in members)
        assert flight.policy.patience < passed <= flight.policy.most_passed(MOST, longest)
