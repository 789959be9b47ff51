"""One case: contenders who draw the right samples take turns against the clock.

All go through the same gates, and whoever stops at one is reported with the reason instead of a number:

    absent     this machine or model lacks what the contender needs
    skipped    from what smaller cases took, it would exceed the budget
    failed     it raised
    wrong      its samples are off the float32 textbook loop's by more than its tolerance
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from skipstep.bench.contenders import textbook
from skipstep.bench.contenders.engines import ONNX
from skipstep.bench.contenders.workload import Built, ContenderKind, Draw, Samples, Setup, Workload
from skipstep.bench.results import REFERENCE, Case, Contender
from skipstep.bench.timing import REST_SECONDS, median_ratio, take_turns
from skipstep.bundles.bundle import open_bundle
from skipstep.bundles.golden import replay_golden

# Fewer turns are no measurement.
MIN_ROUNDS = 3
_NETWORK = "network alone"


class Contest:
    """`kinds` in order of importance; `build` gives a contender's network and the seconds that took, or raises.

    `predicted` are the seconds of a call by contender, 0 where nobody knows.
    """

    def __init__(
        self,
        workload: Workload,
        setup: Setup,
        kinds: Sequence[ContenderKind],
        *,
        build: Callable[[ContenderKind], tuple[Built, float]],
        predicted: Mapping[str, float],
        budget_seconds: float,
        max_rounds: int,
    ) -> None:
        self._workload = workload
        self._setup = setup
        self._kinds = kinds
        self._build = build
        self._predicted = predicted
        self._budget = budget_seconds
        self._max_rounds = max_rounds
        self._found: dict[str, Contender] = {}
        self._draws: dict[str, Draw] = {}
        self._broken: dict[str, Exception] = {}
        self._outside_network: float | None = None
        # What the gate took of the budget. Building and compiling are apart: they happen once for all cases.
        self._drawing_seconds = 0.0

    def hold(self) -> Case:
        for kind in self._kinds:
            reason = kind.lacks(self._workload.subject, self._setup)
            if reason is not None:
                self._stop(kind, "absent", reason)
        self._skip_beyond_budget()
        waiting = self._waiting()
        try:
            reference = self._reference() if waiting else None
        except Exception as raised:  # A network that cannot be run at all is a result as well.
            for kind in waiting:
                self._stop(kind, "failed", f"no reference to compare with: {_described(raised)}")
        for kind in self._waiting():
            self._pass_gate(kind, reference)
        if self._draws:
            self._take_turns(self._budget - self._drawing_seconds)
        return Case(
            model=self._workload.subject.name,
            steps=self._workload.steps,
            batch_size=self._workload.batch_size,
            dtype=self._setup.dtype,
            plan=self._workload.plan.key,
            contenders=tuple(self._found[kind.name] for kind in self._kinds),
            outside_network=self._outside_network,
        )

    def _waiting(self) -> list[ContenderKind]:
        return [kind for kind in self._kinds if kind.name not in self._found]

    def _stop(self, kind: ContenderKind, status: str, reason: str) -> None:
        self._found[kind.name] = Contender(
            kind.name,
            status,  # type: ignore[arg-type]  # One of Status.
            reason=reason,
            backend=kind.backend,
            loop=kind.loop,
        )

    def _skip_beyond_budget(self) -> None:
        """Who is last on the list goes first. A reference that nobody is left to be compared with goes too."""
        waiting = self._waiting()
        calls = MIN_ROUNDS + 1
        predicted = calls * sum(self._predicted[kind.name] for kind in waiting)
        reason = f"the case would take {predicted:.0f} s with all contenders, and its budget is {self._budget:g} s"
        while waiting and calls * sum(self._predicted[kind.name] for kind in waiting) > self._budget:
            self._stop(waiting.pop(), "skipped", reason)
            if [kind.name for kind in waiting] == [REFERENCE]:
                self._stop(waiting.pop(), "skipped", "nobody is left to be compared with it")

    def _reference(self) -> Samples | None:
        """The textbook loop's samples in float32; None for a bundle, which holds samples of its own to compare with."""
        if self._workload.subject.is_bundle:
            return None
        return textbook.build(self._workload.subject, replace(self._setup, dtype="float32")).prepare(self._workload)()

    def _pass_gate(self, kind: ContenderKind, reference: Samples | None) -> None:
        try:
            built, build_seconds = self._build(kind)
            started = time.perf_counter()
            draw = built.prepare(self._workload)
            ready = time.perf_counter()
            drawn = draw()
            warmup_seconds = time.perf_counter() - started
            self._drawing_seconds += time.perf_counter() - ready
            if reference is None:
                error, tolerance = _golden_error(self._workload)
            else:
                error, tolerance = largest_difference(drawn, reference, kind), kind.tolerance_for(self._setup)
        except Exception as raised:  # Whatever a contender raises is its result; the others go on.
            self._stop(kind, "failed", _described(raised))
            return
        right = error <= tolerance  # NaN is not.
        contender = Contender(
            kind.name,
            "ok" if right else "wrong",
            reason="" if right else f"samples are off by {error:.2g} of their size, {tolerance:g} is allowed",
            backend=kind.backend,
            loop=kind.loop,
            error=error if np.isfinite(error) else None,
            tolerance=tolerance,
            build_seconds=build_seconds,
            warmup_seconds=warmup_seconds,
            nodes_per_step=built.nodes,
            bytes_per_step=built.weight_bytes,
        )
        self._found[kind.name] = contender
        if right:
            self._draws[kind.name] = draw

    def _take_turns(self, seconds_left: float) -> None:
        draws = {name: self._noticing_failure(name, draw) for name, draw in self._draws.items()}
        alone = self._network_alone() if ONNX.name in draws else None
        if alone is not None:
            alone()  # The others are warm from the gate.
            draws[_NETWORK] = alone
        times = take_turns(draws, rounds=1, warm_up=False)
        a_turn = sum(seconds[0] + REST_SECONDS for seconds in times.values())
        rounds = int(seconds_left / a_turn)
        more = take_turns(draws, rounds=min(max(rounds, MIN_ROUNDS), self._max_rounds) - 1, warm_up=False)
        seconds = {name: (*times[name], *more[name]) for name in draws if name not in self._broken}
        for name in self._draws:
            if name in self._broken:
                failed = self._found[name]
                self._found[name] = replace(failed, status="failed", reason=_described(self._broken[name]))
                continue
            ratio = median_ratio(seconds[REFERENCE], seconds[name]) if REFERENCE in seconds else None
            self._found[name] = replace(self._found[name], seconds=seconds[name], ratio=ratio)
        if _NETWORK in seconds and ONNX.name in seconds:
            self._outside_network = 1.0 - median_ratio(seconds[_NETWORK], seconds[ONNX.name])

    def _network_alone(self) -> Callable[[], object] | None:
        built, _ = self._build(next(kind for kind in self._kinds if kind.name == ONNX.name))
        return None if built.network_alone is None else built.network_alone(self._workload)

    def _noticing_failure(self, name: str, draw: Draw) -> Callable[[], object]:
        """A contender that raises in its turn loses its number; the turns of the others go on."""

        def guarded() -> None:
            if name not in self._broken:
                try:
                    draw()
                except Exception as raised:  # As at the gate.
                    self._broken[name] = raised

        return guarded


def largest_difference(drawn: Samples, reference: Samples, kind: ContenderKind) -> float:
    """The largest difference over the reference's largest magnitude; inf for samples of another shape."""
    if drawn.shape != reference.shape:
        return float("inf")
    if kind.pictures:
        reference = reference.clip(-1.0, 1.0)
    return float(np.abs(drawn - reference).max() / np.abs(reference).max())


def _golden_error(workload: Workload) -> tuple[float, float]:
    """How far a bundle's engine is off the samples that the bundle's builder drew, and how far it may be.

    Raises IntegrityError beyond that.
    """
    from skipstep import load

    bundle = open_bundle(workload.subject.path, allow_hard_links=True)
    golden = bundle.manifest.golden
    if golden is None:
        raise ValueError("the bundle holds no golden samples to compare with")
    engine = load(workload.subject.path, allow_hard_links=True)
    return replay_golden(engine, golden, bundle.read_arrays(golden.file)), golden.tolerance


def _described(error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
