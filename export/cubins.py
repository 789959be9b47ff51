"""The step kernel compiled ahead of time, for any NVIDIA architecture, on a machine without a GPU.

`inspect_step` says what the compiler made of a variant: registers, spills, local memory, and the width and number of
accesses to global memory. Tests assert on these, and skipstep.bench.step_codegen records them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipstep.errors import MissingDependencyError
from skipstep.kernels.launch import DEFAULT_LAUNCH, step_constants
from skipstep.kernels.layout import StepFlags

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from skipstep.kernels.step_kernel import ddim_step_kernel
except ImportError as error:
    raise MissingDependencyError(
        got=f"no package {error.name}",
        expected="triton, which compiles the kernels",
        remedy="pip install 'skipstep[torch]'",
    ) from error

# 100, 103 and 12x: Blackwell; 110: Thor; 87: Orin. There is no 101.
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)

# From what plain DDIM costs to what everything of DDIM at once costs, and the solvers that remember.
VARIANTS: Mapping[str, StepFlags] = {
    "plain": StepFlags(),
    "clip": StepFlags(clip=True),
    "everything": StepFlags(clip=True, rederive_eps=True, add_noise=True, guided=True),
    "multistep": StepFlags(add_state=True, read_memory=True, write_memory=True),
    "runge_kutta": StepFlags(read_base=True, read_memory=True, write_memory=True),
    "learned_variance": StepFlags(clip=True, add_state=True, add_noise=True, learned_variance=True, wide_output=True),
}
DTYPES = ("fp16", "fp32")

# The compiler may only use wide accesses where it knows that addresses are multiples of 16 bytes.
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """One compiled kernel. Accesses are per thread: "ld.v4.b32" → how many instructions of that form.

    Accesses to shared memory exchange elements between threads, where the network's dtype is narrower than the state
    and both are still to be read and written 16 bytes at a time.
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
    global_accesses: Mapping[str, int]


def compile_step(arch: int, flags: StepFlags, dtype: str) -> tuple[str, bytes]:
    """PTX and cubin of `ddim_step_kernel` for sm_`arch`, the network in `dtype` ("fp16", "bf16" or "fp32")."""
    pointers = {
        "state_ptr": "*fp32",
        "next_ptr": "*fp32",
        "output_ptr": f"*{dtype}",
        "network_input_ptr": f"*{dtype}",
        "x0_ptr": "*fp32",
        "base_ptr": "*fp32",
        "memory_ptr": "*fp32",
        "table_ptr": "*fp32",
        "seeds_ptr": "*i64",
        "guidance_ptr": "*fp32",
        "rescale_ptr": "*fp32",
        "bound_ptr": "*fp32",
    }
    return compile_kernel(ddim_step_kernel, arch, pointers, step_constants(flags, per_sample=False, store_x0=False))


def compile_kernel(
    kernel: Any, arch: int, pointers: Mapping[str, str], constants: Mapping[str, bool]
) -> tuple[str, bytes]:
    """PTX and cubin of a kernel over (pointers, num_elements, stage, constants, BLOCK), launched as the step is."""
    values: dict[str, int] = {**constants, "BLOCK": DEFAULT_LAUNCH.block_size}
    signature = {**pointers, "num_elements": "i32", "stage": "i32", **dict.fromkeys(values, "constexpr")}
    names = list(signature)
    aligned = {(names.index(name),): _ALIGNED for name in (*pointers, "num_elements")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": DEFAULT_LAUNCH.num_warps, "enable_fp_fusion": False},
    )
    return compiled.asm["ptx"], compiled.asm["cubin"]


def inspect_step(arch: int, variant: str, dtype: str) -> KernelFacts:
    """Compile one variant and read the facts out of its PTX, its cubin and its machine code."""
    return inspect_kernel(*compile_step(arch, VARIANTS[variant], dtype), arch=arch, variant=variant, dtype=dtype)


def inspect_kernel(ptx: str, cubin: bytes, *, arch: int, variant: str, dtype: str) -> KernelFacts:
    usage, sass = _dump(cubin, "-res-usage"), _dump(cubin, "-sass")
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    accesses: dict[str, int] = {}
    for form in re.findall(r"(?:ld|st)\.global(?:\.\w+)*", ptx):
        operation, *_, width = form.split(".")
        vector = next((part for part in form.split(".") if re.fullmatch(r"v\d", part)), "v1")
        key = f"{operation}.{vector}.{width}"
        accesses[key] = accesses.get(key, 0) + 1
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
        global_accesses=accesses,
    )


def _dump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.cubin"
        file.write_bytes(cubin)
        # nvdisasm, which -sass needs, lies beside it and is looked up on the path.
        result = subprocess.run(
            [tool, option, file], capture_output=True, text=True, check=True, env={"PATH": str(tool.parent)}
        )
    return result.stdout
