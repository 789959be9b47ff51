"""The facts that a launcher needs of a kernel that was compiled ahead of time, and their form in JSON.

    kernel(arguments in the order of `arguments`), on `grid` programs of 32·num_warps threads

skipstep.export.cubins takes these facts from the compiler; skipstep.edge.launcher uses them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Final, Literal, Self

from skipstep.errors import ModelFormatError
from skipstep.kernels.layout import StepFlags
from skipstep.storage.untrusted import ADDED_LATER, ReadBy, malformed, read_dataclass, read_value

ITEM_SIZES: Final[Mapping[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4}
POINTER_ALIGNMENT: Final = 16

# Triton's calling convention ends with pointers to memory that this kernel never uses: they are passed as null.
HIDDEN_ARGUMENTS: Final = ("global_scratch", "profile_scratch")

# Cubins of one major version run on later minor versions, except between these (integrated GPUs) and any other.
_INTEGRATED: Final = frozenset({72, 87, 110})
# More than this needs the caller to ask the driver for it; the step is far below.
_MAX_SHARED_BYTES: Final = 48 * 1024

Purpose = Literal["step", "noise", "statistics"]
_GRID: Final = ["ceil(num_elements / block_size)", "batch_size", "1"]
GRIDS: Final[Mapping[str, list[str]]] = {"step": _GRID, "noise": _GRID, "statistics": ["1", "batch_size", "1"]}
_POINTERS: Final[Mapping[str, str]] = {
    "step": "state next output network_input x0 history table seeds guidance rescale bound counter broken",
    "noise": "state network_input seeds given",
    "statistics": "state output table guidance strength rescale bound",
}
_INTEGERS: Final[Mapping[str, str]] = {"seeds": "int64", **dict.fromkeys(("given", "counter", "broken"), "int32")}


def argument_types(network_dtype: str, purpose: Purpose = "step") -> dict[str, str]:
    """The arguments that a kernel takes, in no binding order; which order a cubin has is among its facts."""
    pointed = {**_INTEGERS, **dict.fromkeys(("output", "network_input"), network_dtype)}
    types = {f"{name}_ptr": f"*{pointed.get(name, 'float32')}" for name in _POINTERS[purpose].split()}
    if purpose == "statistics":
        types |= {"low": "int32", "weight": "float32", "maximum": "float32"}
    return types | {"num_elements": "int32", "stage": "int32"}


@dataclass(frozen=True, slots=True)
class KernelArgument:
    """One parameter of a kernel, by position: `type` is "*…" for a device pointer (8 bytes), "int32" or "float32"."""

    name: str
    type: str

    @property
    def num_bytes(self) -> int:
        return 8 if self.type.startswith("*") else 4


def _read_argument(value: Any, where: str) -> KernelArgument:
    """In JSON an argument is the list of its name and type."""
    return KernelArgument(*read_value(tuple[str, str], value, where))


def _read_flags(value: Any, where: str) -> StepFlags:
    """In JSON the flags are the names of those that are on."""
    names = read_value(tuple[str, ...], value, where)
    known = {field.name for field in fields(StepFlags)}
    if len(set(names)) != len(names) or not known.issuperset(names):
        raise malformed(where, f"the flags {', '.join(names):.80}")
    return StepFlags(**dict.fromkeys(names, True))


@dataclass(frozen=True, slots=True)
class StepBinaryFacts:
    """What a launcher must know of one compiled kernel. Raises ModelFormatError for impossible facts.

    `purpose`: the step; or what comes before the first: x_T of the seeds, unless the state is given, into state and
    network input; of its flags only `guided` counts, which doubles the network's batch; or the statistics that a step
    needs before it, of those flags (skipstep.kernels.statistics_kernel), one program a sample.
    `target` is the compiler's, "sm_90a" for `architecture` 90: with a suffix the cubin runs there and nowhere else.
    The kernel was compiled for one set of flags, and tables that all samples share. It assumes pointers at multiples of
    `pointer_alignment` bytes, and C·H·W a multiple of `num_elements_multiple`.
    `registers` are per thread; shared memory is in bytes per program. `toolkit` is the CUDA release of the assembler:
    a driver of an older major release cannot load its cubins.
    """

    architecture: int
    target: str
    kernel: str
    flags: Annotated[StepFlags, ReadBy(_read_flags)]
    network_dtype: str
    block_size: int
    num_warps: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    registers: int
    pointer_alignment: int
    num_elements_multiple: int
    arguments: tuple[Annotated[KernelArgument, ReadBy(_read_argument)], ...]
    compiler: str
    toolkit: str
    purpose: Annotated[Purpose, ADDED_LATER] = "step"

    def __post_init__(self) -> None:
        _require(re.fullmatch(rf"sm_{self.architecture}[af]?", self.target), "target", self.target)
        _require(re.fullmatch(r"[A-Za-z_]\w*", self.kernel, re.ASCII), "kernel", self.kernel)
        _require(self.network_dtype in ITEM_SIZES, "network_dtype", self.network_dtype)
        _require(0 < self.block_size <= 2**16, "block_size", self.block_size)
        _require(0 < self.num_warps <= 32, "num_warps", self.num_warps)
        shared = self.static_shared_bytes, self.dynamic_shared_bytes
        _require(min(shared) >= 0 and sum(shared) <= _MAX_SHARED_BYTES, "shared bytes (static, dynamic)", shared)
        _require(0 < self.registers <= 255, "registers", self.registers)
        _require(self.pointer_alignment == POINTER_ALIGNMENT, "pointer_alignment", self.pointer_alignment)
        _require(self.num_elements_multiple in (1, 16), "num_elements_multiple", self.num_elements_multiple)
        _require(re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", self.toolkit), "toolkit", self.toolkit)
        taken = argument_types(self.network_dtype, self.purpose)
        known = taken | dict.fromkeys(HIDDEN_ARGUMENTS, "*int8")
        names = [argument.name for argument in self.arguments]
        _require(
            len(set(names)) == len(names)
            and set(names) >= set(taken)
            and all(known.get(argument.name) == argument.type for argument in self.arguments),
            "arguments",
            [f"{argument.type} {argument.name}" for argument in self.arguments],
        )

    @property
    def threads_per_block(self) -> int:
        return 32 * self.num_warps

    def grid(self, num_elements: int, batch_size: int) -> tuple[int, int, int]:
        """Programs along a sample, samples, 1: what `GRIDS` says in words."""
        return 1 if self.purpose == "statistics" else -(-num_elements // self.block_size), batch_size, 1

    def runs_on(self, capability: int) -> bool:
        """Whether a device of `capability` (87 for 8.7) executes this cubin: the same, or a later minor version.

        The latter does not hold for integrated GPUs, nor for targets with a suffix (CUDA C++ Programming Guide,
        "Binary Compatibility").
        """
        if self.architecture == capability:
            return True
        return (
            self.target[-1].isdigit()
            and not {self.architecture, capability} & _INTEGRATED
            and self.architecture // 10 == capability // 10
            and self.architecture < capability
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads; the grid rule is there for launchers in other languages."""
        value = asdict(self)
        value["flags"] = [name for name, on in asdict(self.flags).items() if on]
        value["arguments"] = [[argument.name, argument.type] for argument in self.arguments]
        if self.purpose == "step":
            del value["purpose"]  # Step kernels are described as they were before there were others.
        return value | {"grid": list(GRIDS[self.purpose])}

    @classmethod
    def from_json(cls, value: object, where: str = "a kernel's facts") -> Self:
        """Read what `to_json` wrote. Raises BundleError for anything else, also for unknown keys and flags."""
        grid = value.get("grid") if isinstance(value, dict) else None
        if not isinstance(value, dict) or grid not in GRIDS.values():
            raise malformed(where, f"none of the grids {list(GRIDS.values())}")
        others = {"per_sample": False, "store_x0": False}  # Forms that older bundles say they do not have.
        known = {key: each for key, each in value.items() if key != "grid" and others.get(key) is not each}
        facts = read_dataclass(cls, known, where)
        if grid != GRIDS[facts.purpose]:
            raise malformed(where, f"the grid {grid} of a kernel for {facts.purpose}")
        return facts


def _require(holds: object, what: str, got: object) -> None:
    if not holds:
        raise ModelFormatError(
            got=f"{what} = {repr(got)[:200]}",
            expected="the facts of a step kernel as this version of skipstep writes them",
            remedy="export the kernels again, with this version of skipstep or an older one",
        )
