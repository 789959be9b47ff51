"""GroupNorm in one launch, with what stands around it in a network: an added vector or image before, SiLU after.

    s = x                       + vector[n, c] if ADD_VECTOR, + image if ADD_IMAGE
    y = (s - mean)/sqrt(variance + EPS)·weight[c] + bias[c]
    y = y/(1 + exp(-y))         if SILU

mean and variance are those of a group: CHANNELS of the C channels of a sample, at all POSITIONS. All arithmetic is
float32, also between the three lines, where a network in half precision rounds. s itself is written if STORE_SUM.

A tile is BLOCK_C channels times BLOCK_P positions of one group. A channel's step in memory is STRIDE_C elements and a
position's STRIDE_P: (POSITIONS, 1) for NCHW and (1, C) for NHWC, so one kernel has both, and the compiler finds the
contiguous axis from these constants.

    a group in one tile (TILES is 1)    one launch: the tile stays in registers, the variance is that of s - mean
    several tiles                       two: group_norm_partials_kernel leaves the mean and the sum of squares of each
                                        tile, and every program of the second combines them all (Chan et al. 1979)

Sums have a fixed order, so results have the same bits at every launch. NaN in a group makes the whole group NaN. Which
tiles: skipstep.kernels.group_norm_launch.
"""

import triton
import triton.language as tl


@triton.jit
def _summed(
    x_ptr,
    vector_ptr,
    image_ptr,
    sample,
    group,
    tile,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_P: tl.constexpr,
    ADD_VECTOR: tl.constexpr,
    ADD_IMAGE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """s of a tile, 0 outside of the group; where its elements are; which are in the group; and its channels."""
    P_TILES: tl.constexpr = (POSITIONS + BLOCK_P - 1) // BLOCK_P
    channels = (tile // P_TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    positions = (tile % P_TILES) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (channels < CHANNELS)[:, None] & (positions < POSITIONS)[None, :]
    first = sample * (GROUPS * CHANNELS * POSITIONS) + group * (CHANNELS * STRIDE_C)
    elements = first + (channels[:, None] * STRIDE_C + positions[None, :] * STRIDE_P)
    s = tl.load(x_ptr + elements, mask=mask, other=0.0).to(tl.float32)
    if ADD_VECTOR:
        row = vector_ptr + sample * (GROUPS * CHANNELS) + group * CHANNELS
        s += tl.load(row + channels, mask=channels < CHANNELS, other=0.0).to(tl.float32)[:, None]
    if ADD_IMAGE:
        s += tl.load(image_ptr + elements, mask=mask, other=0.0).to(tl.float32)
    if ADD_VECTOR:  # It is added outside of the group, too.
        s = tl.where(mask, s, 0.0)
    return s, elements, mask, channels


@triton.jit
def _count(
    tile,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """How many elements of the group a tile has."""
    P_TILES: tl.constexpr = (POSITIONS + BLOCK_P - 1) // BLOCK_P
    channels = tl.minimum(CHANNELS - (tile // P_TILES) * BLOCK_C, BLOCK_C)
    positions = tl.minimum(POSITIONS - (tile % P_TILES) * BLOCK_P, BLOCK_P)
    return (channels * positions).to(tl.float32)


@triton.jit
def group_norm_partials_kernel(
    x_ptr,  # float16, bfloat16 or float32 [N, C, POSITIONS]
    vector_ptr,  # the same dtype [N, C], read if ADD_VECTOR
    image_ptr,  # the same dtype, as x, read if ADD_IMAGE
    partials_ptr,  # float32 [N, GROUPS, 2, TILES]: means, sums of squares about them
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a group
    POSITIONS: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_P: tl.constexpr,
    ADD_VECTOR: tl.constexpr,
    ADD_IMAGE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample, group, tile = tl.program_id(1).to(tl.int64), tl.program_id(0) // TILES, tl.program_id(0) % TILES
    s, _elements, mask, _channels = _summed(
        x_ptr, vector_ptr, image_ptr, sample, group, tile, GROUPS, CHANNELS, POSITIONS, STRIDE_C, STRIDE_P,
        ADD_VECTOR, ADD_IMAGE, BLOCK_C, BLOCK_P,
    )  # fmt: skip
    mean = tl.div_rn(tl.sum(s), _count(tile, CHANNELS, POSITIONS, BLOCK_C, BLOCK_P))
    centred = tl.where(mask, s - mean, 0.0)
    row = partials_ptr + (sample * GROUPS + group) * (2 * TILES) + tile
    tl.store(row, mean)
    tl.store(row + TILES, tl.sum(centred * centred))


@triton.jit
def group_norm_kernel(
    x_ptr,  # float16, bfloat16 or float32 [N, C, POSITIONS]
    vector_ptr,  # the same dtype [N, C], read if ADD_VECTOR
    image_ptr,  # the same dtype, as x, read if ADD_IMAGE
    weight_ptr,  # float16, bfloat16 or float32 [C], read if WEIGHT
    bias_ptr,  # the same [C], read if BIAS
    partials_ptr,  # float32 [N, GROUPS, 2, TILES], read if TILES > 1
    out_ptr,  # y, as x
    sum_ptr,  # s, as x, written if STORE_SUM
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a group
    POSITIONS: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_P: tl.constexpr,
    EPS: tl.constexpr,
    ADD_VECTOR: tl.constexpr,
    ADD_IMAGE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    STORE_SUM: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,  # a power of two, TILES at least
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample, group, tile = tl.program_id(1).to(tl.int64), tl.program_id(0) // TILES, tl.program_id(0) % TILES
    s, elements, mask, channels = _summed(
        x_ptr, vector_ptr, image_ptr, sample, group, tile, GROUPS, CHANNELS, POSITIONS, STRIDE_C, STRIDE_P,
        ADD_VECTOR, ADD_IMAGE, BLOCK_C, BLOCK_P,
    )  # fmt: skip
    total = tl.full((), CHANNELS * POSITIONS, tl.float32)
    if TILES > 1:
        tiles = tl.arange(0, BLOCK_T)
        row = partials_ptr + (sample * GROUPS + group) * (2 * TILES) + tiles
        counts = tl.where(tiles < TILES, _count(tiles, CHANNELS, POSITIONS, BLOCK_C, BLOCK_P), 0.0)
        means = tl.load(row, mask=tiles < TILES, other=0.0)
        squares = tl.load(row + TILES, mask=tiles < TILES, other=0.0)
        mean = tl.div_rn(tl.sum(counts * means), total)
        centred = tl.where(mask, s - mean, 0.0)
        away = means - mean
        squared = tl.sum(squares + counts * away * away)
    else:
        mean = tl.div_rn(tl.sum(s), total)
        centred = tl.where(mask, s - mean, 0.0)
        squared = tl.sum(centred * centred)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squared, total) + EPS))
    y = centred * scale
    if WEIGHT:
        weight = tl.load(weight_ptr + group * CHANNELS + channels, mask=channels < CHANNELS, other=0.0)
        y = y * weight.to(tl.float32)[:, None]
    if BIAS:
        bias = tl.load(bias_ptr + group * CHANNELS + channels, mask=channels < CHANNELS, other=0.0)
        y = y + bias.to(tl.float32)[:, None]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + elements, y.to(out_ptr.dtype.element_ty), mask=mask)
    if STORE_SUM:
        tl.store(sum_ptr + elements, s.to(sum_ptr.dtype.element_ty), mask=mask)
