"""Compiles GroupNorms and executes the PTX: `python run_norms.py [--architectures 90 120]`.

Every launch must give what the definition gives in float64, rounded. It needs Triton, NumPy and skipstep, but neither
torch nor a GPU, so it also runs in an environment of the oldest supported Triton.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import triton
from ptx_launch import execute
from run_ptx import DTYPES, as_float32, as_network

from skipstep.export.cubins import ARCHITECTURES

sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from group_norm_numpy import group_norm_numpy
from norm_inspection import NormCase

SAMPLES = 2
# Half a unit in the last place, relative; and what float32 sums, ex2.approx and div.full (two units each) leave of the
# largest value.
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 0.0}
FLOAT32 = 4e-6
# Several warps, the largest tile, two launches, an odd size by one warp, one element.
SHAPES = ((2, 4, 1024), (1, 12, 1024), (2, 10, 4096), (2, 6, 3001), (3, 3, 35), (2, 1, 1))


def cases() -> Iterator[NormCase]:
    """Every shape in every dtype and order; what is added, SiLU and weights in turn."""
    added = ("vector", "image", "")
    for turn, (shape, dtype, last) in enumerate(itertools.product(SHAPES, DTYPES, (False, True))):
        yield NormCase(*shape, dtype, last, added[turn % 3], silu=turn % 4 != 3, affine=turn % 5 != 4)


def check_norm(case: NormCase, kernels: list[str]) -> int:
    """Run the assembly of a norm's kernels, in order, and compare. Thread instructions run."""
    rng, width = np.random.default_rng(0), case.groups * case.channels
    shape = (SAMPLES, width, case.positions)

    def normal(*shape: int):
        return as_network(rng.standard_normal(shape, dtype=np.float32), case.dtype)

    def stored(array):
        """As it stands in memory; the same way back."""
        return np.ascontiguousarray(array.swapaxes(1, 2)) if case.channels_last else array

    # A mean far from 0, and a NaN in the last group of the first sample.
    x = as_network(5 + rng.standard_normal(shape, dtype=np.float32), case.dtype)
    x[0, -1, -1] = as_network(np.array([np.nan], np.float32), case.dtype)[0]
    given = {"vector": normal(SAMPLES, width), "image": normal(*shape), "weight": normal(width), "bias": normal(width)}
    used = ("weight", "bias") * case.affine + (case.added,)
    exact = {name: as_float32(each, case.dtype) for name, each in given.items() if name in used}
    expected, total = group_norm_numpy(as_float32(x, case.dtype), case.groups, eps=case.eps, silu=case.silu, **exact)
    out, summed = (np.zeros_like(stored(x)) for _ in range(2))
    launch = case.launch
    partials = np.zeros((SAMPLES, case.groups, 2, launch.tiles), np.float32) if launch.tiles > 1 else None
    # None is a pointer that must not be followed.
    operands = {name: stored(each) if name == "image" else each for name, each in given.items() if name in used}
    read = {"x": stored(x), **{name: operands.get(name) for name in ("vector", "image")}}
    affine = {name: operands.get(name) for name in ("weight", "bias")}
    last = {**affine, "partials": partials, "out": out, "sum": summed if case.added == "image" else None}
    steps, grid = 0, (case.groups * launch.tiles, SAMPLES)
    for arrays, ptx in zip([{"partials": partials}] * (len(kernels) - 1) + [last], kernels, strict=True):
        steps += execute(ptx, {**read, **arrays}, (), grid)
    _close("result", as_float32(stored(out), case.dtype), expected, case.dtype)
    if case.added == "image":
        _close("sum", as_float32(stored(summed), case.dtype), total, case.dtype)
    return steps


def _close(name: str, found, expected, dtype: str) -> None:
    wrong = np.isnan(found) != np.isnan(expected)
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} are NaN on one side only"
    allowed = ROUNDING[dtype] * np.abs(expected) + FLOAT32 * max(1.0, np.nanmax(np.abs(expected), initial=0.0))
    error = np.nan_to_num(np.abs(found - expected))
    assert (error <= np.nan_to_num(allowed)).all(), f"{name}: {error.max()} away"


def noticed(case: NormCase, arch: int, changes: list[str]) -> str:
    """Make each change, "old=new", in one instruction at a time; how many are noticed."""
    kernels, rng, count, missed = assembly(case, arch), np.random.default_rng(0), 0, []
    for (old, new), index in itertools.product((each.split("=") for each in changes), range(len(kernels))):
        ptx = kernels[index]
        places = [place for place in range(len(ptx)) if ptx.startswith(old, place)]
        for place in rng.choice(places, min(len(places), 4), replace=False) if places else ():
            count += 1
            changed = ptx[:place] + new + ptx[place + len(old) :]
            try:
                check_norm(case, [*kernels[:index], changed, *kernels[index + 1 :]])
            except (AssertionError, KeyError):
                continue
            missed.append(f"{old}={new}: {ptx[place : ptx.index(';', place)]}")
    return f"{count - len(missed)} of {count} changes noticed; " + "; ".join(missed)


def assembly(case: NormCase, arch: int) -> list[str]:
    return [made.asm["ptx"] for made in case.compiled(arch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", default=[90, 120], choices=ARCHITECTURES)
    parser.add_argument("--changes", nargs="+", metavar="OLD=NEW", help="plant these in two norms, and count")
    options = parser.parse_args()
    if options.changes:
        for shape in ((2, 4, 64), (2, 3, 5000)):
            # An eps that shows, and no SiLU, which makes small what is far below 0.
            case = replace(NormCase(*shape, "fp32", added="vector"), eps=0.5, silu=False)
            print(noticed(case, options.architectures[0], options.changes))
        return
    started, count, steps = time.perf_counter(), 0, 0
    for arch, case in itertools.product(options.architectures, cases()):
        try:
            steps += check_norm(case, assembly(case, arch))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
        count += 1
    names, seconds = ", ".join(f"sm_{each}" for each in options.architectures), time.perf_counter() - started
    print(f"Triton {triton.__version__}: {count} norms for {names} are their definition's, {seconds:.0f} s")
    print(f"{steps / 1e6:.0f} million instructions of threads")


if __name__ == "__main__":
    main()
