"""What the step kernel compiles to, for every architecture: `python tests/kernels/step_code.py --out FILE`.

    bytes an element = Σ over the accesses to operands of bytes / elements a thread

counted in the assembly, beside the fewest possible: the state in and out, the network's output and its next input, each
once. Coefficients, seeds and scales are scalars, the same for all threads of a program, and are not counted.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from skipstep.bench.record import write_json
from skipstep.export.cubins import ARCHITECTURES
from skipstep.export.kernel_inspection import DTYPES, VARIANTS, KernelFacts, inspect_step
from skipstep.kernels.launch import DEFAULT_LAUNCH, StepLaunch
from skipstep.kernels.layout import StepFlags

_ITEM_SIZES: Final = {"fp16": 2, "bf16": 2, "fp32": 4}
# Plain DDIM, and all of it at once: guided, clipped, with noise.
_CASES: Final = tuple((variant, dtype) for variant in ("plain", "everything") for dtype in _ITEM_SIZES)
_SMALL: Final = {"fp16": StepLaunch(256, 1), "bf16": StepLaunch(256, 1), "fp32": StepLaunch(128, 1)}


def traffic(facts: KernelFacts, launch: StepLaunch = DEFAULT_LAUNCH) -> dict[str, Any]:
    """What a kernel moves for an element of the state, beside the least that its flags allow, and how wide."""
    return {
        "bytes_per_element": operand_bytes(facts.global_accesses) / launch.elements_per_thread,
        "least_bytes_per_element": least_bytes(VARIANTS[facts.variant], facts.dtype),
        "widest_access_bits": max(int(form.split(".")[1]) for form in facts.machine_accesses),
    }


def inspect_small(arch: int, variant: str, dtype: str) -> dict[str, Any]:
    """The kernel as loops on a GPU launch it for small samples: programs of one warp, which check each sample."""
    launch = _SMALL[dtype]
    facts = inspect_step(arch, variant, dtype, launch=launch, checked=True)
    return {**asdict(facts), **asdict(launch), **traffic(facts, launch)}


def operand_bytes(global_accesses: Mapping[str, int]) -> int:
    """Bytes that a thread moves by accesses to several elements: "ld.v4.b32" is one of 16 bytes. Scalars are v1."""
    total = 0
    for form, count in global_accesses.items():
        _, lanes, width = form.split(".")
        if lanes != "v1":
            total += count * int(lanes[1:]) * int(width.strip("bfus")) // 8
    return total


def least_bytes(flags: StepFlags, dtype: str) -> int:
    """Each operand read once, each result written once; for an element of the state."""
    float32 = 2 + len(flags.read_slots) + len(flags.written_slots)
    network = 2 * (1 + flags.guided) + flags.learned_variance * (1 + flags.guided)
    return 4 * float32 + _ITEM_SIZES[dtype] * network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="SM")
    parser.add_argument(
        "--small", action="store_true", help="what the page shows too: bfloat16, programs for small samples, bytes"
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    cases = dict.fromkeys([*itertools.product(VARIANTS, DTYPES), *(_CASES if options.small else ())])
    kernels = [inspect_step(arch, *case) for arch in options.arch for case in cases]
    result: dict[str, Any] = {"kernels": [asdict(facts) for facts in kernels]}
    if options.small:
        names = ("arch", "variant", "dtype")
        result["traffic"] = [{name: getattr(k, name) for name in names} | traffic(k) for k in kernels]
        result["small"] = [inspect_small(arch, *case) for arch in options.arch for case in _CASES]
    write_json(options.out, result)


if __name__ == "__main__":
    main()
