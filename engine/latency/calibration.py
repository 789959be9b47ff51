"""How long whole calls take on one device: the latencies by which `deadline_ms=` picks a plan, kept with the engine.

    p-th percentile of n sorted times = the ceil(p·n/100)-th of them     (nearest rank: a time that was measured)

A bundle holds one calibration for each device that it was measured on (skipstep.latency.identity says what must be the
same). They are measured by skipstep.latency.measure and stored by skipstep.export.bundle_rewriter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

from skipstep.errors import InputError
from skipstep.kernels.autotune import TunedLaunch
from skipstep.latency.identity import DeviceIdentity
from skipstep.latency.table import format_table
from skipstep.storage.untrusted import (
    Key,
    ReadBy,
    Within,
    malformed,
    parse_json,
    read_dataclass,
    read_schema,
    read_value,
)

if TYPE_CHECKING:
    from skipstep.plans.plan import Plan

SCHEMA: Final = 1
FILE_NAME: Final = "calibration.json"

_MAX_MS = 1e9
Milliseconds = Annotated[float, Within(math.ulp(0.0), _MAX_MS)]
_MAX_BATCH = 1 << 20
# Of one bundle; the entries that were added last stay.
_MAX_DEVICES = 64


class RunKind(NamedTuple):
    """What a run's latency depends on: the plan's key, how many samples it draws at once, and whether it guides."""

    plan: str
    batch_size: int
    guided: bool


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of `count` whole calls of one run. With at most 99 calls p99 is the longest of them."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    count: int

    def __post_init__(self) -> None:
        times = (self.p50_ms, self.p90_ms, self.p99_ms)
        if not 0.0 < self.p50_ms <= self.p90_ms <= self.p99_ms <= _MAX_MS or self.count < 1:
            raise InputError(
                got=f"percentiles {times} ms of {self.count} calls",
                expected="positive times that do not fall, of at least one call",
                remedy="measure again with engine.calibrate()",
            )

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        p50, p90, p99 = (1e3 * nearest_rank(seconds, percent) for percent in (50, 90, 99))
        return cls(p50, p90, p99, len(seconds))


def nearest_rank(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that at least `percent` % of them, 1 to 100, do not exceed. Raises InputError."""
    if not values or not 1 <= percent <= 100:
        raise InputError(
            got=f"percentile {percent} of {len(values)} values",
            expected="a percentile from 1 to 100 of at least one value",
            remedy="measure at least once",
        )
    return sorted(values)[-(-percent * len(values) // 100) - 1]


@dataclass(frozen=True, slots=True)
class _StoredLatency:
    """One entry of `latencies` in the file."""

    plan: Key
    batch_size: Annotated[int, Within(1, _MAX_BATCH)]
    guided: bool
    p50_ms: Milliseconds
    p90_ms: Milliseconds
    p99_ms: Milliseconds
    count: Annotated[int, Within(1)]


def _read_latencies(value: Any, where: str) -> dict[RunKind, Latency]:
    stored: tuple[_StoredLatency, ...] = read_value(tuple[_StoredLatency, ...], value, where)
    latencies = {
        RunKind(each.plan, each.batch_size, each.guided): Latency(each.p50_ms, each.p90_ms, each.p99_ms, each.count)
        for each in stored
    }
    if len(latencies) != len(stored):
        raise malformed(where, "two latencies of one run")
    return latencies


@dataclass(frozen=True, slots=True)
class _StoredSplit:
    """One entry of `splits` in the file."""

    rows: Annotated[int, Within(1, 2 * _MAX_BATCH)]
    parts: Annotated[int, Within(1, _MAX_BATCH)]


def _read_splits(value: Any, where: str) -> dict[int, int]:
    stored: tuple[_StoredSplit, ...] = read_value(tuple[_StoredSplit, ...], value, where)
    splits = {each.rows: each.parts for each in stored}
    if len(splits) != len(stored):
        raise malformed(where, "two divisions of one batch")
    return splits


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on one device: the latency of each kind of run, launches of the step that were tuned there, and
    into how many parts the processor's cores divide a batch, by the network's rows (skipstep.backends.processor).

    Raises InputError for a batch size out of range, and for two launches of one case.
    """

    identity: DeviceIdentity
    latencies: Annotated[Mapping[RunKind, Latency], ReadBy(_read_latencies)]
    launches: tuple[Annotated[TunedLaunch, ReadBy(TunedLaunch.from_json)], ...] = field(default=())
    splits: Annotated[Mapping[int, int], ReadBy(_read_splits)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in self.latencies:
            if not 1 <= kind.batch_size <= _MAX_BATCH:
                raise InputError(
                    got=f"a latency of batch size {kind.batch_size}",
                    expected="at least 1",
                    remedy="measure again with engine.calibrate()",
                )
        if len({each.case for each in self.launches}) != len(self.launches):
            raise InputError(
                got=f"{len(self.launches)} launches, of which two are for one case",
                expected="one launch a case",
                remedy="tune the launches again on this device",
            )
        object.__setattr__(self, "launches", tuple(sorted(self.launches, key=lambda each: astuple(each.case))))
        for name in ("latencies", "splits"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({kind.batch_size for kind in self.latencies}))

    def updated_by(self, newer: Calibration) -> Calibration:
        """Both merged; where both measured, the newer counts. Raises InputError for another device's."""
        if newer.identity != self.identity:
            raise InputError(
                got=f"calibrations of two devices: {', '.join(newer.identity.differences(self.identity))}",
                expected="two of the same",
                remedy="keep them apart, or calibrate again",
            )
        launches = {each.case: each for each in (*self.launches, *newer.launches)}
        latencies, splits = {**self.latencies, **newer.latencies}, {**self.splits, **newer.splits}
        return Calibration(self.identity, latencies, tuple(launches.values()), splits)

    def only(self, plans: Iterable[str]) -> Calibration:
        """The part about the plans with these keys."""
        kept = set(plans)
        return replace(self, latencies={kind: each for kind, each in self.latencies.items() if kind.plan in kept})

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the same calibration always gives the same."""
        return {
            "identity": self.identity.to_json(),
            "latencies": [{**kind._asdict(), **asdict(each)} for kind, each in sorted(self.latencies.items())],
            "launches": [each.to_json() for each in self.launches],
            "splits": [{"rows": rows, "parts": parts} for rows, parts in sorted(self.splits.items())],
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "calibration") -> Calibration:
        """What `to_json` gave. Raises BundleError for anything else."""
        return read_dataclass(cls, value, where)


def write_calibrations(calibrations: Iterable[Calibration]) -> bytes:
    """The file of a bundle that holds these."""
    kept = list(calibrations)[-_MAX_DEVICES:]
    contents = {"schema": SCHEMA, "calibrations": [each.to_json() for each in kept]}
    return (json.dumps(contents, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_calibrations(data: bytes) -> tuple[Calibration, ...]:
    """What `write_calibrations` wrote. Raises BundleError for anything else."""
    value = parse_json(data, FILE_NAME)
    read_schema(value, FILE_NAME, known=SCHEMA, remedy="calibrate again: skipstep calibrate")
    calibrations = read_dataclass(_CalibrationFile, value, FILE_NAME).calibrations
    if len({each.identity for each in calibrations}) != len(calibrations):
        raise malformed(f"{FILE_NAME}.calibrations", "two calibrations of one device")
    return calibrations


@dataclass(frozen=True, slots=True)
class _CalibrationFile:
    schema: int
    calibrations: tuple[Calibration, ...]


def matching(calibrations: Iterable[Calibration], identity: DeviceIdentity) -> Calibration | None:
    """The calibration of this device, or None."""
    return next((each for each in calibrations if each.identity == identity), None)


def stored_calibration(data: bytes, identity: DeviceIdentity) -> Calibration | None:
    """The calibration of this device in a bundle's file, or None. Raises BundleError."""
    return matching(read_calibrations(data), identity)


def describe_latencies(calibration: Calibration, plans: Mapping[str, Plan]) -> list[str]:
    """Lines of a table of the latencies of `plans`, by key; plans that were not measured are named below it."""
    rows = [
        (
            f"{plans[kind.plan].steps}",
            plans[kind.plan].solver,
            kind.plan,
            f"{kind.batch_size:>5}",
            "yes" if kind.guided else "no",
            *(f"{milliseconds:9.2f}" for milliseconds in (each.p50_ms, each.p90_ms, each.p99_ms)),
            f"{each.count:>5}",
        )
        for kind, each in sorted(
            calibration.latencies.items(),
            key=lambda item: (plans[item[0].plan].steps if item[0].plan in plans else 0, item[0]),
        )
        if kind.plan in plans
    ]
    header = ("steps", "solver", "plan", "batch", "guided", "   p50 ms", "   p90 ms", "   p99 ms", "calls")
    lines = [f"calibrated  on {calibration.identity}", *format_table(header, rows).splitlines()]
    if calibration.splits:
        divided = ", ".join(f"{rows} in {parts}" for rows, parts in sorted(calibration.splits.items()))
        lines.append(f"Rows of the network, and the parts that they are evaluated in: {divided}.")
    if any(each.count < 100 for each in calibration.latencies.values()):
        lines.append("Of fewer than 100 calls, p99 is the longest.")
    measured = {kind.plan for kind in calibration.latencies}
    unmeasured = [f"{plan.steps} steps ({plan.solver}, {key})" for key, plan in plans.items() if key not in measured]
    if unmeasured:
        lines.append(f"Not measured: {', '.join(unmeasured)}.")
    return lines
