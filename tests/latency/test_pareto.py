"""Quality against milliseconds: which plans are dominated, and what was not measured."""

from __future__ import annotations

import pytest
from engines import SCHEDULE, build
from tiny_networks import Curve

from skipstep import Plan
from skipstep.errors import InputError, PlanError
from skipstep.latency.calibration import Calibration, Latency, RunKind
from skipstep.plans.fit import Quality, with_quality

TIMED = {2: (4.0, 0.5), 3: (6.0, 0.5), 4: (8.0, 0.3), 5: (8.0, 0.2), 6: (9.0, None), 7: (10.0, 0.1)}


@pytest.fixture
def engine():
    with build(Curve(), sample_shape=(1, 4, 4), plans=[]) as engine:
        latencies = {}
        for steps, (ms, rmse) in TIMED.items():
            plan = engine.add_plan(Plan(schedule=SCHEDULE, steps=steps))
            latencies[RunKind(plan.key, 1, False)] = Latency(ms, ms, ms + 1, 100)
            engine.add_plan(with_quality(plan, None if rmse is None else Quality(rmse, 2.0)))
        engine.calibration = Calibration(engine.identity(), latencies)
        yield engine


def test_a_plan_is_dominated_by_one_that_is_no_worse_in_both(engine):
    points = {point.plan.steps: point for point in engine.pareto()}
    assert list(points) == list(TIMED)
    assert {steps for steps, point in points.items() if point.dominated} == {3, 4}
    assert points[6].rmse is None
    assert (points[7].p50_ms, points[7].p99_ms, points[7].rmse) == (10.0, 11.0, 0.1)
    text = str(engine.pareto())
    assert text.count("dominated") == 2
    assert "not measured" in text
    assert "batch 1, without guidance" in text


def test_qualities_at_another_guidance_scale_are_not_compared(engine):
    plan = engine.select_plan(steps=7)
    engine.add_plan(with_quality(plan, Quality(1e-3, 1.0)))
    points = {point.plan.steps: point for point in engine.pareto()}
    assert points[7].rmse is None
    assert {steps for steps, point in points.items() if point.dominated} == {3, 4}


def test_what_was_not_timed_is_refused(engine):
    for options in ({"batch_size": 4}, {"guided": True}, {"batch_size": 0}):
        with pytest.raises(InputError):
            engine.pareto(**options)
    with pytest.raises(InputError, match=r"engine\.calibrate\(batch_sizes=\[4\]\)"):
        engine.pareto(batch_size=4)


@pytest.mark.parametrize("quality", [{"rmse": -1.0, "guidance_scale": 1.0}, {"rmse": 1.0}, 3, {"rmse": float("nan")}])
def test_what_is_no_quality(quality):
    with pytest.raises(PlanError, match="quality"):
        Plan(schedule=SCHEDULE, steps=3, quality=quality)


def test_a_quality_is_no_part_of_the_key_and_belongs_to_the_whole_plan():
    plain = Plan(schedule=SCHEDULE, steps=4)
    plan = Plan(schedule=SCHEDULE, steps=4, quality={"rmse": 0.1, "guidance_scale": 2.0})
    assert plan.key == plain.key
    assert "quality" not in plain.options()
    assert Plan(schedule=SCHEDULE, **plan.options()).quality == Quality(0.1, 2.0)
    assert plan.started_at(2).quality is None
