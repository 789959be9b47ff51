"""What the compiler made of GroupNorms: both kernels' arguments for a norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kernel_inspection import KernelFacts, inspect_kernel

from skipstep.export.cubins import compile_kernel
from skipstep.kernels.group_norm_kernel import group_norm_kernel, group_norm_partials_kernel
from skipstep.kernels.group_norm_launch import NormLaunch, apply_constants, norm_constants, norm_launch

# Groups, channels of each and positions: norms of a 32×32 network, of one of 64×64 latents, and of odd sizes.
NORMS: Mapping[str, tuple[int, int, int]] = {
    "cifar": (32, 4, 1024),
    "cifar, joined": (32, 12, 1024),
    "latents": (32, 10, 4096),
    "odd": (8, 3, 35),
}


@dataclass(frozen=True, slots=True)
class NormCase:
    """A norm of `groups` groups of `channels` at `positions`, in Triton's name of a dtype; `added` is "vector", "image"
    or nothing, `affine`: with weight and bias."""

    groups: int
    channels: int
    positions: int
    dtype: str = "fp16"
    channels_last: bool = False
    added: str = ""
    silu: bool = True
    affine: bool = True
    eps: float = 1e-5

    @property
    def launch(self) -> NormLaunch:
        return norm_launch(channels=self.channels, positions=self.positions, channels_last=self.channels_last)

    def kernels(self) -> Iterator[tuple[Any, dict[str, str], dict[str, float]]]:
        """Each kernel that is launched, with the types of its pointers and its constants, in order."""
        launch = self.launch
        values: dict[str, float] = {
            **norm_constants(
                launch,
                groups=self.groups,
                channels=self.channels,
                positions=self.positions,
                channels_last=self.channels_last,
                add_vector=self.added == "vector",
                add_image=self.added == "image",
            ),
            **apply_constants(
                launch,
                eps=self.eps,
                weight=self.affine,
                bias=self.affine,
                silu=self.silu,
                store_sum=self.added == "image",
            ),
        }
        for kernel in (*[group_norm_partials_kernel] * (launch.tiles > 1), group_norm_kernel):
            pointers = {name: f"*{self.dtype}" for name in kernel.arg_names if name.endswith("_ptr")}
            pointers["partials_ptr"] = "*fp32"
            yield kernel, pointers, {name: values[name] for name in kernel.arg_names if name not in pointers}

    def compiled(self, arch: int) -> list[Any]:
        """What Triton makes of each for sm_`arch`."""
        warps = self.launch.num_warps
        return [
            compile_kernel(kernel, arch, pointers, constants, aligned=pointers, num_warps=warps)
            for kernel, pointers, constants in self.kernels()
        ]


def inspect_norm(arch: int, name: str, case: NormCase) -> list[KernelFacts]:
    """The facts of each kernel of a norm, in the order of launching."""
    return [inspect_kernel(made, arch=arch, variant=name, dtype=case.dtype) for made in case.compiled(arch)]
