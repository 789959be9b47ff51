"""Normals in registers: skipstep.calls.noise in Triton, with the same integers and the same float32 bits.

    w0 w1 w2 w3 = Philox4x32-10(counter = (block low, block high, stage, stream), key = seed)
    elements 4·block … 4·block+3 = Box-Muller(w0, w1), Box-Muller(w2, w3)

Only operations that IEEE 754 rounds correctly are used, without fused multiply-add, so a GPU and a CPU agree to the bit
(skipstep.kernels.normal_constants).
"""

import triton
import triton.language as tl

from skipstep.kernels import normal_constants as constants

PHILOX_ROUNDS = tl.constexpr(constants.PHILOX_ROUNDS)
LN2_HIGH = tl.constexpr(constants.LN2_HIGH)
LN2_LOW = tl.constexpr(constants.LN2_LOW)
SQRT_HALF_BITS = tl.constexpr(constants.SQRT_HALF_BITS)
RADIANS_PER_UNIT = tl.constexpr(constants.RADIANS_PER_UNIT)
LN_0, LN_1, LN_2, LN_3, LN_4, LN_5, LN_6, LN_7, LN_8, LN_9 = map(tl.constexpr, constants.LN_COEFFICIENTS)
SIN_0, SIN_1, SIN_2, SIN_3 = map(tl.constexpr, constants.SIN_COEFFICIENTS)
COS_0, COS_1, COS_2, COS_3, COS_4 = map(tl.constexpr, constants.COS_COEFFICIENTS)


@triton.jit
def ln_uniform(word):
    """ln(u), u = word/2^32 + 2^-33 in (0, 1]."""
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = LN_9 * f + LN_8
    p = p * f + LN_7
    p = p * f + LN_6
    p = p * f + LN_5
    p = p * f + LN_4
    p = p * f + LN_3
    p = p * f + LN_2
    p = p * f + LN_1
    p = p * f + LN_0
    return (f * p + e * LN2_LOW) + e * LN2_HIGH


@triton.jit
def cos_sin_turns(word):
    """cos and sin of word/2^32 turns: the nearest quarter turn by integer arithmetic, the rest by polynomials."""
    quarter = (word + 0x20000000) >> 30
    rest = (word - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32)
    y = rest * RADIANS_PER_UNIT
    square = y * y
    sin = y * (((SIN_3 * square + SIN_2) * square + SIN_1) * square + SIN_0)
    cos = (((COS_4 * square + COS_3) * square + COS_2) * square + COS_1) * square + COS_0
    odd = (quarter & 1) != 0
    cos_bits = tl.where(odd, sin, cos).to(tl.uint32, bitcast=True) ^ ((((quarter + 1) >> 1) & 1) << 31)
    sin_bits = tl.where(odd, cos, sin).to(tl.uint32, bitcast=True) ^ ((quarter >> 1) << 31)
    return cos_bits.to(tl.float32, bitcast=True), sin_bits.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(radial, angular):
    r = tl.sqrt_rn(-2.0 * ln_uniform(radial))
    cos, sin = cos_sin_turns(angular)
    return r * cos, r * sin


@triton.jit
def standard_normal_block(seed, program, stage, stream, BLOCK: tl.constexpr):
    """Normals of elements program·BLOCK … program·BLOCK + BLOCK-1 of a sample."""
    first = program.to(tl.int64) * (BLOCK // 4)
    # BLOCK/4 divides 2^32, so the high word is the same for the whole program.
    low = (first & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    high = (first >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, stage.to(tl.uint32), stream, PHILOX_ROUNDS)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def standard_normal_of(seed, elements, stage, stream):
    """The same normals of any elements of a sample; each draws its block of four for itself."""
    block = elements >> 2
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, stage.to(tl.uint32), stream, PHILOX_ROUNDS)
    second = (elements & 2) != 0
    even, odd = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((elements & 1) != 0, odd, even)


@triton.jit
def positions_of(offsets, num_elements, CHANNELS: tl.constexpr):
    """Of what stands there in channels-last order: position·CHANNELS + channel."""
    return (tl.cast(offsets, num_elements.dtype) // CHANNELS).to(tl.int64)


@triton.jit
def noise_block(seed, offsets, num_elements, stage, stream, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Normals of a program's elements, wherever they stand: the counter counts channel·positions + position."""
    if CHANNELS > 0:
        positions = positions_of(offsets, num_elements, CHANNELS)
        channels = offsets - positions * CHANNELS
        z = standard_normal_of(seed, channels * (num_elements // CHANNELS) + positions, stage, stream)
    else:
        z = standard_normal_block(seed, tl.program_id(0), stage, stream, BLOCK)
    return z


@triton.jit
def philox_normal_kernel(
    state_ptr,  # float32 [B, n], written
    network_input_ptr,  # network's dtype [B or 2B, n], written
    seeds_ptr,  # int64 [B]
    given_ptr,  # int32 [1], read if CHOOSES: not zero if the state is given
    num_elements,  # n
    stage,
    STREAM: tl.constexpr,
    COPIES: tl.constexpr,  # 2 where guidance doubles the network's batch
    CHOOSES: tl.constexpr,  # the device decides whether to draw, or to keep the given state
    CHANNELS: tl.constexpr,  # of a sample in channels-last order; 0: it is in the plain one
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    elements = sample * num_elements + offsets
    given = False
    if CHOOSES:
        given = tl.load(given_ptr) != 0
    if given:
        z = tl.load(state_ptr + elements, mask=mask)
    else:
        seed = tl.load(seeds_ptr + sample)
        stage, stream = tl.cast(stage, tl.int32), tl.full((), STREAM, tl.uint32)
        z = noise_block(seed, offsets, num_elements, stage, stream, CHANNELS, BLOCK)
        tl.store(state_ptr + elements, z, mask=mask)
    network_input = z.to(network_input_ptr.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        copied = copy * tl.num_programs(1) * tl.cast(num_elements, tl.int64) + elements
        tl.store(network_input_ptr + copied, network_input, mask=mask)
