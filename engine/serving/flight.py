"""The samples under way, each at its own stage of its own plan. A turn is one evaluation that some of them share.

choose ──▶ one evaluation of the network, each sample's own step (skipstep.loops.contract.Mix) ──▶ the finished leave
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from skipstep.calls.trajectory import Callback, StepEvent
from skipstep.engine import Engine
from skipstep.loops.contract import Mix, MixedSample
from skipstep.loops.runner import OutputType, check_finite
from skipstep.serving.policy import Job, Policy


class SampleFuture(Future[Any]):
    """The samples of one request. It can be awaited, and cancelled until it is done."""

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()


class Call:
    """One request: `missing` of its samples are not there yet. `over`: the future has what it waits for."""

    def __init__(
        self,
        num_samples: int,
        engine: Engine,
        output_type: OutputType = "np",
        callback: Callback | None = None,
        ends_step: Sequence[bool] = (),
    ) -> None:
        self.samples = np.empty((num_samples, *engine.network.sample_shape), np.float32)
        self.missing, self.over, self.future = num_samples, False, SampleFuture()
        self.callback, self.ends_step = callback, ends_step
        self._runner, self._output_type = engine.runner, output_type

    def settle(self, error: BaseException | None = None) -> None:
        """Give the future what it waits for, once; a cancelled one is told that its work has ended."""
        if self.over:
            return
        self.over = True
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            if error is not None:
                raise error
            check_finite(self.samples)
            self.future.set_result(self._runner.as_output(self.samples, self._output_type))
        except BaseException as failed:
            self.future.set_exception(failed)


@dataclass(slots=True, eq=False, kw_only=True)
class Member(Job):
    """Sample `index` of a call."""

    call: Call
    index: int
    sample: MixedSample

    def advance(self) -> None:
        """After an evaluation and its step."""
        call, stage = self.call, self.stage
        self.stage += 1
        if call.callback is not None and call.ends_step[stage]:
            step = sum(call.ends_step[:stage])
            x_t, x0 = self.sample.copy_state(), self.sample.copy_x0()
            call.callback(StepEvent(step, sum(call.ends_step), self.index, x_t, x0))
        if not self.remaining:
            call.samples[self.index] = self.sample.copy_state()[0]
            call.missing -= 1


class Flight:
    """`members` in the order of arrival. A thread that reads or changes them holds the condition `changed`, which is
    notified after every turn. One thread at a time takes turns."""

    def __init__(self, policy: Policy, mix: Mix, clock: Callable[[], float]) -> None:
        self.policy, self.mix, self._clock = policy, mix, clock
        self.members: list[Member] = []
        self.changed = threading.Condition()
        self.evaluations = self.rows = 0

    def turn(self) -> None:
        """Evaluate the network once, and let those leave that are done, have failed or were cancelled."""
        with self.changed:
            self._leave()
            chosen = self.policy.choose(self.members, self._clock())
            for member in self.members:
                member.passed += 1
            for member in chosen:
                member.passed -= 1
        if chosen:
            self._evaluate(chosen)
        with self.changed:
            self._leave()
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Every request that is under way ends with this error."""
        with self.changed:
            members = self.members
        for member in members:
            member.call.settle(error)
        with self.changed:
            self._leave()

    def _leave(self) -> None:
        for member in self.members:
            if member.call.future.cancelled():
                member.call.settle()
            if not member.remaining or member.call.over:
                self.mix.leave(member.sample)
        self.members = [member for member in self.members if member.remaining and not member.call.over]

    def _evaluate(self, chosen: Sequence[Member]) -> None:
        rows = sum(member.width for member in chosen)
        try:
            self.mix.advance([(member.sample, member.stage) for member in chosen])
        except BaseException as error:
            for member in chosen:
                member.call.settle(error)
            return
        self.evaluations += 1
        self.rows += rows
        for member in chosen:
            if member.call.over:
                continue  # Another sample of the same request has failed just now.
            try:
                member.advance()
            except BaseException as error:
                member.call.settle(error)
            if not member.call.missing:
                member.call.settle()
