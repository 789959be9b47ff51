"""Measuring latencies: the order and number of calls, and whole calls of real engines."""

from __future__ import annotations

from collections import Counter
from functools import partial

import engines
import numpy as np
import pytest
import torch
from engines import SCHEDULE
from hypothesis import given
from hypothesis import strategies as st
from identities import CPU
from tiny_networks import Curve, Labelled
from torch import Tensor, nn

from skipstep import Plan
from skipstep.errors import InputError, NonFiniteError, PlanNotFoundError
from skipstep.latency.calibration import RunKind
from skipstep.latency.measure import allot, calibrate, spread_calls
from skipstep.loops.stepwise import HostLoop

KINDS = [RunKind(f"{n:016x}", 1, False) for n in range(8)]


@given(
    st.dictionaries(st.sampled_from(KINDS), st.floats(1e-4, 100), min_size=1),
    st.integers(3, 200),
    st.floats(0.01, 1e4),
)
def test_calls_are_allotted_within_the_time(seconds, repeats, max_seconds):
    counts = allot(seconds, repeats=repeats, max_seconds=max_seconds)
    assert counts.keys() == seconds.keys()
    assert all(3 <= count <= repeats for count in counts.values())
    assert sum(counts[kind] * each for kind, each in seconds.items() if counts[kind] > 3) <= max_seconds * (1 + 1e-9)
    for quick in seconds:
        for slow in seconds:
            # What rounding down leaves of a share may give those after it a few calls more.
            assert seconds[quick] >= seconds[slow] or counts[quick] + 3 >= counts[slow]
    # Nothing is left unused while somebody is short of calls.
    if sum(seconds.values()) * repeats <= max_seconds:
        assert set(counts.values()) == {repeats}


@given(st.dictionaries(st.sampled_from(KINDS), st.integers(3, 40), min_size=1))
def test_turns_spread_every_kind_evenly(counts):
    turns = spread_calls(counts)
    assert Counter(turns) == Counter(counts)
    for part in range(1, 4):
        so_far = Counter(turns[: len(turns) * part // 4])
        for kind, count in counts.items():
            assert abs(so_far[kind] - count * part / 4) <= 2


class Clocked(nn.Module):
    """Takes two milliseconds an evaluation and sample, on a clock of its own."""

    now = 0.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.now += 0.002 * len(x)
        return 0.1 * x

    def clock(self) -> float:
        return self.now


build = partial(engines.build, plans=[2, 5], sample_shape=(1, 4, 4))


def test_latencies_are_those_of_whole_calls():
    network, done = Clocked(), []
    engine = build(network)
    calibration = calibrate(engine, CPU, repeats=5, progress=lambda *where: done.append(where), clock=network.clock)
    assert done == [(n, 20) for n in range(1, 21)]
    assert calibration.identity == CPU
    plans = {plan.key: plan for plan in engine.plans.values()}
    assert {(plans[kind.plan].steps, kind.batch_size) for kind in calibration.latencies} == {
        (2, 1),
        (2, 4),
        (5, 1),
        (5, 4),
    }
    for kind, latency in calibration.latencies.items():
        assert not kind.guided
        assert latency.count == 5
        expected = pytest.approx(2.0 * plans[kind.plan].steps * kind.batch_size)
        assert latency.p50_ms == latency.p99_ms == expected


def test_guided_and_unguided_calls_are_measured_where_the_network_can():
    engine = build(Labelled(), num_classes=10, null_label=10)
    calibration = calibrate(engine, CPU, repeats=3)
    assert Counter(kind.guided for kind in calibration.latencies) == {False: 4, True: 4}
    unguidable = build(Labelled(), num_classes=10)
    assert {kind.guided for kind in calibrate(unguidable, CPU, repeats=3).latencies} == {False}


class Prompted(nn.Module):
    """Notes the prompts that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bytes] = set()

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        self.seen |= {each.numpy().tobytes() for each in encoder_hidden_states}
        return 0.1 * x + encoder_hidden_states.mean()


def test_prompts_are_random_and_differ_within_a_batch():
    network = Prompted()
    engine = build(network, prompt_shape=(3, 2), batch_sizes=[4], plans=[2])
    network.seen.clear()
    calibration = calibrate(engine, CPU, repeats=3)
    assert sorted(kind.guided for kind in calibration.latencies) == [False, True]
    assert len(network.seen) == 8  # Four prompts, four negative ones.


def test_plans_and_sizes_can_be_chosen():
    engine = build(Curve())
    (other,) = (plan for plan in engine.plans.values() if plan.steps == 5)
    (kind,) = calibrate(engine, CPU, repeats=3, plans=[2], batch_sizes=[4]).latencies
    assert (engine.plans[kind.plan].steps, kind.batch_size) == (2, 4)
    (kind,) = calibrate(engine, CPU, repeats=3, plans=[other], batch_sizes=[1]).latencies
    assert (kind.plan, kind.batch_size) == (other.key, 1)
    with pytest.raises(PlanNotFoundError):
        calibrate(engine, CPU, plans=[7])


def test_a_way_back_to_noise_is_not_measured_unasked():
    engine = build(Curve())
    engine.add_plan(next(iter(engine.plans.values())).inverted())
    assert len({kind.plan for kind in calibrate(engine, CPU, repeats=3).latencies}) == 2


def test_time_that_is_short_is_shared():
    """Calls of 4, 10, 16 and 40 ms: each kind has an equal share of the time that the quicker kinds leave."""
    network = Clocked()
    calibration = calibrate(build(network), CPU, repeats=20, max_seconds=0.51, clock=network.clock)
    assert sorted(latency.count for latency in calibration.latencies.values()) == [3, 9, 14, 20]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repeats": 2}, "repeats=2"),
        ({"repeats": True}, "repeats=True"),
        ({"repeats": 10.0}, "repeats"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"batch_sizes": [5]}, "batch_sizes=5"),
        ({"batch_sizes": [0]}, "batch_sizes=0"),
        ({"batch_sizes": []}, "no batch sizes"),
        ({"plans": []}, "no plans"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        calibrate(build(Curve()), CPU, **options)


def test_a_loop_of_fixed_batch_sizes_is_measured_at_these_alone(monkeypatch):
    monkeypatch.setattr(HostLoop, "any_batch", False)
    with pytest.raises(InputError, match="batch_sizes=3"):
        calibrate(build(Curve()), CPU, batch_sizes=[3])


class Broken(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, np.nan)


def test_a_network_that_breaks_is_reported():
    with pytest.raises(NonFiniteError):
        calibrate(build(Broken()), CPU)


def test_an_engine_of_any_batch_size_is_measured_at_each():
    engine = build(Curve(), backend="onnxruntime", batch_sizes=[4], plans=[Plan(schedule=SCHEDULE, steps=2)])
    assert calibrate(engine, CPU, repeats=3, batch_sizes=[1, 3]).batch_sizes == (1, 3)
    with pytest.raises(InputError, match="batch_sizes=5"):
        calibrate(engine, CPU, batch_sizes=[5])
