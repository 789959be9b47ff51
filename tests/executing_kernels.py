"""What the step and the noise kernels do, by their NumPy twins, on the memory of a driver (executing_cuda).

`floats(address, shape, dtype)` is the memory at an address; `values` are the kernel's arguments by name.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.noise import standard_normal
from skipstep.kernels.layout import NUM_COLUMNS, Stream
from skipstep.kernels.step_numpy import NumpyStep


def run_noise(floats, facts, values, count, batch):
    state = floats(values["state_ptr"], (batch, count))
    if not floats(values["given_ptr"], (1,), "int32")[0]:
        seeds = floats(values["seeds_ptr"], (batch,), "uint64")
        state[...] = standard_normal(seeds, count, stage=values["stage"], stream=Stream.INITIAL)
    copies = facts.flags.input_copies
    network_input = floats(values["network_input_ptr"], (copies, batch, count), facts.network_dtype)
    network_input[...] = state


def run_step(floats, facts, values, count, batch):
    flags, stage = facts.flags, values["stage"]
    assert not any((flags.rescale, flags.threshold, facts.per_sample, facts.store_x0)), (
        "these are refused before a launch"
    )
    assert values["next_ptr"] == values["state_ptr"]
    state = floats(values["state_ptr"], (batch, 1, count))
    output_shape = ((2 if flags.guided else 1) * batch, 2 if flags.wide_output else 1, count)
    output = floats(values["output_ptr"], output_shape, facts.network_dtype)
    network_input = floats(values["network_input_ptr"], (flags.input_copies * batch, 1, count), facts.network_dtype)
    table = floats(values["table_ptr"], (stage + 1, 1, NUM_COLUMNS))[stage:]

    def noise(_: int) -> NDArray[np.float32]:
        seeds = floats(values["seeds_ptr"], (batch,), "uint64")
        return standard_normal(seeds, count, stage=stage, stream=Stream.STEP)

    step = NumpyStep(
        state=state,
        model_output=output,
        network_input=network_input,
        table=table,
        flags=[flags],
        guidance=floats(values["guidance_ptr"], (batch,)) if flags.guided else None,
        noise=noise if flags.add_noise else None,
    )
    slots = flags.num_slots
    history = floats(values["history_ptr"], (slots, batch, 1, count)) if slots else ()
    step.history = [each.copy() for each in history]
    step(0)
    for slot in flags.written_slots:
        history[slot] = step.history[slot]
