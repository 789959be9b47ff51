"""What the kernels of a loop do, by their NumPy twins, on the memory of a driver (executing_cuda).

`floats(address, shape, dtype)` is the memory at an address; `values` are the kernel's arguments by name.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.noise import standard_normal
from skipstep.kernels import step_numpy
from skipstep.kernels.layout import NUM_COLUMNS, Column, Stream
from skipstep.kernels.statistics import Thresholding, rescale_factor_numpy


def run_noise(floats, facts, values, count, batch):
    state = floats(values["state_ptr"], (batch, count))
    if not floats(values["given_ptr"], (1,), "int32")[0]:
        seeds = floats(values["seeds_ptr"], (batch,), "uint64")
        state[...] = standard_normal(seeds, count, stage=values["stage"], stream=Stream.INITIAL)
    copies = facts.flags.input_copies
    network_input = floats(values["network_input_ptr"], (copies, batch, count), facts.network_dtype)
    network_input[...] = state


def run_statistics(floats, facts, values, count, batch):
    flags = facts.flags
    table = floats(values["table_ptr"], (values["stage"] + 1, NUM_COLUMNS))[values["stage"]]
    output_shape = (2 if flags.guided else 1, batch, 2 if flags.wide_output else 1, count)
    output = floats(values["output_ptr"], output_shape, facts.network_dtype)[:, :, 0].astype(np.float32)
    out = conditional = output[0]
    if flags.guided:
        scale = floats(values["guidance_ptr"], (batch, 1))
        if flags.scale_guidance:
            scale = table[Column.GUIDANCE] * (scale - np.float32(1.0)) + np.float32(1.0)
        out = output[1] + scale * (conditional - output[1])
    if flags.rescale:
        factor = floats(values["rescale_ptr"], (batch,))
        factor[...] = rescale_factor_numpy(out, conditional, floats(values["strength_ptr"], (batch,)))
        out = out * factor[:, None]
    if flags.threshold:
        x0 = table[Column.X0_X] * floats(values["state_ptr"], (batch, count)) + table[Column.X0_OUT] * out
        ordered = np.sort(np.abs(x0), axis=1)
        below, above = (ordered[:, min(values["low"] + more, count - 1)] for more in (0, 1))
        bound = (below + values["weight"] * (above - below)).clip(np.float32(1.0), values["maximum"])
        floats(values["bound_ptr"], (batch,))[...] = np.where(np.isnan(ordered[:, -1]), np.float32(np.nan), bound)


def run_step(floats, facts, values, count, batch):
    flags, stage = facts.flags, values["stage"]
    assert values["next_ptr"] == values["state_ptr"]
    state = floats(values["state_ptr"], (batch, 1, count))
    output_shape = ((2 if flags.guided else 1) * batch, 2 if flags.wide_output else 1, count)
    output = floats(values["output_ptr"], output_shape, facts.network_dtype)
    network_input = floats(values["network_input_ptr"], (flags.input_copies * batch, 1, count), facts.network_dtype)
    table = floats(values["table_ptr"], (stage + 1, 1, NUM_COLUMNS))[stage:]

    def noise(_: int) -> NDArray[np.float32]:
        seeds = floats(values["seeds_ptr"], (batch,), "uint64")
        return standard_normal(seeds, count, stage=stage, stream=Stream.STEP)

    step = step_numpy.NumpyStep(
        state=state,
        model_output=output,
        network_input=network_input,
        table=table,
        flags=[flags],
        guidance=floats(values["guidance_ptr"], (batch,)) if flags.guided else None,
        rescale=np.zeros(batch, np.float32),
        thresholding=Thresholding(1.0),
        noise=noise if flags.add_noise else None,
    )
    slots = flags.num_slots
    history = floats(values["history_ptr"], (slots, batch, 1, count)) if slots else ()
    step.history = [each.copy() for each in history]
    # As the kernel does, it takes the statistics that it finds.
    found = {
        function: lambda *_, name=name: floats(values[name], (batch,))
        for function, name in (("rescale_factor_numpy", "rescale_ptr"), ("threshold_bound_numpy", "bound_ptr"))
    }
    with mock.patch.multiple(step_numpy, **found):
        step(0)
    for slot in flags.written_slots:
        history[slot] = step.history[slot]
