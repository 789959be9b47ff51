"""Compiles the step and noise kernels and executes the PTX: `python run_ptx.py [--all] [--architectures 90 120]`.

Every launch must leave the bits that the NumPy twin leaves. It needs Triton, NumPy and skipstep, but neither torch nor
a GPU, so it also runs in an environment of the oldest supported Triton. In a process of its own: the suite has loaded
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
from numpy.typing import NDArray
from ptx_launch import execute, execute_placed

from skipstep.calls.noise import StageNoise, standard_normal
from skipstep.edge.step_binary import argument_types
from skipstep.export.cubins import ARCHITECTURES, compile_for, needed_variants, step_pointers
from skipstep.kernels.launch import StepLaunch, step_constants
from skipstep.kernels.layout import NUM_COLUMNS, Column, StepFlags, Stream
from skipstep.kernels.philox_kernel import philox_normal_kernel
from skipstep.kernels.statistics import Thresholding, rank, rescale_factor_numpy, threshold_bound_numpy
from skipstep.kernels.statistics_kernel import sample_statistics_kernel
from skipstep.kernels.step_kernel import ddim_step_kernel
from skipstep.kernels.step_numpy import NumpyStep
from skipstep.plans.plan import Plan
from skipstep.plans.schedule import NoiseSchedule

SEEDS = np.array([0, 2**64 - 1, 12345], np.uint64)
LAUNCHES = (StepLaunch(256, 1), StepLaunch(1024, 4))
DTYPES = ("fp16", "bf16", "fp32")
THRESHOLDING = Thresholding(0.9, 1.5)
STATISTICS = {
    "fp32": StepFlags(threshold=True),
    "bf16": StepFlags(threshold=True, guided=True, rescale=True, wide_output=True),
    "fp16": StepFlags(guided=True, rescale=True, scale_guidance=True),
}
# The one approximate instruction, ex2.approx: two units in the last place (PTX ISA, ex2) of a factor of sigma·z,
# relative to the largest value.
EXPONENTIAL = 2.0**-21
STAGE, NUM_STAGES = 1, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to compile the step kernel."""

    arch: int
    flags: StepFlags
    dtype: str
    launch: StepLaunch
    wide: bool
    per_sample: bool = False
    store_x0: bool = False
    counted: bool = False
    checked: bool = True
    placed: bool = False
    channels: int = 0

    def ptx(self) -> str:
        constants = step_constants(
            self.flags,
            per_sample=self.per_sample and not self.placed,
            store_x0=self.store_x0,
            counted=self.counted,
            checked=self.checked,
            placed=self.placed,
            channels=self.channels,
        )
        pointers = step_pointers(self.dtype)
        compiled = compile_for(ddim_step_kernel, self.arch, pointers, constants, wide=self.wide, launch=self.launch)
        return str(compiled.asm["ptx"])


def plan_flags() -> tuple[StepFlags, ...]:
    """Every set of flags that plans make, guided or not, with a wide output or not."""
    schedule = NoiseSchedule.linear(1000)
    options: list[dict[str, Any]] = [
        {"clip": clip, "convention": convention, **solver}
        for clip, convention in ((None, "paper"), (1.0, "diffusers"), (1.0, "guided"), ("dynamic", "guided"))
        for solver in ({}, {"eta": 0.5}, {"solver": "ddpm"}, {"solver": "heun"}, {"solver": "dpm_solver_pp_2m"})
    ]
    options.append({"solver": "rk4", "midpoints": "nearest", "clip": None, "convention": "paper"})
    options.append({"guidance_weights": [0.0, *[0.5] * 6, 1.0], "clip": 1.0, "convention": "guided"})
    # Two and three slots as a ring, over x0 and over eps.
    options += [{"solver": solver, "clip": 1.0, "convention": "diffusers"} for solver in ("unipc_2", "unipc_3", "lms")]
    made: dict[StepFlags, None] = {}
    for each in options:
        dynamic = {"dynamic_quantile": 0.9} if each["clip"] == "dynamic" else {}
        flags = Plan(schedule=schedule, steps=8, **each, **dynamic).stage_flags
        for wide in (False, True):
            made |= dict.fromkeys(needed_variants(flags, guided=True, wide_output=wide, rescale=True))
    learned = Plan(schedule=schedule, steps=6, solver="ddpm", variance="learned_range")
    made |= dict.fromkeys(needed_variants(learned.stage_flags, guided=True, wide_output=True))
    return tuple(made)


def cases(architectures: list[int], *, every: bool) -> Iterator[Case]:
    flags = plan_flags()
    for (a, arch), (f, each), (d, dtype) in itertools.product(*map(enumerate, (architectures, flags, DTYPES))):
        turn = a + f + d
        # Every set of flags on every architecture, each dtype on every third; or an eighth, unlike the turns below.
        if turn % (3 if every else 23) == 0 or (f == 0 and d == 0):
            yield Case(
                arch,
                each,
                dtype,
                LAUNCHES[(a + f) % 2],
                wide=f % 3 != 2,
                per_sample=f % 2 == 1,
                store_x0=f % 3 == 1,
                counted=f % 4 == 1 and f % 7 != 3,
                checked=f % 5 != 4,
                placed=f % 7 == 3,
                channels=(0, 4 if f % 3 != 2 else 13)[(a + f) % 4 == 2],
            )


def as_network(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """In the network's dtype; bfloat16 as its bits."""
    if dtype != "bf16":
        return array.astype(np.float16 if dtype == "fp16" else np.float32)
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_float32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else array.astype(np.float32)


def in_order(array: NDArray[Any], channels: int) -> NDArray[Any]:
    """[…, W, n, 1] as it is, or as channels-last images of W times so many channels."""
    if channels == 0:
        return array
    images = array.reshape(*array.shape[:-3], array.shape[-3] * channels, -1)
    return np.ascontiguousarray(images.swapaxes(-1, -2))


def check_step(case: Case, n: int, ptx: str) -> int:
    flags, batch = case.flags, len(SEEDS)
    rng = np.random.default_rng(n)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    table = normal(NUM_STAGES, batch if case.per_sample else 1, NUM_COLUMNS)
    table[..., Column.CLIP] = 0.8
    copies, channels = 1 + flags.guided, 1 + flags.wide_output
    state, x0 = (normal(batch, 1, n, 1) for _ in range(2))
    history = normal(max(1, flags.num_slots), batch, 1, n, 1)
    output = as_network(normal(copies * batch, channels, n, 1), case.dtype)
    if case.checked:
        state[1, 0, n // 16] = np.nan
    guidance, strength = np.array([0.0, 1.5, 7.0], np.float32), np.array([0.0, 0.4, 1.0], np.float32)
    read = as_float32(output, case.dtype)
    twin_state, twin_x0 = state.copy(), x0.copy()
    twin_input = np.empty((flags.input_copies * batch, 1, n, 1), np.float32)
    twin = NumpyStep(
        state=twin_state,
        model_output=read,
        network_input=twin_input,
        table=table,
        flags=[flags] * NUM_STAGES,
        guidance=guidance if flags.guided else None,
        rescale=strength if flags.rescale else None,
        thresholding=THRESHOLDING if flags.threshold else None,
        noise=StageNoise(SEEDS, n, NUM_STAGES) if flags.add_noise else None,
        x0=twin_x0,
    )
    twin.history[:] = history[: flags.num_slots].copy()
    factor, bound = _statistics(flags, state, read, table[STAGE], guidance, strength)
    with np.errstate(all="ignore"):
        twin(STAGE)
    network_input = as_network(twin_input * np.float32(np.nan), case.dtype)
    state, x0, history, output, network_input, twin_state, twin_input, twin_x0 = (
        in_order(each, case.channels)
        for each in (state, x0, history, output, network_input, twin_state, twin_input, twin_x0)
    )
    broken = np.full(batch, 99, np.int32)
    arrays = {
        "state": state,
        "next": state,
        "output": output,
        "network_input": network_input,
        "x0": x0 if case.store_x0 else None,
        "history": history if flags.num_slots else None,
        "table": table,
        "seeds": SEEDS if flags.add_noise else None,
        "guidance": guidance if flags.guided else None,
        "rescale": factor,
        "bound": bound,
        "counter": np.array([STAGE], np.int32) if case.counted else None,
        "broken": broken if case.checked else None,
    }
    if case.placed:
        steps = execute_placed(ptx, arrays, n, STAGE, case.launch)
    else:
        steps = execute(ptx, arrays, (n, 0 if case.counted else STAGE), case.launch.grid(n, batch))
    exact = not flags.learned_variance
    _same("state", state, twin_state, exact)
    if exact and not case.placed:
        expected = as_network(twin_input, case.dtype)
        _same("network input", as_float32(network_input, case.dtype), as_float32(expected, case.dtype), True)
    if case.store_x0:
        _same("x0", x0, twin_x0, exact)
    for slot, (ours, theirs) in enumerate(zip(history, twin.history, strict=False)):
        _same(f"history slot {slot}", ours, in_order(theirs, case.channels), exact)
    if case.checked:
        _same("broken", broken, np.array([99, STAGE, 99], np.int32), True)
    return steps


def check_statistics(arch: int, n: int, dtype: str, flags: StepFlags, launch: StepLaunch) -> int:
    kinds = argument_types("float32", "statistics")
    types = {name: {"int32": "i32", "float32": "fp32"}.get(kind, "*fp32") for name, kind in kinds.items()}
    types["output_ptr"] = f"*{dtype}"
    constants = step_constants(flags, per_sample=False, store_x0=False)
    constants = {name: value for name, value in constants.items() if name in sample_statistics_kernel.arg_names}
    compiled = compile_for(sample_statistics_kernel, arch, types, constants, wide=n % 16 == 0, launch=launch)
    rng, batch = np.random.default_rng(n), len(SEEDS)
    table = rng.standard_normal((NUM_STAGES, 1, NUM_COLUMNS), dtype=np.float32)
    state = rng.standard_normal((batch, 1, n, 1), dtype=np.float32)
    state[1, 0, n // 2] = np.nan
    shape = (1 + flags.guided) * batch, 1 + flags.wide_output, n, 1
    output = as_network(rng.standard_normal(shape, dtype=np.float32), dtype)
    guidance, strength = np.array([0.0, 1.5, 7.0], np.float32), np.array([0.0, 0.4, 1.0], np.float32)
    factor, bound = np.full((2, batch), 7, np.float32)
    arrays = dict(zip(types, (state, output, table, guidance, strength, factor, bound), strict=False))
    low, weight = rank(n, THRESHOLDING.quantile)
    bits = np.array([weight, THRESHOLDING.maximum], np.float32).view(np.uint32).tolist()
    steps = execute(compiled.asm["ptx"], arrays, (low, *bits, n, STAGE), (1, batch))
    found = _statistics(flags, state, as_float32(output, dtype), table[STAGE], guidance, strength)
    for name, ours, theirs in zip(("factor", "bound"), (factor, bound), found, strict=True):
        _same(name, ours, np.full(batch, 7, np.float32) if theirs is None else theirs, True)
    return steps


def _statistics(flags: StepFlags, state: Any, out: Any, row: Any, guidance: Any, strength: Any) -> tuple[Any, Any]:
    """What skipstep.kernels.statistics computes before the step, as the twin does it."""
    batch, channels = state.shape[:2]
    out, factor, bound, ones = out[:, :channels], None, None, (-1, 1, 1, 1)
    conditional = out[:batch]
    if flags.guided:
        scale = guidance.reshape(ones)
        if flags.scale_guidance:
            scale = row[:, Column.GUIDANCE].reshape(ones) * (scale - np.float32(1.0)) + np.float32(1.0)
        out = out[batch:] + scale * (conditional - out[batch:])
    if flags.rescale:
        factor = rescale_factor_numpy(out, conditional, strength)
        out = out * factor.reshape(ones)
    if flags.threshold:
        x0_x, x0_out = (row[:, column].reshape(ones) for column in (Column.X0_X, Column.X0_OUT))
        with np.errstate(all="ignore"):
            bound = threshold_bound_numpy(x0_x * state + x0_out * out, THRESHOLDING)
    return factor, bound


def _same(name: str, ours: NDArray[Any], theirs: NDArray[Any], exact: bool) -> None:
    if exact:
        # A NaN is a NaN, whatever its other bits.
        same = (ours == theirs) | ((ours != ours) & (theirs != theirs))
        assert same.all(), f"{name}: {(~same).sum()} of {same.size} differ, the first at {np.argwhere(~same)[0]}"
    else:
        largest = float(np.nanmax(np.abs(theirs)))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=EXPONENTIAL * largest, err_msg=name)


def check_noise(arch: int, n: int, dtype: str, copies: int, launch: StepLaunch) -> int:
    # In half precision Triton regroups these by stmatrix, which the machine does not know.
    channels = 4 if dtype == "fp32" and n % 4 == 0 else 0
    pointers = {"state_ptr": "*fp32", "network_input_ptr": f"*{dtype}", "seeds_ptr": "*i64", "given_ptr": "*i32"}
    names = dict(zip(philox_normal_kernel.arg_names, pointers.values(), strict=False))
    constants = {"STREAM": int(Stream.INITIAL), "COPIES": copies, "CHOOSES": copies == 2, "CHANNELS": channels}
    ptx = compile_for(philox_normal_kernel, arch, names, constants, wide=n % 16 == 0, launch=launch).asm["ptx"]
    batch = len(SEEDS)
    state = in_order(np.zeros((batch, 1, n, 1), np.float32), channels)
    network_input = np.concatenate([as_network(state, dtype)] * copies)
    given = np.zeros(1, np.int32) if copies == 2 else None
    arrays = {"state": state, "network_input": network_input, "seeds": SEEDS, "given": given}
    steps = execute(ptx, arrays, (n, 0), launch.grid(n, batch))
    expected = standard_normal(SEEDS, n, stage=0, stream=Stream.INITIAL).reshape(batch, 1, n, 1)
    expected = in_order(expected, channels)
    _same("noise", state, expected, True)
    _same("network input", network_input, np.concatenate([as_network(expected, dtype)] * copies), True)
    return steps


def noticed(case: Case, changes: list[str]) -> str:
    """Make each change, written as "old=new", in one instruction of the kernel at a time; how many are noticed."""
    ptx, count, missed = case.ptx(), 0, []
    rng = np.random.default_rng(0)
    for each in changes:
        old, _, new = each.partition("=")
        places = [index for index in range(len(ptx)) if ptx.startswith(old, index)]
        assert places, f"no {old} in the kernel"
        for place in rng.choice(places, min(len(places), 6), replace=False):
            count += 1
            changed = ptx[:place] + new + ptx[place + len(old) :]
            try:
                # A thread has eight elements; the sizes put NaN in each of their places.
                for n in range(1040, 1168, 16):
                    check_step(case, n, changed)
            except (AssertionError, KeyError):
                continue
            line = ptx.count("\n", 0, place)
            missed.append(f"{each}: {ptx.splitlines()[line].strip()}")
    return f"{count - len(missed)} of {count} changes noticed; " + "; ".join(missed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every set of flags that plans make")
    parser.add_argument("--architectures", type=int, nargs="+", default=[90, 120], choices=ARCHITECTURES)
    parser.add_argument("--changes", nargs="+", metavar="OLD=NEW", help="plant these in one kernel, and count")
    options = parser.parse_args()
    if options.changes:
        flags = StepFlags(clip=True, rederive_eps=True, add_noise=True, guided=True)
        print(noticed(Case(90, flags, "fp16", LAUNCHES[1], wide=True, store_x0=True), options.changes))
        return
    started, count, steps = time.perf_counter(), 0, 0
    for case in cases(options.architectures, every=options.all):
        ptx = case.ptx()
        # More than one program a sample, and a last one that is not full.
        for n in (1040, 16) if case.wide else (1027, max(1, case.channels)):
            try:
                steps += check_step(case, n, ptx)
            except AssertionError as error:
                raise AssertionError(f"{case}, {n} elements: {error}") from error
            count += 1
    for arch, n, dtype, copies in itertools.product(options.architectures, (1040, 37), DTYPES[:: 1 + 1], (1, 2)):
        steps += check_noise(arch, n, dtype, copies, LAUNCHES[copies - 1])
        count += 1
    end = None if options.all else 1  # A quarter of it all.
    for arch, (dtype, flags), n in itertools.product(options.architectures[:end], STATISTICS.items(), (1040, 37)[:end]):
        steps += check_statistics(arch, n, dtype, flags, LAUNCHES[n % 2])
        count += 1
    seconds = time.perf_counter() - started
    names = ", ".join(f"sm_{each}" for each in options.architectures)
    print(f"Triton {triton.__version__}: {count} launches for {names} have the twin's bits, {seconds:.0f} s")
    print(f"{steps / 1e6:.0f} million instructions of threads")


if __name__ == "__main__":
    main()
