"""What the compiler made of a kernel: registers, spills, local memory, and the width and number of global accesses.

Tests assert on these facts: a change that adds a spill or narrows an access is found without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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


def compile_step(
    arch: int, flags: StepFlags, dtype: str, *, launch: StepLaunch = DEFAULT_LAUNCH, checked: bool = False
) -> tuple[str, bytes]:
    """PTX and cubin of `ddim_step_kernel` for sm_`arch`, the network in `dtype` ("fp16", "bf16" or "fp32")."""
    constants = step_constants(flags, per_sample=False, store_x0=False, checked=checked)
    return compile_kernel(ddim_step_kernel, arch, step_pointers(dtype), constants, launch=launch)


def compile_kernel(
    kernel: Any,
    arch: int,
    pointers: Mapping[str, str],
    constants: Mapping[str, int],
    *,
    launch: StepLaunch = DEFAULT_LAUNCH,
) -> tuple[str, bytes]:
    """PTX and cubin of a kernel over (pointers, num_elements, stage, constants, BLOCK), launched as the step is."""
    compiled = compile_for(kernel, arch, pointers, constants, wide=True, launch=launch)
    return compiled.asm["ptx"], compiled.asm["cubin"]


def inspect_step(
    arch: int, variant: str, dtype: str, *, launch: StepLaunch = DEFAULT_LAUNCH, checked: bool = False
) -> KernelFacts:
    """Compile one variant and read the facts out of its PTX, its cubin and its machine code.

    `checked`: with the mark for samples that are not finite, as loops on a GPU launch it.
    """
    ptx, cubin = compile_step(arch, VARIANTS[variant], dtype, launch=launch, checked=checked)
    return inspect_kernel(ptx, cubin, arch=arch, variant=variant, dtype=dtype)


def inspect_kernel(ptx: str, cubin: bytes, *, arch: int, variant: str, dtype: str) -> KernelFacts:
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
