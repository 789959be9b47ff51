"""A policy inside a control loop: queues of observations and actions, a deadline for each chunk, a fixed rate.

    observation ─▶ the last n_obs_steps ─▶ chunk ─▶ queue of n_action_steps ─▶ one action per call
                                       (only where the queue is empty)

The queues are those of LeRobot's select_action: the first observation after a reset fills the history, and the actions
of a chunk count from the moment of the newest observation on.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from skipstep.arrays import float32, host_floats
from skipstep.calls.noise import sample_noise
from skipstep.errors import InputError, check_callable, check_integer, check_number, check_type
from skipstep.kernels.layout import Stream
from skipstep.plans.plan import Plan
from skipstep.robotics.features import Array
from skipstep.robotics.policy import PolicyEngine

_SEEDS: Final = 1 << 64
_MAX_RATE: Final = 1e6
_MAX_MS: Final = 1e9


@dataclass(frozen=True, slots=True)
class LoopReport:
    """What became of `steps` ticks: `late` of them sent their action after the end of their period, the worst
    `worst_ms` after the tick; `misses` chunks missed the deadline."""

    steps: int
    late: int
    misses: int
    worst_ms: float


class PolicyRunner:
    """One robot's policy. Not safe for several threads: it is the state of one control loop.

    steps, plan     which plan draws a chunk; where the engine holds one plan, both may be left out.
    n_action_steps  how many actions of a chunk are carried out; the policy's own number where it is left out.
    deadline_ms     a chunk that takes longer, from its newest observation to its actions, is counted in `misses`. Its
                    actions are carried out all the same: what to do without them is the robot's to say.
    warm_start      w in [0, 1): the next chunk starts from √w · previous + √(1-w) · noise instead of noise alone, where
                    previous is the chunk before, normalised and shifted by n_action_steps, its last moment repeated.
                    Chunks then agree better where they meet. It changes what is drawn: the policy was trained on w = 0.
    seed            chunk number k draws its noise with seed + k, counted from the last reset.
    clock           seconds, monotonic.

    `chunks` and `misses` count since the runner was made.
    """

    def __init__(
        self,
        policy: PolicyEngine,
        *,
        steps: int | None = None,
        plan: Plan | None = None,
        n_action_steps: int | None = None,
        deadline_ms: float | None = None,
        warm_start: float = 0.0,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_type("policy", policy, PolicyEngine, remedy="make one with from_policy or load_policy")
        self.policy, spec = policy, policy.spec
        held = list(policy.engine.plans.values())
        only = held[0] if steps is None and plan is None and len(held) == 1 else plan
        self.plan = policy.engine.select_plan(steps=steps, plan=only)
        self.n_action_steps = spec.n_action_steps if n_action_steps is None else spec.check_action_steps(n_action_steps)
        self.deadline_ms = (
            None if deadline_ms is None else check_number("deadline_ms", deadline_ms, low=0.0, high=_MAX_MS, above=True)
        )
        self.warm_start = check_number("warm_start", warm_start, low=0.0, high=1.0 - 2**-20)
        self.seed = check_integer("seed", seed, low=0, high=_SEEDS - 1)
        check_callable("clock", clock, "")
        self._clock = clock
        self.chunks = self.misses = 0
        self.reset()

    def reset(self) -> None:
        """Forget observations, actions and the chunk before, at the start of an episode."""
        self._history: deque[dict[str, Array]] = deque(maxlen=self.policy.spec.n_obs_steps)
        self._actions: deque[Array] = deque()
        self._previous: Array | None = None
        self._drawn = 0

    def select_action(self, observation: Mapping[str, Any], *, x_T: Any = None) -> Array:
        """The action `[A]` for the newest observation, in the data set's units; draws a chunk where none is left.

        observation  by name, of one moment and without a batch: `[*shape]`, as PolicyEngine.encode takes them.
        x_T          `[horizon, A]` to draw the chunk from, if one is drawn, instead of the seed's noise and warm start.
        """
        begun = self._clock()
        newest = self.policy.spec.checked(observation, lead=())
        # A copy: the caller may fill the same buffers again while they are still history.
        newest = {name: array.copy() for name, array in newest.items()}
        start = None if x_T is None else self._checked_noise(x_T)
        self._history.append(newest)
        while len(self._history) < self.policy.spec.n_obs_steps:
            self._history.append(newest)
        if not self._actions:
            self._draw(start)
            self.chunks += 1
            if self.deadline_ms is not None and (self._clock() - begun) * 1e3 > self.deadline_ms:
                self.misses += 1
        return self._actions.popleft()

    def run(
        self,
        rate_hz: float,
        observe: Callable[[], Mapping[str, Any]],
        act: Callable[[Array], object],
        steps: int,
        *,
        sleep: Callable[[float], object] = time.sleep,
    ) -> LoopReport:
        """`steps` times, at a fixed rate: act(select_action(observe())).

        Ticks lie on a grid of 1 / rate_hz seconds from the first. After an action that was late, the next tick is the
        next one on the grid that is still ahead: the loop does not catch up in a burst.
        """
        period = 1.0 / check_number("rate_hz", rate_hz, low=0.0, high=_MAX_RATE, above=True)
        for name, function, arguments in (
            ("observe", observe, ""),
            ("act", act, "action"),
            ("sleep", sleep, "seconds"),
        ):
            if function is None:
                raise InputError(got=f"{name}=None", expected="a function", remedy=f"pass {name}({arguments})")
            check_callable(name, function, arguments)
        steps = check_integer("steps", steps, low=1)
        late, worst, misses = 0, 0.0, self.misses
        first, tick = self._clock(), 0
        for _ in range(steps):
            due = first + tick * period
            if (wait := due - self._clock()) > 0:
                sleep(wait)
            act(self.select_action(observe()))
            taken = self._clock() - due
            worst = max(worst, taken)
            # To the next on the grid that is not past; what takes a whole period, but for rounding, is in time.
            passed = max(1, math.ceil(taken / period - 1e-6))
            late += passed > 1
            tick += passed
        return LoopReport(steps, late, self.misses - misses, worst * 1e3)

    def _draw(self, x_T: Array | None) -> None:
        seed = (self.seed + self._drawn) % _SEEDS
        if x_T is None:
            x_T = self._initial(seed)
        history = {name: np.stack([each[name] for each in self._history])[None] for name in self._history[0]}
        chunk = self.policy.sample(history, plan=self.plan, seeds=[seed], x_T=x_T[None])
        self._actions.extend(self.policy.actions(chunk, n_action_steps=self.n_action_steps)[0])
        self._previous, self._drawn = chunk[0], self._drawn + 1

    def _initial(self, seed: int) -> Array:
        noise = sample_noise(self.policy.engine.network, np.array([seed], np.uint64), Stream.INITIAL)[0]
        if self._previous is None or self.warm_start == 0.0:
            return float32(noise)
        after = np.arange(self.n_action_steps, self.n_action_steps + len(noise))
        shifted = self._previous[np.minimum(after, len(noise) - 1)]
        w = np.float32(self.warm_start)
        mixed: Array = np.sqrt(w) * shifted + np.sqrt(1 - w) * noise
        return mixed

    def _checked_noise(self, x_T: Any) -> Array:
        noise = float32(host_floats("x_T", x_T))
        if noise.shape != (expected := self.policy.engine.network.sample_shape):
            raise InputError(
                got=f"x_T of shape {noise.shape}", expected=f"{expected}, (horizon, action)", remedy="leave it out"
            )
        return noise
