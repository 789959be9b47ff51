"""The step on a CPU: the same operations in the same order as the Triton kernel, so the float32 bits are the same.

    x0 = X0_X·x + X0_OUT·out,  eps = EPS_X·x + EPS_OUT·out,  clip,  eps again,  next = C_X0·x0 + C_EPS·eps + SIGMA·z

(columns of skipstep.kernels.layout). NumPy never fuses a multiplication with an addition; the kernel is compiled not
to. Scratch memory is taken once per loop: a step allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.kernels.layout import Column, StepFlags


class NumpyStep:
    """One loop's steps over fixed buffers; call it with the stage after each network evaluation.

    state           float32 `[B, C, H, W]`, x_t before and x_s after.
    model_output    `[B, C, H, W]`, or `[2B, C, H, W]` when guided: predictions with the label, then without.
    network_input   of model_output's shape; receives the next state, in its dtype, once or twice.
    table           float32 `[S, 1 or B, NUM_COLUMNS]`.
    guidance        float32 `[B]`, when guided: out = u + guidance·(c - u).
    noise           stage → float32 `[B, C·H·W]`, when flags.add_noise.
    x0              optional float32 `[B, C, H, W]`, receives the predicted image of every step.
    """

    def __init__(
        self,
        *,
        state: NDArray[np.float32],
        model_output: NDArray[Any],
        network_input: NDArray[Any],
        table: NDArray[np.float32],
        flags: StepFlags,
        guidance: NDArray[np.float32] | None = None,
        noise: Callable[[int], NDArray[np.float32]] | None = None,
        x0: NDArray[np.float32] | None = None,
    ) -> None:
        batch_size = len(state)
        self._state = state
        self._output = model_output
        self._inputs = np.split(network_input, len(network_input) // batch_size)
        # [S, columns] of scalars where one row serves all samples, of [B, 1, 1, 1] blocks otherwise.
        shared = table.shape[1] == 1
        self._rows = table[:, 0] if shared else table.transpose(0, 2, 1).reshape(*table.shape[::2], batch_size, 1, 1, 1)
        self._flags = flags
        self._scale = None if guidance is None else guidance.reshape(-1, 1, 1, 1)
        self._noise = noise
        self._guided = np.empty_like(state) if flags.guided else None
        self._x0 = np.empty_like(state) if x0 is None else x0
        self._eps = np.empty_like(state)
        self._term = np.empty_like(state)

    def __call__(self, stage: int) -> None:
        row, x, x0, eps, term = self._rows[stage], self._state, self._x0, self._eps, self._term
        out = self._output
        if self._guided is not None and self._scale is not None:
            conditional, unconditional = out[: len(x)], out[len(x) :]
            out = self._guided
            np.subtract(conditional, unconditional, out=out)
            out *= self._scale
            np.add(unconditional, out, out=out)
        self._combine(row[Column.X0_X], x, row[Column.X0_OUT], out, into=x0)
        self._combine(row[Column.EPS_X], x, row[Column.EPS_OUT], out, into=eps)
        if self._flags.clip:
            # minimum and maximum keep NaN: a broken prediction must reach the caller, not become a bound.
            np.minimum(x0, row[Column.CLIP], out=x0)
            np.maximum(x0, -row[Column.CLIP], out=x0)
        if self._flags.rederive_eps:
            self._combine(row[Column.RE_X], x, row[Column.RE_X0], x0, into=eps)
        self._combine(row[Column.C_X0], x0, row[Column.C_EPS], eps, into=x)
        # Adding 0·z would change no bits but that of a negative zero.
        if self._flags.add_noise and np.any(row[Column.SIGMA]):
            assert self._noise is not None, "flags.add_noise comes with noise"
            np.multiply(self._noise(stage).reshape(x.shape), row[Column.SIGMA], out=term)
            x += term
        for half in self._inputs:
            half[...] = x

    def _combine(self, a: Any, x: NDArray[Any], b: Any, y: NDArray[Any], *, into: NDArray[np.float32]) -> None:
        """into = a·x + b·y, each product rounded on its own."""
        np.multiply(x, a, out=self._term)
        np.multiply(y, b, out=into)
        into += self._term
