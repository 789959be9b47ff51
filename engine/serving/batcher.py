"""Many callers share the evaluations of one engine.

with Batcher(engine) as batcher:
    futures = [batcher.submit(steps=20, seeds=seed, class_labels=seed % 10) for seed in range(8)]
    images = [future.result() for future in futures]

A request joins at the next evaluation, whatever the others' plans, stages and guidance are, and leaves when it is done.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self, Unpack

from skipstep.calls.request import Conditions, SampleRequest, resolve_request
from skipstep.calls.trajectory import Callback
from skipstep.engine import Engine
from skipstep.errors import (
    EngineStateError,
    InputError,
    QueueFullError,
    check_callable,
    check_flag,
    check_integer,
    check_number,
    check_type,
)
from skipstep.loops.runner import OutputType, check_output_type
from skipstep.networks.spec import MAX_BATCH_SIZE
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages
from skipstep.serving.cost import Cost
from skipstep.serving.flight import Call, Flight, Member, SampleFuture
from skipstep.serving.policy import Policy

MAX_QUEUE = 256
_MAX_MS = 1e9


class Batcher:
    """Continuous batching over an engine. Safe to call from several threads.

    max_batch    the most rows of the network in one evaluation: a sample has one, with guidance two. On a GPU at most
                 the network's largest batch size, and an evaluation takes the next one from its rows up.
    max_wait_ms  how long the first request of an idle batcher waits for others to come along.
    max_queue    the most samples that are under way or wait.

    What an evaluation costs, and so how many samples share one and which deadlines can be met, follows from
    engine.calibration, as it is when the batcher is made; without one as many share it as `max_batch` allows, and
    deadlines are refused. On a GPU the evaluations are recorded when the batcher is made. Raises InputError.
    """

    def __init__(
        self, engine: Engine, *, max_batch: int = 16, max_wait_ms: float = 2.0, max_queue: int = MAX_QUEUE
    ) -> None:
        check_type("engine", engine, Engine, remedy="pass what Engine.build or skipstep.load returned")
        max_batch = check_integer("max_batch", max_batch, low=1, high=MAX_BATCH_SIZE)
        self._max_queue = check_integer("max_queue", max_queue, low=1)
        self._wait = 1e-3 * check_number("max_wait_ms", max_wait_ms, low=0.0, high=_MAX_MS)
        engine.runner.check()
        if engine.loras is not None:
            raise InputError(
                got="an engine with room for LoRAs to swap, whose requests would share evaluations",
                expected="one whose LoRAs are fused",
                remedy="build it without lora_rank=",
            )
        self._engine = engine
        mix = engine.runner.loop.mix([Stages.of([plan]) for plan in engine.plans.values()], max_batch)
        cost = Cost.of(engine.calibration, engine.plans, mix.batch_sizes)
        policy = Policy(min(max_batch, *mix.batch_sizes[-1:], MAX_BATCH_SIZE), cost)
        self._flight = Flight(policy, mix, time.monotonic)
        self._changed, self._coming = self._flight.changed, 0
        self._arrivals = itertools.count()
        self._worker: threading.Thread | None = None
        self._closed = False

    @property
    def evaluations(self) -> int:
        """How often the network was evaluated."""
        return self._flight.evaluations

    def submit(
        self,
        *,
        steps: int | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        deadline_ms: float | None = None,
        seeds: int | Sequence[int] | None = None,
        x_T: Any = None,
        output_type: OutputType = "np",
        callback: Callback | None = None,
        room_ms: float = 0.0,
        **conditions: Unpack[Conditions],
    ) -> SampleFuture:
        """A request with the arguments of Engine.sample: the future's result is what that returns.

        deadline_ms  from now: requests go by the earliest deadline. One that cannot be met, or only at the price of
                     another that was accepted, is refused. It may pass all the same, if requests wait that were passed
                     over too often; the samples then come later.
        callback     called as callback(StepEvent) after every step of every sample, on the thread that serves all
                     requests; what it raises is the result of this request alone.
        room_ms      how long to wait for room in the queue.

        Raises what Engine.sample raises for its arguments, DeadlineError, QueueFullError, and EngineStateError for a
        batcher or engine that was closed.
        """
        check_callable("callback", callback, "StepEvent")
        check_output_type(output_type)
        room = 1e-3 * check_number("room_ms", room_ms, low=0.0, high=_MAX_MS)
        deadline = math.inf
        if deadline_ms is not None:
            deadline_ms = check_number("deadline_ms", deadline_ms, low=0.0, high=_MAX_MS, above=True)
            deadline = time.monotonic() + 1e-3 * deadline_ms
        self._check()
        stages, request = self._resolved(steps, plan, seeds=seeds, x_T=x_T, **conditions)
        engine, flight = self._engine, self._flight
        with self._room(request.num_samples, room):
            call = Call(request.num_samples, engine, output_type, callback, stages.ends_step)
            samples = [
                flight.mix.sample(stages.chunk(index, 1), request.chunk(index, 1))
                for index in range(request.num_samples)
            ]
            with self._changed:
                self._check()
                members = [
                    Member(next(self._arrivals), sample.rows, deadline, call=call, index=index, sample=sample)
                    for index, sample in enumerate(samples)
                ]
                flight.policy.admit(flight.members, members, time.monotonic())
                if self._worker is None:
                    worker = threading.Thread(target=self._work, name="skipstep-batcher")
                    worker.start()
                    self._worker = worker
                flight.members = [*flight.members, *members]
                self._changed.notify_all()
        return call.future

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, and return when those that were taken are done; without `drain` they are cancelled."""
        check_flag("drain", drain)
        with self._changed:
            self._closed = True
            members, worker = self._flight.members, self._worker
            self._changed.notify_all()
        if not drain:
            for member in members:
                member.call.future.cancel()
        # A callback may close its own batcher: its thread cannot wait for itself.
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        self._engine.runner.check()
        if self._closed:
            raise EngineStateError(
                got="a batcher that was closed", expected="one in use", remedy="make another one: Batcher(engine)"
            )

    def _resolved(
        self, steps: int | None, plan: Plan | Sequence[Plan] | None, **arguments: Any
    ) -> tuple[Stages, SampleRequest]:
        """The arguments of a request, checked."""
        engine, most_rows = self._engine, self._flight.policy.max_rows
        plans = engine.plans.choose(steps, plan)
        stages = Stages.of(plans)
        request = resolve_request(
            engine.network, adds_noise=stages.adds_noise, num_plans=len(plans), device=engine.device, **arguments
        )
        engine.plans.check_guidance(plans, request.guidance)
        if request.num_copies > most_rows or request.num_samples > self._max_queue:
            raise InputError(
                got=f"{request.num_samples} samples of {request.num_copies} rows each",
                expected=f"up to max_queue={self._max_queue} samples of max_batch={most_rows} rows; guided ones have 2",
                remedy="submit fewer at once, or make the batcher with a larger max_queue, and max_batch of 2 or more",
            )
        return stages, request

    @contextlib.contextmanager
    def _room(self, num_samples: int, seconds: float) -> Iterator[None]:
        """Places in the queue while a request is made ready; from then on its members hold them."""

        def fits() -> bool:
            return len(self._flight.members) + self._coming + num_samples <= self._max_queue

        with self._changed:
            self._changed.wait_for(lambda: self._closed or fits(), seconds)
            self._check()
            if not fits():
                raise QueueFullError(
                    got=f"{num_samples} samples for a queue of {self._max_queue} without room for them",
                    expected="room for every sample of the request",
                    remedy="submit it again later, or pass room_ms=1000.0 to wait for room",
                )
            self._coming += num_samples
        try:
            yield
        finally:
            with self._changed:
                self._coming -= num_samples
                self._changed.notify_all()

    def _work(self) -> None:
        """Evaluate while there is anything to do."""
        flight = self._flight
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or sum(each.width for each in flight.members) >= flight.policy.limit, self._wait
            )
        while True:
            try:
                self._engine.runner.check()
                flight.turn()
            except BaseException as error:  # Whatever it is, no future waits for ever.
                flight.fail(error)
            with self._changed:
                if not flight.members:
                    self._worker = None
                    return
