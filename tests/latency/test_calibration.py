"""Calibrations: percentiles by their definition, and a file that gives back what was written and takes nothing else."""

from __future__ import annotations

import copy
import json

import pytest
from hostile_json import FUZZ, KEY, at, changed, check_read_or_refused, fuzz, random_changes
from hostile_json import OTHER_KEY as OTHER
from hypothesis import given
from hypothesis import strategies as st
from identities import CPU, GPU

from skipstep import NoiseSchedule, Plan
from skipstep.errors import BundleError, InputError
from skipstep.kernels.autotune import LaunchCase, TunedLaunch
from skipstep.kernels.launch import StepLaunch
from skipstep.latency.calibration import (
    Calibration,
    Latency,
    RunKind,
    describe_latencies,
    matching,
    nearest_rank,
    read_calibrations,
    write_calibrations,
)

LAUNCH = TunedLaunch(LaunchCase(3072, 1, "float16"), StepLaunch(256, 1))


def a_calibration() -> Calibration:
    return Calibration(
        CPU,
        {
            RunKind(KEY, 1, False): Latency(1.0, 2.0, 3.0, 100),
            RunKind(KEY, 1, True): Latency(2.0, 2.0, 2.0, 3),
            RunKind(OTHER, 16, False): Latency(10.5, 20.25, 1e4, 1000),
        },
        (LAUNCH, TunedLaunch(LaunchCase(3072, 8, "float16"), StepLaunch(1024, 4))),
        {4: 2, 32: 2},
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(1, 100))
def test_nearest_rank_is_the_least_value_that_so_many_do_not_exceed(values, percent):
    found = nearest_rank(values, percent)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    assert sum(value < found for value in values) * 100 < percent * len(values)


def test_percentiles_of_a_hundred_calls():
    latency = Latency.of([n / 1e3 for n in range(100, 0, -1)])
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms, latency.count) == (50.0, 90.0, 99.0, 100)
    assert Latency.of([0.001, 0.5] * 49).p99_ms == 500.0  # Of fewer than a hundred, the longest.
    for nothing in ([], [0.0], [float("nan")], [-1.0]):
        with pytest.raises(InputError):
            Latency.of(nothing)


def test_what_was_written_is_read():
    calibrations = (a_calibration(), Calibration(GPU, {}))
    data = write_calibrations(calibrations)
    assert read_calibrations(data) == calibrations
    assert write_calibrations(read_calibrations(data)) == data
    assert Calibration.from_json(a_calibration().to_json()) == a_calibration()
    assert matching(calibrations, GPU) == calibrations[1]
    assert matching(calibrations[:1], GPU) is None


def test_a_newer_schema_is_named():
    with pytest.raises(BundleError, match="schema 2") as caught:
        read_calibrations(b'{"schema": 2, "calibrations": 7}')
    assert "upgrade skipstep" in caught.value.remedy


def test_one_that_is_held_does_not_change():
    latencies = dict(a_calibration().latencies)
    calibration = Calibration(CPU, latencies)
    latencies.clear()
    assert len(calibration.latencies) == 3
    with pytest.raises(TypeError):
        calibration.latencies[RunKind(KEY, 1, False)] = Latency(1, 1, 1, 1)  # type: ignore[index]


def test_newer_latencies_take_the_place_of_older():
    old = a_calibration()
    fresh, launch = Latency(5.0, 5.0, 5.0, 7), TunedLaunch(LAUNCH.case, StepLaunch(512, 2))
    new = old.updated_by(Calibration(CPU, {RunKind(KEY, 1, True): fresh, RunKind(KEY, 2, True): fresh}, (launch,)))
    assert len(new.latencies) == 4
    assert new.latencies[RunKind(KEY, 1, True)] == fresh
    assert new.latencies[RunKind(KEY, 1, False)] == old.latencies[RunKind(KEY, 1, False)]
    assert set(new.launches) == {launch, old.launches[1]}
    assert [kind.plan for kind in new.only([OTHER]).latencies] == [OTHER]
    with pytest.raises(InputError, match="NVIDIA H200 instead of a processor"):
        old.updated_by(Calibration(GPU, {}))


def contents() -> dict:
    return json.loads(write_calibrations([a_calibration()]))


ENTRY = ("calibrations", 0)
LATENCY = (*ENTRY, "latencies", 0)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema",), "1", "schema"),
        ((*ENTRY, "identity"), None, "identity"),
        ((*ENTRY, "identity", "cores"), None, "cores"),
        ((*ENTRY, "identity", "device"), "cuda", "driver"),
        ((*LATENCY, "plan"), "no", "hexadecimal"),
        ((*LATENCY, "batch_size"), 0, "batch_size"),
        ((*LATENCY, "p50_ms"), 0, "p50_ms"),
        ((*LATENCY, "p50_ms"), 1e308, "p50_ms"),
        ((*LATENCY, "p99_ms"), 1.5, "percentiles"),
        ((*LATENCY, "count"), 0, "count"),
        ((*ENTRY, "launches", 0, "num_warps"), 3, "power of two"),
        ((*ENTRY, "launches", 0, "network_dtype"), "int4", "int4"),
        ((*ENTRY, "launches", 0), None, "launch"),
    ],
)
def test_what_is_wrong_is_named(path, value, said):
    with pytest.raises(BundleError, match=said):
        read_calibrations(changed(contents(), path, value))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("calibrations",), "one device"),
        (LATENCY[:-1], "one run"),
        ((*ENTRY, "launches"), "one case"),
        ((*ENTRY, "splits"), "one batch"),
    ],
)
def test_nothing_is_said_twice(path, said):
    twice = contents()
    items = at(twice, path)
    items.append(copy.deepcopy(items[0]))
    with pytest.raises(BundleError, match=said):
        read_calibrations(json.dumps(twice).encode())


def test_the_order_of_launches_says_nothing():
    reversed_launches = contents()
    at(reversed_launches, (*ENTRY, "launches")).reverse()
    assert read_calibrations(json.dumps(reversed_launches).encode()) == (a_calibration(),)


@given(random_changes(contents()))
@fuzz(FUZZ // 3)
def test_any_change_is_read_or_refused(data):
    check_read_or_refused(data, read_calibrations, write_calibrations)


def test_the_table_has_every_run_and_says_what_is_missing():
    plans = [Plan(schedule=NoiseSchedule.linear(1000), steps=steps) for steps in (4, 10, 20)]
    calibration = Calibration(
        CPU,
        {
            RunKind(plans[1].key, 1, False): Latency(1.0, 2.0, 3.25, 100),
            RunKind(plans[0].key, 4, True): Latency(2.0, 2.0, 2.5, 12),
        },
    )
    held = {plan.key: plan for plan in plans}
    lines = describe_latencies(calibration, held)
    assert "a processor, 4 cores, 2 threads" in lines[0]
    assert lines[2].split() == ["4", "ddim", plans[0].key, "4", "yes", "2.00", "2.00", "2.50", "12"]
    assert lines[3].split() == ["10", "ddim", plans[1].key, "1", "no", "1.00", "2.00", "3.25", "100"]
    assert "longest" in lines[4]
    assert "20 steps" in lines[5]
    assert len(lines) == 6
    del held[plans[0].key]
    assert plans[0].key not in "\n".join(describe_latencies(calibration, held))
