"""What comes from outside becomes the arguments of a call, or an error before anything is allocated."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from skipstep.errors import DeadlineError, InputError, PlanNotFoundError, SkipstepError
from skipstep.serving.requests import Limits, call_arguments, draw_rows


def test_a_request_is_a_call(engine):
    plan = next(each for each in engine.plans.values() if each.steps == 5)
    for which in ({"steps": 5}, {"plan": plan.key}):
        arguments = call_arguments(engine, {"seeds": [1, 2], "class_labels": [0, 1], "guidance_scale": 2.0, **which})
        drawn = engine.sample(**arguments)
        np.testing.assert_array_equal(
            drawn, engine.sample(plan=plan, seeds=[1, 2], class_labels=[0, 1], guidance_scale=2.0)
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seeds": [1], "steps": 5, "x_T": [0.0]}, "'x_T' in a request"),
        ({"seeds": [1], "steps": 5, "negative_mask": 0}, "'negative_mask' in a request"),
        ({"seeds": [1]}, "neither steps nor plan"),
        ({"seeds": [1], "steps": 77}, "which no plan"),
        ({"seeds": [1], "plan": "none"}, "plan='none'"),
        ({"seeds": [1], "plan": ["x"]}, "plan="),
        ({"seeds": [1], "plan": "none", "steps": 5}, "beside steps=5"),
        ({"seeds": [1], "deadline_ms": 5.0}, "not calibrated"),
        ({"seeds": [1], "deadline_ms": 5.0, "guidance_scale": [[1], 2]}, "not calibrated"),
        ({"seeds": [], "deadline_ms": 5.0}, "num_samples=0"),
        ({"seeds": list(range(9)), "steps": 5}, "9 samples"),
        ({"seeds": np.arange(9), "steps": 5}, "9 samples"),
        ({"seeds": list(range(8)), "steps": 5}, "1536 bytes of samples"),
        ({"seeds": [1], "steps": 6}, "6 network evaluations"),
    ],
)
def test_what_is_wrong_or_too_much_is_refused(engine, fields, words):
    limits = Limits(samples=8, evaluations=5, bytes=511)
    with pytest.raises((InputError, PlanNotFoundError), match=words):
        call_arguments(engine, fields, limits)


@pytest.mark.parametrize("seeds", [[[1], 2], [[1, 2]], [], "1", None, [True], [1.5], {}])
def test_seeds_of_any_form_are_a_result_or_an_error(engine, seeds):
    with pytest.raises(InputError):
        engine.sample(**call_arguments(engine, {"seeds": seeds, "steps": 1}, Limits()))


def test_a_deadline_chooses_the_plan(engine):
    engine.calibrate(repeats=3, max_seconds=1.0, batch_sizes=[1, 2])
    try:
        found = call_arguments(engine, {"seeds": [1], "deadline_ms": 60_000.0})
        assert found["plan"] in engine.plans.values()
        assert found["deadline_ms"] == 60_000.0
        with pytest.raises(DeadlineError):
            call_arguments(engine, {"seeds": [1], "deadline_ms": 1e-6})
    finally:
        engine.calibration = None


def test_rows_of_different_plans_are_drawn_in_one_table(engine):
    steps = np.array([5, 1, 5, 1])
    columns = {
        "seeds": np.arange(4),
        "steps": steps,
        "class_labels": np.arange(4) % 3,
        "guidance_scale": np.full(4, 2.0),
    }
    drawn = draw_rows(engine, columns)
    for n in range(4):
        alone = engine.sample(steps=int(steps[n]), seeds=n, class_labels=n % 3, guidance_scale=2.0)
        np.testing.assert_array_equal(drawn[n], alone[0])
    with pytest.raises(InputError, match="rows of seeds"):
        draw_rows(engine, {"seeds": np.arange(4)})


@pytest.mark.parametrize("kind", SkipstepError.__subclasses__())
def test_an_error_of_a_worker_arrives_as_what_it_was(kind):
    error = pickle.loads(pickle.dumps(kind(got="a", expected="b", remedy="c")))
    assert type(error) is kind
    assert (error.got, error.expected, error.remedy) == ("a", "b", "c")
    assert str(error) == "got a; expected b. Remedy: c."
