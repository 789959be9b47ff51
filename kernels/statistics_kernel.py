"""The statistics of a sample that a step needs before it begins, one program for each sample, without sorting.

    rescale = phi·std(c)/std(out) + 1 - phi      if RESCALED: one pass, summed in float64
    bound   = a quantile of |x0|, within limits  if THRESHOLDED: seventeen passes

The quantile lies between two neighbours in order, which are found exactly: of floats that are not negative the order is
that of their bits, so the lower one is built from its highest bits on, two in a pass, by counting what is smaller. Its
float32 bits are those of skipstep.kernels.statistics; a spread's last bits depend on the order of summing.
"""

import triton
import triton.language as tl

from skipstep.kernels.step_kernel import GUIDANCE, ROW, X0_OUT, X0_X

SIGN = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
ABSENT = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _predictions(output_ptr, sample, offsets, mask, num_elements, guidance, GUIDED: tl.constexpr, WIDE: tl.constexpr):
    """What was predicted with the condition, and after guidance, as the step computes it."""
    predicted = sample * num_elements * (2 if WIDE else 1) + offsets
    conditional = tl.load(output_ptr + predicted, mask=mask, other=0.0).to(tl.float32)
    out = conditional
    if GUIDED:
        half = tl.num_programs(1).to(tl.int64) * num_elements * (2 if WIDE else 1)
        unconditional = tl.load(output_ptr + half + predicted, mask=mask, other=0.0).to(tl.float32)
        out = unconditional + guidance * (conditional - unconditional)
    return conditional, out


@triton.jit
def _spread(apart, squares, count):
    mean = tl.sum(apart) / count
    # Rounding may leave less than nothing; NaN stays.
    variance = tl.sum(squares) / count - mean * mean
    return tl.sqrt(tl.where(variance < 0.0, 0.0, variance))


@triton.jit
def sample_statistics_kernel(
    state_ptr,  # float32 [B, n]
    output_ptr,  # network's dtype [B or 2B, n], 2n if WIDE
    table_ptr,  # float32 [S, 1, ROW]
    guidance_ptr,  # float32 [B], read if GUIDED
    strength_ptr,  # float32 [B], phi, read if RESCALED
    rescale_ptr,  # float32 [B], written if RESCALED
    bound_ptr,  # float32 [B], written if THRESHOLDED
    low,  # how many values lie below the quantile
    weight,  # of the next value
    maximum,  # of the bound
    num_elements,  # n = C·H·W
    stage,
    THRESHOLDED: tl.constexpr,
    WIDE: tl.constexpr,
    GUIDED: tl.constexpr,
    SCALED: tl.constexpr,
    RESCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    row_ptr = table_ptr + tl.cast(stage, tl.int64) * ROW
    guidance = 1.0
    if GUIDED:
        guidance = tl.load(guidance_ptr + sample)
        if SCALED:
            guidance = tl.load(row_ptr + GUIDANCE) * (guidance - 1.0) + 1.0
    rescale = 1.0
    if RESCALED:
        # Apart from the first element: a constant has no spread at all.
        first_c, first_out = _predictions(
            output_ptr, sample, sample * 0, sample >= 0, num_elements, guidance, GUIDED, WIDE
        )
        c_sum, c_squares = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
        out_sum, out_squares = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
        for start in range(0, num_elements, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < num_elements
            c, out = _predictions(output_ptr, sample, offsets, mask, num_elements, guidance, GUIDED, WIDE)
            c_apart = tl.where(mask, c.to(tl.float64) - first_c, 0.0)
            out_apart = tl.where(mask, out.to(tl.float64) - first_out, 0.0)
            c_sum += c_apart
            out_sum += out_apart
            c_squares += c_apart * c_apart
            out_squares += out_apart * out_apart
        count = tl.cast(num_elements, tl.float64)
        spread = _spread(out_sum, out_squares, count)
        ratio = tl.where(spread == 0.0, 1.0, _spread(c_sum, c_squares, count) / spread)
        strength = tl.load(strength_ptr + sample)
        rescale = (strength.to(tl.float64) * ratio + (1.0 - strength).to(tl.float64)).to(tl.float32)
        tl.store(rescale_ptr + sample, rescale)
    if THRESHOLDED:
        x0_x, x0_out = tl.load(row_ptr + X0_X), tl.load(row_ptr + X0_OUT)
        below = tl.full((), 0, tl.uint32)
        above = tl.full((BLOCK,), ABSENT, tl.uint32)
        greatest = tl.zeros((BLOCK,), tl.uint32)
        number = tl.zeros((BLOCK,), tl.int32)
        for turn in range(17):  # The last finds the upper neighbour.
            shift = tl.maximum(30 - 2 * turn, 0)
            unit = tl.full((), 1, tl.uint32) << shift.to(tl.uint32)
            first, second, third = number * 0, number * 0, number * 0
            for start in range(0, num_elements, BLOCK):
                offsets = start + tl.arange(0, BLOCK)
                mask = offsets < num_elements
                _, out = _predictions(output_ptr, sample, offsets, mask, num_elements, guidance, GUIDED, WIDE)
                if RESCALED:
                    out = out * rescale
                x = tl.load(state_ptr + sample * num_elements + offsets, mask=mask, other=0.0)
                bits = (x0_x * x + x0_out * out).to(tl.uint32, bitcast=True) & SIGN
                bits = tl.where(mask, bits, ABSENT)
                first += (bits < below + unit).to(tl.int32)
                second += (bits < below + 2 * unit).to(tl.int32)
                third += (bits < below + 3 * unit).to(tl.int32)
                if turn == 16:
                    above = tl.minimum(above, tl.where(bits > below, bits, ABSENT))
                    greatest = tl.maximum(greatest, tl.where(mask, bits, 0))
            number = first
            if turn < 16:
                digit = (tl.sum(first) <= low).to(tl.uint32) + (tl.sum(second) <= low) + (tl.sum(third) <= low)
                below += digit * unit
        upper = tl.min(above)
        # Where equal values follow, or none.
        upper = tl.where((tl.sum(number) > low + 1) | (low + 1 >= num_elements), below, upper)
        a, b = below.to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True)
        bound = a + weight * (b - a)
        bound = tl.maximum(bound, 1.0, propagate_nan=tl.PropagateNan.ALL)
        bound = tl.minimum(bound, maximum, propagate_nan=tl.PropagateNan.ALL)
        tl.store(bound_ptr + sample, tl.where(tl.max(greatest) > INFINITY, float("nan"), bound))
