"""GroupNorm with SiLU as operators of torch, which a traced network may hold.

    skipstep::group_norm(x, …, vector)        y of x, or of x + vector[:, :, None, …]
    skipstep::add_group_norm(x, image, …)     y of x + image, and x + image

On a GPU they launch skipstep.kernels.group_norm_kernel; in host memory they do the same with torch's operations.
Results stand in memory as x does, channels-last included. TRITON_INTERPRET=1 lets `launch_group_norm` take them too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from skipstep.arrays import unreadable
from skipstep.errors import (
    DeviceUnavailableError,
    InputError,
    check_flag,
    check_integer,
    check_number,
    needs_packages,
    shown,
)
from skipstep.kernels.group_norm_launch import NormLaunch, apply_constants, norm_constants, norm_launch

with needs_packages("triton, which runs the norm on a GPU", remedy="pip install 'skipstep[torch]'"):
    from triton import knobs

    from skipstep.kernels.group_norm_kernel import group_norm_kernel, group_norm_partials_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Within a sample the kernel counts elements in 32 bits.
MAX_ELEMENTS = 2**31 - 1


def launch_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = False,
    vector: Tensor | None = None,
    image: Tensor | None = None,
    store_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """GroupNorm of s = x + vector + image, then SiLU if `silu`: the result, and s if `store_sum`.

    x       float16, bfloat16 or float32 `[N, C, …]`, C a multiple of `num_groups`.
    weight  and `bias`: `[C]`, optional, of one of these dtypes.
    vector  optional `[N, C]` or `[N, C, 1, …]`, added to every position; of the dtype of x.
    image   optional, of the shape and dtype of x.

    One launch on the current stream, two for large groups (skipstep.kernels.group_norm_launch); an operand in another
    order in memory than x is copied first. Raises InputError and DeviceUnavailableError.
    """
    _check(x, num_groups, {"weight": weight, "bias": bias, "vector": vector, "image": image})
    num_groups, eps = int(num_groups), check_number("eps", eps, low=0.0, high=1.0, above=True)
    silu, store_sum = check_flag("silu", silu), check_flag("store_sum", store_sum)
    if x.device.type != "cuda" and not knobs.runtime.interpret:
        raise DeviceUnavailableError(
            got=f"tensors on {x.device}",
            expected="CUDA tensors: this norm is a GPU kernel",
            remedy="use the operator torch.ops.skipstep.group_norm, or set TRITON_INTERPRET=1 to test the kernel",
        )
    x = dense(x)
    out, total = torch.empty_like(x), torch.empty_like(x) if store_sum else None
    launch = launch_for(x, num_groups)
    samples, channels, positions = len(x), x.shape[1], x[0, 0].numel()
    if image is not None and not same_order(x, image):
        image = torch.empty_like(x).copy_(image)
    vector = None if vector is None else vector.reshape(samples, channels).contiguous()
    weight, bias = (None if each is None else each.contiguous() for each in (weight, bias))
    constants = norm_constants(
        launch,
        groups=num_groups,
        channels=channels // num_groups,
        positions=positions,
        channels_last=not _is_plain(x),
        add_vector=vector is not None,
        add_image=image is not None,
    )
    own = apply_constants(
        launch, eps=eps, weight=weight is not None, bias=bias is not None, silu=silu, store_sum=store_sum
    )
    # With fusion another Triton would leave other bits; skipstep's kernels are all compiled without.
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    grid = (num_groups * launch.tiles, samples)
    # The kernel does not touch an operand that it is told is not there; any pointer will do.
    added = [x if each is None else each for each in (vector, image)]
    affine = [x if each is None else each for each in (weight, bias)]
    partials = x
    if launch.tiles > 1:
        partials = torch.empty(samples, num_groups, 2, launch.tiles, dtype=torch.float32, device=x.device)
        group_norm_partials_kernel[grid](x, *added, partials, **constants, **options)
    written = (out, out if total is None else total)
    group_norm_kernel[grid](x, *added, *affine, partials, *written, **constants, **own, **options)
    return out, total


def launch_for(x: Tensor, num_groups: int) -> NormLaunch:
    """How `launch_group_norm` launches for an x: skipstep.bench.kernel_counts counts by it."""
    x = dense(x)
    return norm_launch(channels=x.shape[1] // num_groups, positions=x[0, 0].numel(), channels_last=not _is_plain(x))


def dense(x: Tensor) -> Tensor:
    """x if it is contiguous or channels last, the two orders that the kernel reads; a contiguous copy else."""
    return x if _is_plain(x) or x.movedim(1, -1).is_contiguous() else x.contiguous()


def same_order(x: Tensor, image: Tensor) -> bool:
    """Whether elements of two tensors of one shape stand alike in memory; steps along a size of 1 do not count."""
    steps = zip(x.shape, x.stride(), image.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in steps)


def _is_plain(x: Tensor) -> bool:
    return x.is_contiguous()


def _check(x: Tensor, num_groups: int, operands: Mapping[str, Tensor | None]) -> None:
    fits = isinstance(x, Tensor) and unreadable(x) is None and x.ndim >= 2 and 0 not in x.shape
    if not fits or x.dtype not in DTYPES or x[0].numel() > MAX_ELEMENTS:
        raise InputError(
            got=_described("x", x),
            expected=f"[N, C, …] {' or '.join(map(str, DTYPES))}, at most {MAX_ELEMENTS} elements a sample",
            remedy="use torch.nn.functional.group_norm for it",
        )
    samples, channels = x.shape[:2]
    if check_integer("num_groups", num_groups, low=1, high=channels) and channels % num_groups:
        raise InputError(
            got=f"{channels} channels in {num_groups} groups",
            expected="a number of groups that divides the channels",
            remedy="pass the norm's own",
        )
    row, spread = (samples, channels), (samples, channels, *[1] * (x.ndim - 2))
    allowed: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]] = {
        "weight": (((channels,),), DTYPES),
        "bias": (((channels,),), DTYPES),
        "vector": ((row, spread), (x.dtype,)),
        "image": ((tuple(x.shape),), (x.dtype,)),
    }
    for name, tensor in operands.items():
        shapes, dtypes = allowed[name]
        if tensor is None:
            continue
        there = isinstance(tensor, Tensor) and unreadable(tensor) is None and tensor.device == x.device
        if there and tuple(tensor.shape) in shapes and tensor.dtype in dtypes:
            continue
        raise InputError(
            got=_described(name, tensor),
            expected=f"{list(shapes[0])} {' or '.join(map(str, dtypes))} on {x.device}",
            remedy=f"convert {name}",
        )


def _described(name: str, value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{name}={shown(value)}"
    return f"{name}, {unreadable(value) or f'{list(value.shape)} {value.dtype} on {value.device}'}"


def group_norm_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = False,
    vector: Tensor | None = None,
    image: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `launch_group_norm` computes, by torch's operations in float32: the result and s, in the dtype of x."""
    per_channel = (-1, x.shape[1], *[1] * (x.ndim - 2))
    total = x.float()
    if vector is not None:
        total = total + vector.float().reshape(per_channel)
    if image is not None:
        total = total + image.float()
    # Not torch's own norm: it forms x·scale + shift, and in channels-last order E[x²] - E[x]²; both cancel.
    groups = total.reshape(len(x), num_groups, -1)
    centred = groups - groups.mean(2, keepdim=True)
    y = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    if weight is not None:
        y = y * weight.float().reshape(per_channel)
    if bias is not None:
        y = y + bias.float().reshape(per_channel)
    y = functional.silu(y) if silu else y
    like = dense(x)
    return torch.empty_like(like).copy_(y), torch.empty_like(like).copy_(total)


@torch.library.custom_op("skipstep::group_norm", mutates_args=(), device_types="cuda")
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    vector: Tensor | None,
) -> Tensor:
    return launch_group_norm(x, num_groups, weight, bias, eps=eps, silu=silu, vector=vector)[0]


@torch.library.custom_op("skipstep::add_group_norm", mutates_args=(), device_types="cuda")
def add_group_norm(
    x: Tensor,
    image: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    out, total = launch_group_norm(x, num_groups, weight, bias, eps=eps, silu=silu, image=image, store_sum=True)
    assert total is not None
    return out, total


# In host memory, and of tensors without values.
group_norm.register_kernel("cpu")(
    lambda x, groups, weight, bias, eps, silu, vector: group_norm_reference(
        x, groups, weight, bias, eps=eps, silu=silu, vector=vector
    )[0]
)
add_group_norm.register_kernel("cpu")(
    lambda x, image, groups, weight, bias, eps, silu: group_norm_reference(
        x, groups, weight, bias, eps=eps, silu=silu, image=image
    )
)
group_norm.register_fake(lambda x, *_: torch.empty_like(dense(x)))
add_group_norm.register_fake(lambda x, *_: (torch.empty_like(dense(x)), torch.empty_like(dense(x))))
