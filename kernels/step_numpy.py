"""The step on a CPU: the same operations in the same order as the Triton kernel, so the float32 bits are the same.

Equations and columns: skipstep.kernels.layout. NumPy never fuses a multiplication with an addition, and the kernel is
compiled without that. (One exception: each library has its own exponential, which a learned variance needs.) Scratch
memory is allocated once per loop; a step allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError, check_items, check_type
from skipstep.kernels.layout import NUM_COLUMNS, SLOT_COLUMNS, Column, StepFlags, check_slots
from skipstep.kernels.statistics import Thresholding, rescale_factor_numpy, threshold_bound_numpy

Array = NDArray[np.float32]


class NumpyStep:
    """One loop's steps over fixed buffers; call it with the stage after each network evaluation.

    state           float32 `[B, C, …]`, of any rank from 2; x_t before and x_s after.
    model_output    `[B, C, …]`, or `[2B, C, …]` when guided: predictions with the condition, then without. With a
                    learned variance it has 2C channels, the second half for the variance. Of a stage without guidance
                    the first half is read.
    network_input   `[B or 2B, C, …]`; receives the next state, in its dtype, once or twice.
    table           float32 `[S, 1 or B, NUM_COLUMNS]`.
    flags           one per row of the table.
    guidance        float32 `[B]`, when guided: out = u + guidance·(c - u).
    rescale         float32 `[B]` in [0, 1], when flags.rescale (skipstep.kernels.statistics).
    thresholding    when flags.threshold.
    noise           stage → float32 `[B, n]`, when flags.add_noise.
    x0              optional float32 `[B, C, …]`, receives the predicted image of each step.

    Raises InputError for buffers of other shapes and for flags whose operands are missing.
    """

    def __init__(
        self,
        *,
        state: Array,
        model_output: NDArray[Any],
        network_input: NDArray[Any],
        table: Array,
        flags: Sequence[StepFlags],
        guidance: Array | None = None,
        rescale: Array | None = None,
        thresholding: Thresholding | None = None,
        noise: Callable[[int], Array] | None = None,
        x0: Array | None = None,
    ) -> None:
        check_type("state", state, np.ndarray, remedy="pass float32 [B, …]")
        _check("state", state, state.shape if state.ndim > 1 and state.size else (1, 1), written=True)
        batch_size, channels = state.shape[:2]
        flags = check_items("flags", flags, expected="StepFlags, one a stage", remedy="pass the plan's")
        for each in flags:
            check_type("flags", each, StepFlags, remedy="pass the plan's, one a stage")
            check_slots(each)
        copies = 2 if any(each.guided for each in flags) else 1
        wide = 2 if any(each.wide_output for each in flags) else 1
        _check("model_output", model_output, (copies * batch_size, wide * channels, *state.shape[2:]), any_float=True)
        input_shape = (max(each.input_copies for each in flags) * batch_size, *state.shape[1:])
        _check("network_input", network_input, input_shape, any_float=True, written=True)
        rows = table.shape[1] if isinstance(table, np.ndarray) and table.ndim == 3 else 1
        _check("table", table, (len(flags), batch_size if rows == batch_size else 1, NUM_COLUMNS))
        for name, array, used in (
            ("guidance", guidance, any(each.guided for each in flags)),
            ("rescale", rescale, any(each.rescale for each in flags)),
        ):
            if used or array is not None:
                _check(name, array, (batch_size,))
        if x0 is not None:
            _check("x0", x0, state.shape, written=True)
        if any(each.threshold for each in flags):
            check_type("thresholding", thresholding, Thresholding, remedy="pass the plan's")
        if any(each.add_noise for each in flags) and not callable(noise):
            raise InputError(got="no noise", expected="a function called as noise(stage)", remedy="pass noise=...")
        self._state = state
        self._prediction, self._variance = model_output[:, :channels], model_output[:batch_size, channels:]
        self._inputs = np.split(network_input, len(network_input) // batch_size)
        # [S, columns] of scalars where one row serves all samples, of [B, 1, …] blocks otherwise.
        shared = table.shape[1] == 1
        self._per_sample = batch_size, *(1,) * (state.ndim - 1)
        self._rows = table[:, 0] if shared else table.transpose(0, 2, 1).reshape(*table.shape[::2], *self._per_sample)
        self._flags = flags
        self._guidance = None if guidance is None else guidance.reshape(self._per_sample)
        self._rescale = rescale
        self._thresholding = thresholding
        self._noise = noise
        self._out = np.empty_like(state) if any(f.guided or f.rescale for f in flags) else None
        self._x0 = np.empty_like(state) if x0 is None else x0
        self._eps = np.empty_like(state)
        self._next = np.empty_like(state)
        self._term = np.empty_like(state)
        # As on a GPU a slot that nothing has written holds zeros.
        self.history = [np.zeros_like(state) for _ in range(max(f.num_slots for f in flags))]
        self._kept = np.empty_like(state) if any(f.written_slots for f in flags) else None

    def __call__(self, stage: int) -> None:
        row, flags = self._rows[stage], self._flags[stage]
        x, x0, eps, x_next, term = self._state, self._x0, self._eps, self._next, self._term
        history = self.history
        out = self._combined_prediction(flags, row)

        self._combine(row[Column.X0_X], x, row[Column.X0_OUT], out, into=x0)
        if flags.clip:
            # minimum and maximum keep NaN: a prediction that is not finite must reach the caller.
            np.minimum(x0, row[Column.CLIP], out=x0)
            np.maximum(x0, -row[Column.CLIP], out=x0)
        if flags.threshold:
            assert self._thresholding is not None, "flags.threshold comes with its parameters"
            bound = threshold_bound_numpy(x0, self._thresholding).reshape(self._per_sample)
            np.minimum(x0, bound, out=x0)
            np.maximum(x0, -bound, out=x0)
            x0 /= bound
        if flags.rederive_eps:
            self._combine(row[Column.RE_X], x, row[Column.RE_X0], x0, into=eps)
        else:
            self._combine(row[Column.EPS_X], x, row[Column.EPS_OUT], out, into=eps)

        self._combine(row[Column.C_X0], x0, row[Column.C_EPS], eps, into=x_next)
        if flags.add_state:
            x_next += np.multiply(x, row[Column.C_X], out=term)
        for slot in flags.read_slots:
            x_next += np.multiply(history[slot], row[SLOT_COLUMNS[slot]], out=term)
        if flags.add_noise:
            assert self._noise is not None, "flags.add_noise comes with noise"
            z = self._noise(stage).reshape(x.shape)
            if flags.learned_variance:
                z = z * np.exp(row[Column.LOG_SIGMA] + row[Column.LOG_SIGMA_OUT] * self._variance)
            x_next += np.multiply(z, row[Column.SIGMA], out=term)

        for slot in flags.written_slots:
            assert self._kept is not None, "a slot is written"
            kept = self._kept
            self._combine(row[Column.M_X], x, row[Column.M_X0], x0, into=kept)
            kept += np.multiply(eps, row[Column.M_EPS], out=term)
            if slot in flags.read_slots:
                kept += np.multiply(history[slot], row[Column.M_H], out=term)
            history[slot], self._kept = kept, history[slot]
        x[...] = x_next
        for half in self._inputs:
            half[...] = x_next

    def _combined_prediction(self, flags: StepFlags, row: Any) -> NDArray[Any]:
        """The prediction after guidance and rescaling; without them a view of the network's output."""
        batch_size = len(self._state)
        conditional = self._prediction[:batch_size]
        if not flags.guided or self._guidance is None or self._out is None:
            return conditional
        out, unconditional = self._out, self._prediction[batch_size:]
        # In float32, as the kernel does: of two float16 arrays NumPy would compute the difference in float16.
        np.subtract(conditional, unconditional, out=out, dtype=np.float32)
        scale = self._guidance
        if flags.scale_guidance:
            scale = row[Column.GUIDANCE] * (scale - np.float32(1.0)) + np.float32(1.0)
        out *= scale
        np.add(unconditional, out, out=out)
        if flags.rescale:
            assert self._rescale is not None, "flags.rescale comes with its strength"
            out *= rescale_factor_numpy(out, conditional, self._rescale).reshape(self._per_sample)
        return out

    def _combine(self, a: Any, x: NDArray[Any], b: Any, y: NDArray[Any], *, into: Array) -> None:
        """into = a·x + b·y, each product rounded on its own."""
        np.multiply(x, a, out=self._term)
        np.multiply(y, b, out=into)
        into += self._term


def _check(name: str, array: object, shape: tuple[int, ...], *, any_float: bool = False, written: bool = False) -> None:
    """Raise InputError unless `array` is a NumPy array of that shape, float32 or a float array, writable if needed."""
    if isinstance(array, np.ndarray):
        kind = array.dtype
        # bfloat16 of ml_dtypes is a void type to NumPy.
        fits = kind.kind == "f" or (kind.kind == "V" and kind.names is None) if any_float else kind == np.float32
        if array.shape == shape and fits and (array.flags.writeable or not written):
            return
        got = f"{name} {list(array.shape)} {kind}{'' if array.flags.writeable else ', read-only'}"
    else:
        got = f"{name} of type {type(array).__name__}"
    raise InputError(
        got=got,
        expected=f"a NumPy array {list(shape)} {'of floats' if any_float else 'float32'}",
        remedy=f"convert {name} before the loop starts",
    )
