"""Measuring whole calls: `sampler.sample` from arguments to NumPy samples, with all work finished.

The calls of each kind (plan, batch size, guidance) are spread evenly over the whole measurement, so that a slow period
of the machine does not affect one kind alone. Where time is short, the kinds that take longest are called less often;
the number of calls is kept beside every percentile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from skipstep.calls.condition_rows import random_rows
from skipstep.calls.request import Conditions
from skipstep.errors import InputError, check_callable, check_integer, check_items, check_number
from skipstep.latency.calibration import Calibration, Latency, RunKind
from skipstep.latency.identity import DeviceIdentity
from skipstep.networks.spec import MAX_BATCH_SIZE
from skipstep.plans.plan import Plan
from skipstep.plans.solvers import SOLVERS
from skipstep.reporting import LOGGER

if TYPE_CHECKING:
    from skipstep.loops.contract import Sampler

# From 100 calls on, p99 is less than the longest of them.
REPEATS = 100
MAX_SECONDS = 120.0
# The fewest calls of a kind, however short the time.
_FEWEST_CALLS = 3
_GUIDANCE = 2.0
# Of each way to divide a batch, at most.
_SPLIT_TURNS = 5

Progress = Callable[[int, int], None]


def calibrate(
    sampler: Sampler,
    identity: DeviceIdentity,
    *,
    repeats: int = REPEATS,
    max_seconds: float = MAX_SECONDS,
    plans: Iterable[int | Plan] | None = None,
    batch_sizes: Iterable[int] | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Latencies of whole calls on this device, unguided, and guided where the network can be.

    identity      of this device with this sampler (skipstep.latency.identity.device_identity).
    repeats       calls of each kind, after two that do not count. With fewer than 100, p99 is the longest of them.
    max_seconds   about how long it may take; beyond it kinds are called less often, but three times at least.
    plans         of the sampler, or their step counts; None: all that lead from noise to images.
    batch_sizes   None: the sampler's own. One that takes any size can be measured at each, up to its largest.
    progress      called as progress(done, total), in calls.
    clock         in seconds.

    Labels and seeds differ within a batch, and so do the prompts, which are random numbers: no work is shared between
    samples. Raises InputError, and what `sample` raises.
    """
    remedy = "pass 100 for a useful p99"
    repeats = check_integer("repeats", repeats, low=_FEWEST_CALLS, high=1_000_000, remedy=remedy)
    check_callable("progress", progress, "done, total")
    max_seconds = check_number("max_seconds", max_seconds, low=0.0, above=True, remedy="pass seconds, such as 60.0")
    chosen = _chosen_plans(sampler, plans)
    sizes = _chosen_sizes(sampler, batch_sizes)
    guided = (False, True) if sampler.network.can_guide else (False,)
    calls = {
        RunKind(plan.key, size, guides): _call(sampler, plan, size, guided=guides)
        for size in sizes
        for plan in chosen
        for guides in guided
    }
    splits = choose_splits(sampler, calls, clock=clock, max_seconds=max_seconds / 4)
    LOGGER.info("warm-up, two calls of each of %d kinds", len(calls))
    expected = {}
    for kind, call in calls.items():
        call()  # Compiles and captures; the second call is representative.
        expected[kind] = _seconds(call, clock)
    order = spread_calls(allot(expected, repeats=repeats, max_seconds=max_seconds))
    LOGGER.info("measure %d calls", len(order))
    seconds: dict[RunKind, list[float]] = {kind: [] for kind in calls}
    for done, kind in enumerate(order, 1):
        seconds[kind].append(_seconds(calls[kind], clock))
        if progress is not None:
            progress(done, len(order))
    return Calibration(identity, {kind: Latency.of(each) for kind, each in seconds.items()}, splits=splits)


def choose_splits(
    sampler: Sampler, calls: Mapping[RunKind, Callable[[], Any]], *, clock: Callable[[], float], max_seconds: float
) -> dict[int, int]:
    """Into how many parts batches are best divided, by the network's rows; they are divided so from now on. Empty where
    they cannot be. Of each number of rows the plan with the fewest evaluations is called, forms taking turns."""
    splits = sampler.runner.loop.splits
    if splits is None:
        return {}
    shortest: dict[int, RunKind] = {}
    for kind in sorted(calls, key=lambda kind: sampler.plans[kind.plan].num_evaluations):
        shortest.setdefault(kind.batch_size * (2 if kind.guided else 1), kind)
    cases = {rows: kind for rows, kind in sorted(shortest.items()) if len(splits.choices(rows)) > 1}
    for rows, kind in cases.items():
        seconds: dict[int, list[float]] = {parts: [] for parts in splits.choices(rows)}
        end = clock() + max_seconds / len(cases)
        for turn in range(_SPLIT_TURNS):
            for parts, measured in seconds.items():
                splits.measured[rows] = parts
                calls[kind]()  # Not counted: a session may be loaded, and the other form's threads still spin.
                measured += [_seconds(calls[kind], clock) for _ in range(_FEWEST_CALLS)]
            if turn and clock() > end:
                break
        splits.measured[rows] = min(seconds, key=lambda parts: statistics.median(seconds[parts]))
        LOGGER.info("%d rows are evaluated in parts: %d", rows, splits.measured[rows])
    return {rows: splits.measured[rows] for rows in cases}


def allot(seconds: Mapping[RunKind, float], *, repeats: int, max_seconds: float) -> dict[RunKind, int]:
    """How often to call each kind, given the seconds of a call: `repeats` times where that fits into `max_seconds`.

    Where it does not, each has an equal share of the time; what a quick kind leaves of its share goes to the others.
    """
    counts = {}
    left = max_seconds
    for done, (kind, each) in enumerate(sorted(seconds.items(), key=lambda item: item[1])):
        share = max(0.0, left) / (len(seconds) - done)
        counts[kind] = min(repeats, max(_FEWEST_CALLS, int(share / each)))
        left -= counts[kind] * each
    return counts


def spread_calls(counts: Mapping[RunKind, int]) -> list[RunKind]:
    """Each kind that often, in an order that spreads the calls of every kind evenly from beginning to end."""
    places = [((n + 0.5) / count, i, kind) for i, (kind, count) in enumerate(counts.items()) for n in range(count)]
    return [kind for _, _, kind in sorted(places)]


def _chosen_plans(sampler: Sampler, plans: Iterable[int | Plan] | None) -> list[Plan]:
    if plans is None:
        chosen = [plan for plan in sampler.plans.values() if not SOLVERS[plan.solver].upward]
    else:
        given = check_items("plans", plans, expected="step counts or Plans", remedy="leave plans out for all")
        chosen = [
            sampler.select_plan(plan=each) if isinstance(each, Plan) else sampler.select_plan(steps=each)
            for each in given
        ]
    if not chosen:
        raise InputError(got="no plans", expected="at least one", remedy="call engine.add_plan(20) first")
    return chosen


def _chosen_sizes(sampler: Sampler, batch_sizes: Iterable[int] | None) -> list[int]:
    remedy = "leave batch_sizes out, or build the engine with them"
    asked = sampler.batch_sizes if batch_sizes is None else batch_sizes
    given = check_items("batch_sizes", asked, expected="integers", remedy=remedy)
    sizes = sorted({check_integer("batch_sizes", size, low=1, high=MAX_BATCH_SIZE) for size in given})
    for size in sizes:
        if sampler.split(size) != [size]:
            raise InputError(
                got=f"batch_sizes={size}",
                expected=f"one that a single run draws; this engine was made for {list(sampler.batch_sizes)}",
                remedy=remedy,
            )
    if not sizes:
        raise InputError(got="no batch sizes", expected="at least one", remedy="leave batch_sizes out")
    return sizes


def _call(sampler: Sampler, plan: Plan, size: int, *, guided: bool) -> Callable[[], Any]:
    network, seeds = sampler.network, range(size)
    conditions: Conditions = {}
    if network.num_classes is not None:
        conditions["class_labels"] = [seed % network.num_classes for seed in seeds]
    rng = np.random.default_rng(0)
    passed = network.passed_conditions
    conditions["conditions"] = {name: random_rows(each, size, rng) for name, each in passed.items()}
    if guided:
        given = {name: random_rows(each, size, rng) for name, each in passed.items() if each.null == "given"}
        conditions["negative_conditions"] = given
        conditions["guidance_scale"] = _GUIDANCE
    return lambda: sampler.sample(plan=plan, seeds=seeds, **conditions)


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    call()
    return clock() - started
