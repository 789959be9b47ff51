"""The runner's queues are those of the policy's own select_action; its loop keeps a rate in simulated time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from robotics_cases import STATISTICS
from tiny_policy import STATE, Config, TinyPolicy, random_observations, step_noise

from skipstep.errors import InputError
from skipstep.robotics import LoopReport, PolicyRunner, from_policy

SHAPE = (8, 2)


@pytest.fixture(scope="module")
def policy() -> Any:
    with from_policy(TinyPolicy(), device="cpu", backend="torch") as made:
        yield made


class Clock:
    """Simulated seconds: a call of the clock costs none, sleeping and working do."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def observed(rng: Any) -> Any:
    return random_observations(Config(), rng)


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM"])
def test_twenty_actions_equal_those_of_the_policys_own_queues(scheduler, monkeypatch):
    theirs, rng = TinyPolicy(scheduler, 10), np.random.default_rng(0)
    step_noise(monkeypatch, list(range(7)), 10, SHAPE)
    with from_policy(theirs, device="cpu", backend="torch") as made:
        runner = PolicyRunner(made)
        for call in range(24):
            if call == 13:  # In the middle of a chunk; the runner's seeds count from 0 again.
                theirs.reset()
                runner.reset()
                step_noise(monkeypatch, list(range(3)), 10, SHAPE)
            observation, x_T = observed(rng), rng.standard_normal(SHAPE, np.float32)
            batch = {name: torch.from_numpy(array)[None] for name, array in observation.items()}
            expected = theirs.select_action(batch, torch.from_numpy(x_T)[None])[0].numpy()
            np.testing.assert_allclose(runner.select_action(observation, x_T=x_T), expected, rtol=0, atol=1e-5)
    assert runner.chunks == 4 + 3


def test_the_chunk_depends_on_the_last_observations_alone(policy):
    rng = np.random.default_rng(1)
    observations = [observed(rng) for _ in range(5)]
    runner = PolicyRunner(policy, n_action_steps=4)
    actions = [runner.select_action(each) for each in observations]
    stacked = {name: np.stack([observations[3][name], observations[4][name]])[None] for name in observations[0]}
    np.testing.assert_array_equal(actions[4], policy.predict(stacked, steps=10, seeds=[1])[0, 0])


def test_a_buffer_that_the_caller_fills_again_does_not_change_the_history(policy):
    rng = np.random.default_rng(2)
    observations, buffer = [observed(rng) for _ in range(5)], observed(rng)
    apart, same = PolicyRunner(policy), PolicyRunner(policy)
    for observation in observations:
        for name, array in observation.items():
            buffer[name][:] = array
        np.testing.assert_array_equal(same.select_action(buffer), apart.select_action(observation))


def test_actions_are_in_the_units_of_the_data_set():
    with from_policy(TinyPolicy(), device="cpu", backend="torch", statistics=STATISTICS) as made:
        observation = observed(np.random.default_rng(3))
        observation[STATE][2] = 2.0
        found = PolicyRunner(made).select_action(observation)
        stacked = {name: np.stack([array, array])[None] for name, array in observation.items()}
        np.testing.assert_array_equal(found, made.predict(stacked, steps=10, seeds=[0])[0, 0])
        assert not np.all(np.abs(found) <= 1.0)


def test_a_warm_start_mixes_the_shifted_chunk_before_into_the_noise(policy, monkeypatch):
    rng = np.random.default_rng(4)
    given: list[Any] = []
    sample = type(policy).sample

    def noted(self: Any, observations: Any, **arguments: Any) -> Any:
        chunk = sample(self, observations, **arguments)
        given.append((arguments["x_T"][0].copy(), chunk[0].copy()))
        return chunk

    monkeypatch.setattr(type(policy), "sample", noted)
    cold, warm = PolicyRunner(policy, seed=5), PolicyRunner(policy, seed=5, warm_start=0.36)
    observations = [observed(rng) for _ in range(5)]
    for runner in (cold, warm):
        for each in observations:
            runner.select_action(each)
    (first, chunk), (noise, _), (warm_first, warm_chunk), (mixed, _) = given
    np.testing.assert_array_equal(first, warm_first)
    np.testing.assert_array_equal(chunk, warm_chunk)
    shifted = np.concatenate([chunk[4:], np.repeat(chunk[-1:], 4, axis=0)])
    np.testing.assert_allclose(mixed, 0.6 * shifted + 0.8 * noise, rtol=0, atol=1e-6)
    assert not np.array_equal(mixed, noise)


def test_chunks_that_take_longer_than_the_deadline_are_counted(policy, monkeypatch):
    clock, taken = Clock(), iter([0.010, 0.030, 0.020])
    sample = type(policy).sample

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        clock.now += next(taken)
        return sample(self, *arguments, **options)

    monkeypatch.setattr(type(policy), "sample", slow)
    runner = PolicyRunner(policy, deadline_ms=25.0, clock=clock)
    rng = np.random.default_rng(5)
    for _ in range(12):
        runner.select_action(observed(rng))
    assert (runner.chunks, runner.misses) == (3, 1)


def test_a_fixed_rate_loop_keeps_to_its_grid_and_does_not_catch_up(policy, monkeypatch):
    clock, taken = Clock(), iter([0.004, 0.025, 0.010])
    sample = type(policy).sample

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        clock.now += next(taken)
        return sample(self, *arguments, **options)

    monkeypatch.setattr(type(policy), "sample", slow)
    runner = PolicyRunner(policy, deadline_ms=20.0, clock=clock)
    rng = np.random.default_rng(6)
    ticks, acted = [], []

    def observe() -> Any:
        ticks.append(round((clock.now - 100.0) * 1e3, 6))
        return observed(rng)

    report = runner.run(100.0, observe, acted.append, 9, sleep=clock.sleep)
    # The fifth tick takes 25 ms of a period of 10: it is late, and the two ticks under it are left out. The ninth takes
    # a whole period, which is in time.
    assert ticks == [0, 10, 20, 30, 40, 70, 80, 90, 100]
    assert report == LoopReport(steps=9, late=1, misses=1, worst_ms=pytest.approx(25.0))
    assert len(acted) == 9
    assert acted[0].shape == (2,)


def test_a_loop_at_a_real_rate(policy):
    rng = np.random.default_rng(7)
    report = PolicyRunner(policy).run(200.0, lambda: observed(rng), lambda action: None, 5)
    assert report.steps == 5
    assert report.worst_ms > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_action_steps": 8}, "from 1 to 7"),
        ({"warm_start": 1.0}, "warm_start"),
        ({"deadline_ms": 0.0}, "deadline_ms"),
        ({"seed": -1}, "seed"),
        ({"steps": 11}, "11"),
    ],
)
def test_a_runner_that_cannot_be_is_refused(policy, options, said):
    with pytest.raises((InputError, LookupError), match=said):
        PolicyRunner(policy, **options)


def test_a_failed_call_leaves_the_queues_as_they_were(policy):
    rng = np.random.default_rng(8)
    runner = PolicyRunner(policy)
    good = observed(rng)
    with pytest.raises(InputError):
        runner.select_action({**good, STATE: np.zeros(4, np.float32)})
    with pytest.raises(InputError):
        runner.select_action(good, x_T=np.zeros((8, 3), np.float32))
    np.testing.assert_array_equal(runner.select_action(good), PolicyRunner(policy).select_action(good))


@pytest.mark.parametrize(
    "arguments",
    [
        (0.0, dict, print, 1),
        (float("nan"), dict, print, 1),
        (10.0, None, print, 1),
        (10.0, dict, 3, 1),
        (10.0, dict, print, 0),
    ],
)
def test_a_loop_that_cannot_be_is_refused(policy, arguments):
    with pytest.raises(InputError):
        PolicyRunner(policy).run(*arguments)
