"""What the compiler made of a kernel: registers, spills, local memory, and the width and number of global accesses.

A change that adds a spill or narrows an access is found without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from skipstep.export.cubins import compile_for, dump_cubin, resource_usage, step_pointers
from skipstep.kernels.launch import DEFAULT_LAUNCH, StepLaunch, step_constants
from skipstep.kernels.layout import StepFlags
from skipstep.kernels.step_kernel import ddim_step_kernel

# From what plain DDIM costs to what everything of DDIM at once costs, and the solvers that remember.
VARIANTS: Mapping[str, StepFlags] = {
    "plain": StepFlags(),
    "clip": StepFlags(clip=True),
    "everything": StepFlags(clip=True, rederive_eps=True, add_noise=True, guided=True),
    "multistep": StepFlags(add_state=True, read_h0=True, write_h0=True),
    "runge_kutta": StepFlags(read_h0=True, read_h1=True, write_h1=True),
    "ring": StepFlags(add_state=True, read_h0=True, read_h1=True, read_h2=True, write_h2=True),
    "learned_variance": StepFlags(clip=True, add_state=True, add_noise=True, learned_variance=True, wide_output=True),
}
DTYPES = ("fp16", "fp32")


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """One compiled kernel. Accesses are per thread: "ld.v4.b32" → how many instructions of that form.

    `machine_accesses` are those of the machine code, by kind and bits: "LDG.128". Accesses to shared memory exchange
    elements between threads, where the network's dtype is narrower than the state and both are still to be read and
    written 16 bytes at a time; `barriers` are what threads wait at for each other there.
    """

    arch: int
    variant: str
    dtype: str
    registers: int
    stack_bytes: int
    local_bytes: int
    spill_instructions: int
    fused_multiply_adds: int
    shared_accesses: int
    barriers: int
    global_accesses: Mapping[str, int]
    machine_accesses: Mapping[str, int]


def inspect_step(
    arch: int, variant: str, dtype: str, *, launch: StepLaunch = DEFAULT_LAUNCH, checked: bool = False
) -> KernelFacts:
    """Compile one variant and read the facts out of its PTX, its cubin and its machine code.

    `checked`: with the mark for samples that are not finite, as loops on a GPU launch it.
    """
    constants = step_constants(VARIANTS[variant], per_sample=False, store_x0=False, checked=checked)
    made = compile_for(ddim_step_kernel, arch, step_pointers(dtype), constants, wide=True, launch=launch)
    return inspect_kernel(made, arch=arch, variant=variant, dtype=dtype)


def inspect_kernel(made: Any, *, arch: int, variant: str, dtype: str) -> KernelFacts:
    """The facts of what Triton made."""
    ptx, cubin = made.asm["ptx"], made.asm["cubin"]
    resources, sass = resource_usage(cubin), dump_cubin(cubin, "-sass")
    accesses: dict[str, int] = {}
    for form in re.findall(r"(?:ld|st)\.global(?:\.\w+)*", ptx):
        operation, *_, width = form.split(".")
        vector = next((part for part in form.split(".") if re.fullmatch(r"v\d", part)), "v1")
        key = f"{operation}.{vector}.{width}"
        accesses[key] = accesses.get(key, 0) + 1
    machine: dict[str, int] = {}
    for form in re.findall(r"\b(?:LDG|STG)(?:\.\w+)*", sass):  # LDG.E.128.SYS; of 32 bits where it says none.
        kind, *rest = form.split(".")
        key = f"{kind}.{next(filter(str.isdigit, rest), 32)}"
        machine[key] = machine.get(key, 0) + 1
    return KernelFacts(
        arch=arch,
        variant=variant,
        dtype=dtype,
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        local_bytes=resources["LOCAL"],
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        # In PTX, where every operation of ours stands; machine code has more, inside the exact square root.
        fused_multiply_adds=len(re.findall(r"\bfma\.", ptx)),
        shared_accesses=len(re.findall(r"\b(?:ld|st)\.shared|ldmatrix|stmatrix", ptx)),
        barriers=len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", ptx)),
        global_accesses=accesses,
        machine_accesses=machine,
    )


def inspect_small(arch: int, variant: str, dtype: str) -> dict[str, Any]:
    """The kernel as loops on a GPU launch it for small samples, in programs of one warp, which check each sample; and
    the bytes that it moves for an element of the state, beside the least that its flags allow."""
    launch = StepLaunch(256 if dtype == "fp16" else 128, 1)
    facts = inspect_step(arch, variant, dtype, launch=launch, checked=True)
    return asdict(facts) | {
        "bytes_per_element": operand_bytes(facts.global_accesses) / launch.elements_per_thread,
        "least_bytes_per_element": least_bytes(VARIANTS[variant], dtype),
        "widest_access_bits": max(int(form.split(".")[1]) for form in facts.machine_accesses),
    }


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
    return 4 * float32 + {"fp16": 2, "fp32": 4}[dtype] * network
