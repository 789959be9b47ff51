"""Facts of step kernels that were never compiled, and a driver that runs nothing: for what stands above the driver."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

from skipstep.edge.step_binary import HIDDEN_ARGUMENTS, KernelArgument, StepBinaryFacts, argument_types
from skipstep.kernels.layout import StepFlags

# An ELF header for machine 190, CUDA; nothing here looks further.
CUBIN = b"\x7fELF" + bytes(14) + (190).to_bytes(2, "little") + bytes(44)


def step_facts(architecture: int = 87, *, target: str | None = None, **changes: Any) -> StepBinaryFacts:
    dtype = changes.get("network_dtype", "float16")
    arguments = argument_types(dtype) | dict.fromkeys(HIDDEN_ARGUMENTS, "*int8")
    values: dict[str, Any] = {
        "architecture": architecture,
        "target": target or f"sm_{architecture}",
        "kernel": "ddim_step_kernel",
        "flags": StepFlags(),
        "network_dtype": dtype,
        "block_size": 1024,
        "num_warps": 4,
        "static_shared_bytes": 0,
        "dynamic_shared_bytes": 4096,
        "registers": 40,
        "pointer_alignment": 16,
        "num_elements_multiple": 16,
        "arguments": tuple(KernelArgument(name, kind) for name, kind in arguments.items()),
        "compiler": "triton 3.9.0",
        "toolkit": "12.9",
    }
    return StepBinaryFacts(**{**values, **changes})


@dataclass
class RecordingDriver:
    """Stands for the CUDA driver; reads arguments as it does, through pointers, `sizes` bytes each."""

    device: int = 87
    cuda: int = 12
    sizes: list[int] = field(default_factory=list)
    loaded: list[tuple[bytes, str]] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    closed: bool = False

    def capability(self) -> int:
        return self.device

    def cuda_major(self) -> int:
        return self.cuda

    def load(self, cubin: bytes, kernel: str) -> int:
        self.loaded.append((cubin, kernel))
        return len(self.loaded) - 1

    def launch(self, kernel: int, *, parameters: int, **configuration: Any) -> None:
        pointers = (ctypes.c_void_p * len(self.sizes)).from_address(parameters)
        values = [
            int.from_bytes(ctypes.string_at(pointer or 0, size), "little")
            for pointer, size in zip(pointers, self.sizes, strict=True)
        ]
        self.launches.append({"kernel": kernel, "arguments": values, **configuration})

    def close(self) -> None:
        self.closed = True
