"""The step of the sampling loop: one launch per network evaluation, each operand read once, each result written once.

    out  = u + guidance·(c - u)                   if GUIDED: predictions with and without the label
    x0   = X0_X·x + X0_OUT·out
    eps  = EPS_X·x + EPS_OUT·out
    x0   = clamp(x0, ±CLIP)                       if CLIPPED; NaN stays NaN
    eps  = RE_X·x + RE_X0·x0                      if REDERIVED
    next = C_X0·x0 + C_EPS·eps + SIGMA·z          z if NOISY: Philox in registers

All arithmetic is float32 and unfused (compile with enable_fp_fusion=False); skipstep.kernels.step_numpy does the same
operations in the same order. Coefficients come from a float32 device table and not as scalar arguments: those are
rounded differently by different launchers, and a captured graph could not change them. skipstep.kernels.layout has the
columns, skipstep.kernels.step the launcher.
"""

import triton
import triton.language as tl

from skipstep.kernels.layout import NUM_COLUMNS, Column, Stream
from skipstep.kernels.philox_kernel import standard_normal_block

ROW = tl.constexpr(NUM_COLUMNS)
X0_X = tl.constexpr(int(Column.X0_X))
X0_OUT = tl.constexpr(int(Column.X0_OUT))
EPS_X = tl.constexpr(int(Column.EPS_X))
EPS_OUT = tl.constexpr(int(Column.EPS_OUT))
CLIP = tl.constexpr(int(Column.CLIP))
RE_X = tl.constexpr(int(Column.RE_X))
RE_X0 = tl.constexpr(int(Column.RE_X0))
C_X0 = tl.constexpr(int(Column.C_X0))
C_EPS = tl.constexpr(int(Column.C_EPS))
SIGMA = tl.constexpr(int(Column.SIGMA))
STEP_STREAM = tl.constexpr(int(Stream.STEP))


@triton.jit(do_not_specialize=["stage"])
def ddim_step_kernel(
    state_ptr,  # float32 [B, n], x_t; may be next_ptr
    next_ptr,  # float32 [B, n], x_s
    output_ptr,  # float16, bfloat16 or float32 [B or 2B, n], what the network predicted
    network_input_ptr,  # the same dtypes and shape, what the network reads next
    x0_ptr,  # float32 [B, n], written if STORE_X0
    table_ptr,  # float32 [S, B or 1, ROW]
    seeds_ptr,  # int64 [B], read if NOISY
    guidance_ptr,  # float32 [B], read if GUIDED
    num_elements,  # n = C·H·W
    stage,  # row of the table and word of the noise counter
    PER_SAMPLE: tl.constexpr,  # the table has a row per sample
    CLIPPED: tl.constexpr,
    REDERIVED: tl.constexpr,
    NOISY: tl.constexpr,
    GUIDED: tl.constexpr,
    STORE_X0: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    batch_size = tl.num_programs(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    here = sample * num_elements + offsets
    second_half = batch_size * num_elements

    row_ptr = table_ptr + tl.to_tensor(stage).to(tl.int64) * ROW
    if PER_SAMPLE:
        row_ptr = table_ptr + (tl.to_tensor(stage).to(tl.int64) * batch_size + sample) * ROW

    x = tl.load(state_ptr + here, mask=mask)
    out = tl.load(output_ptr + here, mask=mask).to(tl.float32)
    if GUIDED:
        unconditional = tl.load(output_ptr + second_half + here, mask=mask).to(tl.float32)
        out = unconditional + tl.load(guidance_ptr + sample) * (out - unconditional)

    x0 = tl.load(row_ptr + X0_X) * x + tl.load(row_ptr + X0_OUT) * out
    if CLIPPED:
        bound = tl.load(row_ptr + CLIP)
        x0 = tl.minimum(x0, bound, propagate_nan=tl.PropagateNan.ALL)
        x0 = tl.maximum(x0, -bound, propagate_nan=tl.PropagateNan.ALL)
    if REDERIVED:
        eps = tl.load(row_ptr + RE_X) * x + tl.load(row_ptr + RE_X0) * x0
    else:
        eps = tl.load(row_ptr + EPS_X) * x + tl.load(row_ptr + EPS_OUT) * out

    x_next = tl.load(row_ptr + C_X0) * x0 + tl.load(row_ptr + C_EPS) * eps
    if NOISY:
        seed = tl.load(seeds_ptr + sample)
        stream = tl.full((), STEP_STREAM, tl.uint32)
        z = standard_normal_block(seed, tl.program_id(0), tl.to_tensor(stage), stream, BLOCK)
        x_next += z * tl.load(row_ptr + SIGMA)

    tl.store(next_ptr + here, x_next, mask=mask)
    network_input = x_next.to(network_input_ptr.dtype.element_ty)
    tl.store(network_input_ptr + here, network_input, mask=mask)
    if GUIDED:
        tl.store(network_input_ptr + second_half + here, network_input, mask=mask)
    if STORE_X0:
        tl.store(x0_ptr + here, x0, mask=mask)
