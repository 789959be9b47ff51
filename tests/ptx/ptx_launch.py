"""Launches of a compiled kernel on NumPy arrays: of one batch, and of samples that are kept in places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine import SHARED_BYTES, Machine
from ptx_memory import Memory
from ptx_parser import parse

from skipstep.kernels.launch import StepLaunch
from skipstep.kernels.layout import NUM_SLOTS

# Where samples are kept that are some of several; one row of the batch has no sample.
PLACES, NUM_PLACES = (4, 0, 2), 5


def execute(
    ptx: str, arrays: Mapping[str, NDArray[Any] | None], numbers: tuple[int, ...], grid: tuple[int, int]
) -> int:
    """Run a kernel on these arrays, in place; None is a pointer that must not be followed. Thread instructions run."""
    kernel, memory = parse(ptx), Memory()
    memory.add("shared memory", np.full(SHARED_BYTES * grid[0] * grid[1], 0xCD, np.uint8))
    held: dict[int, int] = {}
    arguments: list[int] = []
    for name, array in arrays.items():
        if array is None or id(array) not in held:
            data = np.zeros(0, np.uint8) if array is None else array.reshape(-1).view(np.uint8)
            arguments.append(memory.add(name, data))
            held[id(array)] = arguments[-1]
        else:
            arguments.append(held[id(array)])
    arguments += numbers
    while len(arguments) < len(kernel.parameters):
        arguments.append(memory.add("scratch", np.zeros(0, np.uint8)))
    machine = Machine(kernel, memory, grid, arguments)
    machine.run()
    return machine.steps


def execute_placed(ptx: str, arrays: dict[str, Any], n: int, stage: int, launch: StepLaunch) -> int:
    """The same, the samples kept in places among others, each with its own row of the table; results go to `arrays`."""
    batch = len(arrays["state"])
    places, one_each = list(PLACES), {name: arrays[name] for name in ("state", "x0", "seeds", "guidance", "broken")}
    kept = {name: each for name, each in one_each.items() if each is not None}
    if arrays["history"] is not None:
        slots = np.zeros((batch, NUM_SLOTS, n), np.float32)
        slots[:, : len(arrays["history"])] = np.moveaxis(arrays["history"].reshape(-1, batch, n), 0, 1)
        kept["history"] = slots
    memory = {name: np.full((NUM_PLACES, *each.shape[1:]), 77, each.dtype) for name, each in kept.items()}
    for name, each in kept.items():
        memory[name][places] = each
    output = arrays["output"].reshape(-1, batch, *arrays["output"].shape[1:])
    for_batch = {name: arrays[name] for name in ("rescale", "bound") if arrays[name] is not None}
    given = {
        **arrays,
        **memory,
        **{name: np.append(each, each[:1]) for name, each in for_batch.items()},
        "next": memory["state"],
        "output": np.ascontiguousarray(np.concatenate([output, output[:, :1]], axis=1)),
        "network_input": None,
        "counter": np.full((batch + 1, 3), -1, np.int32),
    }
    rows = arrays["table"].shape[1]
    for sample, place in enumerate(places):
        given["counter"][sample] = place, stage * rows + sample % rows, stage
    given["counter"][-1] = -1, 0, 0
    steps = execute(ptx, given, (n, 7), launch.grid(n, batch + 1))
    others = [place for place in range(NUM_PLACES) if place not in places]
    for name, each in memory.items():
        assert (each[others] == 77).all(), f"{name} of another sample was touched"
        if name == "history":
            part = np.moveaxis(each[places], 1, 0)[: len(arrays["history"])]
            arrays["history"][...] = part.reshape(arrays["history"].shape)
        else:
            arrays[name][...] = each[places]
    return steps
