"""How a GroupNorm is launched: which tiles its groups are cut into.

one launch    where a group fits into one tile of MAX_TILE elements, both sides rounded up to powers of two. It then
              stays in registers, 16 values a thread, and is read once. A batch of one with 32 groups is 32
              programs, fewer than a GPU has multiprocessors; but a program moves its 64 KiB at most in less time
              than a second launch takes, and halves of a group could not normalise before both are read.
two           for a larger group: tiles of SPLIT_TILE elements, so that one sample fills a GPU; x is read twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from skipstep.errors import check_flag, check_integer

MAX_TILE: Final = 2**14
SPLIT_TILE: Final = 2**12
MAX_WARPS: Final = 32
# Two accesses of 16 bytes in half precision. With 32 of them ptxas spills, which aims at 64 registers.
_ELEMENTS_PER_THREAD: Final = 16


@dataclass(frozen=True, slots=True)
class NormLaunch:
    """`tiles` of `block_c` channels times `block_p` positions for each group, a program of `num_warps` for each."""

    tiles: int
    block_c: int
    block_p: int
    num_warps: int

    @property
    def launches(self) -> int:
        return 1 if self.tiles == 1 else 2


def norm_launch(*, channels: int, positions: int, channels_last: bool) -> NormLaunch:
    """The launch for groups of `channels` times `positions` elements, by the rule above. Raises InputError.

    A tile of a large group is as long as can be along the axis that is contiguous in memory.
    """
    channels = check_integer("channels", channels, low=1)
    positions = check_integer("positions", positions, low=1)
    check_flag("channels_last", channels_last)
    block_c, block_p = _power_of_two(channels), _power_of_two(positions)
    if block_c * block_p > MAX_TILE:
        if channels_last:
            block_c = min(block_c, SPLIT_TILE)
            block_p = min(block_p, SPLIT_TILE // block_c)
        else:
            block_p = min(block_p, SPLIT_TILE)
            block_c = min(block_c, SPLIT_TILE // block_p)
    tiles = -(-channels // block_c) * -(-positions // block_p)
    threads = block_c * block_p // _ELEMENTS_PER_THREAD
    return NormLaunch(tiles, block_c, block_p, num_warps=min(max(1, threads // 32), MAX_WARPS))


def norm_constants(
    launch: NormLaunch,
    *,
    groups: int,
    channels: int,
    positions: int,
    channels_last: bool,
    add_vector: bool = False,
    add_image: bool = False,
) -> dict[str, int]:
    """The compile-time constants that both kernels take."""
    return {
        "GROUPS": groups,
        "CHANNELS": channels,
        "POSITIONS": positions,
        "STRIDE_C": 1 if channels_last else positions,
        "STRIDE_P": groups * channels if channels_last else 1,
        "ADD_VECTOR": add_vector,
        "ADD_IMAGE": add_image,
        "TILES": launch.tiles,
        "BLOCK_C": launch.block_c,
        "BLOCK_P": launch.block_p,
    }


def apply_constants(
    launch: NormLaunch,
    *,
    eps: float,
    weight: bool = True,
    bias: bool = True,
    silu: bool = True,
    store_sum: bool = False,
) -> dict[str, float]:
    """Those of group_norm_kernel alone."""
    return {
        "EPS": eps,
        "WEIGHT": weight,
        "BIAS": bias,
        "SILU": silu,
        "STORE_SUM": store_sum,
        "BLOCK_T": _power_of_two(launch.tiles),
    }


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
