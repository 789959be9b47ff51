"""Tuning: when measurements may overrule the rule, and what is stored of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import random

import pytest
import torch

from skipstep.errors import BundleError, InputError
from skipstep.kernels.autotune import (
    LaunchCase,
    TunedLaunch,
    candidates,
    step_to_measure,
    tune_launch,
    tune_on_device,
)
from skipstep.kernels.launch import StepLaunch, choose_launch
from skipstep.kernels.layout import StepFlags

CASE = LaunchCase(num_elements=3072, batch_size=8, network_dtype="float16")
H200 = {"num_multiprocessors": 132, "compute_capability": 90}
LAUNCHES = candidates(CASE, **H200)
BEST = LAUNCHES[3]


class Device:
    """A fake at the clock: seconds by launch, off by up to `noise` each way, and slower by half in every third turn."""

    def __init__(self, seconds: dict[StepLaunch, float], *, noise: float = 0.0, seed: int = 0) -> None:
        self.seconds, self.noise, self.random = seconds, noise, random.Random(seed)
        self.calls = itertools.count()

    def __call__(self, launch: StepLaunch) -> float:
        turn = (next(self.calls) - len(LAUNCHES)) // (len(LAUNCHES) + 1)
        slow = 1.5 if turn % 3 == 0 else 1.0
        return self.seconds.get(launch, 1e-5) * slow * (1 + self.random.uniform(-self.noise, self.noise))


def test_candidates_begin_with_the_rule_and_have_wide_accesses():
    assert LAUNCHES[0] == choose_launch(num_elements=3072, batch_size=8, **H200, network_item_size=2)
    assert len(set(LAUNCHES)) == len(LAUNCHES) >= 8
    assert all(each.elements_per_thread in (8, 16) for each in LAUNCHES)
    single = candidates(LaunchCase(3072, 8, "float32"), **H200)
    assert {each.elements_per_thread for each in single} == {4, 8, 16}


@pytest.mark.parametrize("seed", range(10))
def test_a_launch_that_is_better_wins_on_a_noisy_device(seed):
    tuned = tune_launch(Device({BEST: 0.8e-5}, noise=0.05, seed=seed), LAUNCHES, case=CASE)
    assert tuned == TunedLaunch(CASE, BEST)
    assert tuned.gain == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_changes_nothing(seed):
    tuned = tune_launch(Device({}, noise=0.2, seed=seed), LAUNCHES, case=CASE)
    assert tuned == TunedLaunch(CASE, LAUNCHES[0])
    assert tuned.gain == 0


def test_nor_does_a_gain_that_nobody_would_notice():
    assert tune_launch(Device({BEST: 0.985e-5}), LAUNCHES, case=CASE).launch == LAUNCHES[0]
    assert tune_launch(Device({BEST: 0.97e-5}), LAUNCHES, case=CASE).launch == BEST


def test_the_first_call_of_each_launch_does_not_count():
    seen: set[StepLaunch] = set()

    def measure(launch: StepLaunch) -> float:
        first = launch not in seen
        seen.add(launch)
        return 10.0 if first else 0.5e-5 if launch == BEST else 1e-5

    assert tune_launch(measure, LAUNCHES, case=CASE, repeats=5).gain == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("launches", "repeats", "seconds", "message"),
    [
        ((), 20, 1.0, "0 launches"),
        (LAUNCHES, 4, 1.0, "4 repeats"),
        (LAUNCHES, 20, float("nan"), "nan seconds"),
        (LAUNCHES, 20, 0.0, "0.0 seconds"),
    ],
)
def test_what_cannot_be_tuned_is_refused(launches, repeats, seconds, message):
    with pytest.raises(InputError, match=message):
        tune_launch(lambda launch: seconds, launches, case=CASE, repeats=repeats)


@pytest.mark.parametrize("case", [(0, 1, "float16"), (1, 0, "float16"), (1, True, "float16"), (1, 1, "float64")])
def test_cases_that_cannot_be_are_refused(case):
    with pytest.raises(InputError):
        LaunchCase(*case)


STORED = {"num_elements": 3072, "batch_size": 8, "network_dtype": "float16", "block_size": 512, "num_warps": 2}


def test_a_tuned_launch_survives_storage():
    tuned = TunedLaunch(CASE, StepLaunch(512, 2), gain=0.1)
    assert tuned.to_json() == STORED
    assert TunedLaunch.from_json(json.loads(json.dumps(tuned.to_json()))) == tuned


@pytest.mark.parametrize(
    "change", [{"gain": 0.1}, {"num_elements": 0}, {"batch_size": 8.0}, {"network_dtype": "int4"}, {"block_size": 500}]
)
def test_a_damaged_one_is_refused(change):
    with pytest.raises(BundleError):
        TunedLaunch.from_json(STORED | change)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_step_that_is_measured_can_be_repeated(dtype, kernel_device, monkeypatch):
    """Everything at once, many times over: its state stays finite, so that every repeat costs the same."""
    from skipstep.kernels import step

    states: list[torch.Tensor] = []
    launch_step = step.ddim_step

    def remember(**operands):
        launch_step(**operands)
        states.append(operands["state"].cpu().clone())

    monkeypatch.setattr(step, "ddim_step", remember)
    flags = StepFlags(clip=True, rederive_eps=True, add_noise=True, guided=True, read_h2=True, write_h0=True)
    run = step_to_measure(LaunchCase(40, 2, dtype), flags, kernel_device)
    for _ in range(5):
        run(StepLaunch(256, 1))
    assert len(states) == 5
    assert states[-1].isfinite().all()
    run = step_to_measure(LaunchCase(40, 2, dtype), StepFlags(), kernel_device)
    for _ in range(5):
        run(StepLaunch(256, 1))
    assert not torch.equal(states[5], states[6])
    assert states[-1].max() <= 1


@pytest.mark.gpu
def test_a_device_is_tuned():
    tuned = tune_on_device(CASE, StepFlags(add_noise=True), device="cuda:0", lock=contextlib.nullcontext(), repeats=5)
    assert tuned.case == CASE
    assert 0 <= tuned.gain < 1
