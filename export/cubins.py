"""The kernels of a loop compiled ahead of time, for any NVIDIA architecture, on a machine without a GPU.

`compile_kernels` makes what skipstep.edge.launcher runs on a machine without Triton: cubins, each with the facts that a
launch needs. The facts come from the compiler's output: arguments from the PTX,
checked against the kernel's declaration; shared memory and registers from the machine code.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from skipstep.edge.step_binary import (
    HIDDEN_ARGUMENTS,
    POINTER_ALIGNMENT,
    KernelArgument,
    Purpose,
    StepBinaryFacts,
    argument_types,
)
from skipstep.errors import ExportError, InputError, needs_packages
from skipstep.kernels.launch import DEFAULT_LAUNCH, StepLaunch, step_constants
from skipstep.kernels.layout import StepFlags, Stream

with needs_packages("triton, which compiles the kernels", remedy="pip install 'skipstep[torch]'"):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version
    from triton.compiler import ASTSource

    from skipstep.kernels.philox_kernel import philox_normal_kernel
    from skipstep.kernels.statistics_kernel import sample_statistics_kernel
    from skipstep.kernels.step_kernel import ddim_step_kernel

# 87: Orin; 110: Thor; 100, 103, 120 and 121: Blackwell, where no cubin of one runs on another. There is no 101.
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)

# The compiler may only use wide accesses where it knows that addresses are multiples of 16 bytes.
_ALIGNED = [["tt.divisibility", POINTER_ALIGNMENT]]

# Triton's names for what skipstep.edge.step_binary calls by NumPy's.
_TRITON_TYPES: Final[Mapping[str, str]] = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "int64": "i64",
    "int32": "i32",
}
# A sample's statistics are one program, read many times: as many threads as there are bytes to wait for.
_KERNELS: Final[Mapping[Purpose, tuple[Any, StepLaunch]]] = {
    "step": (ddim_step_kernel, DEFAULT_LAUNCH),
    "noise": (philox_normal_kernel, DEFAULT_LAUNCH),
    "statistics": (sample_statistics_kernel, StepLaunch(4096, 16)),
}
Kernel = tuple[Purpose, StepFlags]
_NETWORK_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class StepBinary:
    """One compiled step kernel: machine code, what a launch must know of it, and the assembly that it was made from."""

    facts: StepBinaryFacts
    cubin: bytes
    ptx: str


def parse_architecture(name: str) -> int:
    """87 for "sm_87". Raises InputError, which lists the architectures there are."""
    names = {f"sm_{architecture}": architecture for architecture in ARCHITECTURES}
    if name not in names:
        raise InputError(
            got=f"architecture {name!r}",
            expected="one of " + ", ".join(names),
            remedy="pass the compute capability of the target device, sm_87 for 8.7",
        )
    return names[name]


def needed_variants(
    stage_flags: Iterable[StepFlags], *, guided: bool, wide_output: bool, rescale: bool = False
) -> tuple[StepFlags, ...]:
    """What the steps of plans compile to, each once, in order of first use.

    `stage_flags` are the plans' (for a batch of unequal plans, those of its Stages). `guided`: calls may ask for
    guidance, so both forms are needed; `rescale`: they may ask for guidance rescale with it. `wide_output`: the network
    has 2C output channels.
    """
    calls = [(False, False)]
    if guided:
        calls += [(True, False)] + [(True, True)] * rescale
    variants = {
        flags.in_call(guided=with_guidance, rescale=with_rescale, wide_output=wide_output): None
        for flags in stage_flags
        for with_guidance, with_rescale in calls
    }
    return tuple(variants)


def loop_kernels(variants: Iterable[StepFlags]) -> tuple[Kernel, ...]:
    """All that a loop over steps of these variants launches: x_T, the steps, and the statistics before them, each once.

    x_T is drawn, or a given one taken, before the first step; `guided` there: also for a doubled batch.
    """
    variants = tuple(variants)
    steps: list[Kernel] = [("step", each) for each in variants]
    statistics: list[Kernel] = [("statistics", flags) for each in variants if (flags := each.of_statistics) is not None]
    noise: list[Kernel] = [("noise", StepFlags(guided=each.input_copies == 2)) for each in variants]
    return tuple(dict.fromkeys([*steps, *statistics, *noise]))


def compile_kernels(
    architectures: Iterable[int], kernels: Iterable[Kernel], dtypes: Iterable[str], *, num_elements: int
) -> tuple[StepBinary, ...]:
    """Compile every combination; nothing is launched and no GPU is needed.

    `dtypes` are the network's: "float16", "bfloat16", "float32". `num_elements` is C·H·W of a sample: where 16 divides
    it the kernel may move 16 bytes at a time, otherwise it takes any number. Raises InputError and ExportError.
    """
    architectures, dtypes = tuple(architectures), tuple(dtypes)
    for architecture in architectures:
        parse_architecture(f"sm_{architecture}")
    for dtype in dtypes:
        if dtype not in _NETWORK_DTYPES:
            raise InputError(
                got=f"dtype {dtype!r}",
                expected="one of " + ", ".join(_NETWORK_DTYPES),
                remedy="pass the dtype of the network's input and output",
            )
    return tuple(
        _compile_binary(architecture, purpose, flags, dtype, num_elements=num_elements)
        for architecture, (purpose, flags), dtype in product(architectures, tuple(kernels), dtypes)
    )


def _compile_binary(
    architecture: int, purpose: Purpose, flags: StepFlags, dtype: str, *, num_elements: int
) -> StepBinary:
    multiple = POINTER_ALIGNMENT if num_elements % POINTER_ALIGNMENT == 0 else 1
    types = argument_types(dtype, purpose)
    kernel, launch = _KERNELS[purpose]
    constants = step_constants(flags, per_sample=False, store_x0=False)
    constants |= {"STREAM": int(Stream.INITIAL), "COPIES": flags.input_copies, "CHOOSES": 1, "CHANNELS": 0}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    arguments = {name: _triton_type(kind) for name, kind in types.items()}
    compiled = compile_for(kernel, architecture, arguments, constants, wide=multiple > 1, launch=launch)
    ptx, cubin, metadata = compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise ExportError(
            got=f"a kernel with scratch memory or clusters, for sm_{architecture}",
            expected="one that needs neither, as the launcher gives it neither",
            remedy="compile without profiling or instrumentation",
        )
    usage = resource_usage(cubin)
    facts = StepBinaryFacts(
        architecture=architecture,
        target=_search(r"^\.target\s+(\w+)", ptx),
        kernel=metadata.name,
        flags=flags,
        network_dtype=dtype,
        block_size=launch.block_size,
        num_warps=metadata.num_warps,
        static_shared_bytes=usage["SHARED"],
        dynamic_shared_bytes=metadata.shared,
        registers=usage["REG"],
        pointer_alignment=POINTER_ALIGNMENT,
        num_elements_multiple=multiple,
        arguments=_arguments(ptx, types),
        compiler=f"triton {triton.__version__}",
        toolkit=_toolkit(cubin),
        purpose=purpose,
    )
    return StepBinary(facts, cubin, ptx)


def _arguments(ptx: str, types: Mapping[str, str]) -> tuple[KernelArgument, ...]:
    """The kernel's arguments, then those that Triton appends: how many depends on its version, so the PTX decides."""
    arguments = [KernelArgument(name, kind) for name, kind in types.items()]
    declared = re.findall(r"\.param\s+\.[a-z](\d+)", _search(r"\.entry[^(]*\(([^)]*)\)", ptx))
    hidden = HIDDEN_ARGUMENTS[: len(declared) - len(arguments)]
    arguments += [KernelArgument(name, "*int8") for name in hidden]
    sizes = [int(bits) // 8 for bits in declared]
    if sizes != [argument.num_bytes for argument in arguments]:
        raise ExportError(
            got=f"parameters of {sizes} bytes in the kernel that triton {triton.__version__} made",
            expected=f"those of {', '.join(argument.name for argument in arguments)}",
            remedy="install a version of triton that skipstep knows",
        )
    return tuple(arguments)


def step_pointers(dtype: str) -> dict[str, str]:
    """The step kernel's pointers in Triton's types; the network in `dtype`, one of Triton's too."""
    types = argument_types("float32")
    pointers = {name: _triton_type(kind) for name, kind in types.items() if kind.startswith("*")}
    return pointers | {"output_ptr": f"*{dtype}", "network_input_ptr": f"*{dtype}"}


def _triton_type(kind: str) -> str:
    return kind[: kind.startswith("*")] + _TRITON_TYPES[kind.removeprefix("*")]


def compile_for(
    kernel: Any,
    arch: int,
    pointers: Mapping[str, str],
    constants: Mapping[str, int],
    *,
    wide: bool,
    launch: StepLaunch = DEFAULT_LAUNCH,
) -> Any:
    """What Triton makes of it. `wide`: num_elements is a multiple of 16, so every sample begins at one."""
    values: dict[str, int] = {**constants, "BLOCK": launch.block_size}
    types = {**pointers, "num_elements": "i32", "stage": "i32"}
    aligned = [name for name, kind in types.items() if kind.startswith("*")] + ["num_elements"] * wide
    return compile_kernel(kernel, arch, types, values, aligned=aligned, num_warps=launch.num_warps)


def compile_kernel(
    kernel: Any,
    arch: int,
    types: Mapping[str, str],
    constants: Mapping[str, float],
    *,
    aligned: Iterable[str],
    num_warps: int,
) -> Any:
    """What Triton makes of a kernel over arguments of these types, then constants; 16 divides those that are `aligned`.
    Raises ExportError."""
    if not isinstance(kernel, triton.JITFunction):
        raise ExportError(
            got="kernels that were loaded for Triton's interpreter",
            expected="kernels that can be compiled",
            remedy="unset TRITON_INTERPRET and start again",
        )
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    names = list(signature)
    assert names == kernel.arg_names, "a kernel's arguments are told by position"
    with triton.knobs.compilation.scope(), _oldest_assembler(arch) as options:
        # They would triple the size, and tell the folders of the machine that compiled.
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(
            ASTSource(
                fn=kernel,
                signature=signature,
                constexprs=dict(constants),
                attrs={(names.index(name),): _ALIGNED for name in aligned},
            ),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": num_warps, "enable_fp_fusion": False, **options},
        )


@contextlib.contextmanager
def _oldest_assembler(arch: int) -> Iterator[dict[str, int]]:
    """Within it Triton assembles with the older of its two assemblers, where that knows the architecture: the cubin of
    a newer one needs a newer driver. Gives the options that this takes."""
    tools = triton.knobs.nvidia
    with tools.scope():
        if get_ptxas(arch).path == tools.ptxas.path or not assembles(tools.ptxas.path, arch):
            yield {}
            return
        tools.ptxas_blackwell = tools.ptxas.path
        # Triton has noted the newer one's.
        yield {"ptx_version": ptx_get_version(tools.ptxas.version)}


@functools.lru_cache
def assembles(ptxas: str, arch: int) -> bool:
    """Whether an assembler knows an architecture."""
    said = subprocess.run([ptxas, "--help"], check=True, capture_output=True, text=True).stdout
    return f"'sm_{arch}'" in said


def resource_usage(cubin: bytes) -> dict[str, int]:
    usage = dump_cubin(cubin, "-res-usage")
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def _toolkit(cubin: bytes) -> str:
    """Release of the assembler, "12.9": older cubins say 129 instead."""
    release = _search(r"toolkit\s*=\s*([\d.]+)", dump_cubin(cubin, "-elf"))
    return release if "." in release else f"{release[:-1]}.{release[-1]}"


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ExportError(
            got=f"compiler output without {pattern}",
            expected="PTX and cubins of the form that skipstep knows",
            remedy="install a version of triton that skipstep knows",
        )
    return found[1]


def dump_cubin(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.cubin"
        file.write_bytes(cubin)
        # nvdisasm, which -sass needs, lies beside it and is looked up on the path.
        result = subprocess.run(
            [tool, option, file], capture_output=True, text=True, check=True, env={"PATH": str(tool.parent)}
        )
    return result.stdout
