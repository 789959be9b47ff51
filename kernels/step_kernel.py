"""The step of the sampling loop: one launch per network evaluation, each operand read once, each result written once.

    out    = u + guidance·(c - u)                   if GUIDED: predictions with and without the condition;
                                                    guidance is 1 + GUIDANCE·(guidance - 1) if SCALED
    out    = rescale·out                            if RESCALED: guidance rescale, a factor per sample
    x0     = X0_X·x + X0_OUT·out
    eps    = EPS_X·x + EPS_OUT·out
    x0     = clamp(x0, ±CLIP)                       if CLIPPED; NaN stays NaN
    x0     = clamp(x0, ±bound)/bound                if THRESHOLDED, a bound per sample
    eps    = RE_X·x + RE_X0·x0                      if REDERIVED
    next   = C_X0·x0 + C_EPS·eps                    + C_X·x if ADD_STATE, + C_Hj·h_j if READ_Hj, + sigma·z if NOISY
    h_w    = M_X·x + M_X0·x0 + M_EPS·eps            w is WRITTEN_SLOT, if there is one; + M_H·h_w if READ_Hw

z is drawn in registers (Philox). If CHECKED, the first stage that leaves NaN or infinity in a sample is recorded for
that sample, so the host does not check every step. All arithmetic is float32 without fused multiply-add (compile with
enable_fp_fusion=False); skipstep.kernels.step_numpy does the same operations in the same order. Coefficients come from
a float32 table on the device and not as scalar arguments: different launchers round those differently, and a captured
graph could not change them. skipstep.kernels.layout describes the columns, skipstep.kernels.step has the launcher.

If CHANNELS, samples are in channels-last order, all of them: state, history, and what the network reads and writes.
The noise of an element is the same in both orders.

If PLACED, the samples of the batch are some of those that are kept in memory, each at a stage of its own: the state,
what a call brings and the history, `[places, slots, n]` then, are read and written where `counter_ptr` says.

A slot may be read and written in one launch. Threads may store elements that others loaded, but what is stored follows
from what was loaded (by M_H), so the exchange between threads orders the two. Do not drop that term where M_H is zero.
"""

import triton
import triton.language as tl

from skipstep.kernels.layout import NUM_COLUMNS, NUM_SLOTS, Column, Stream
from skipstep.kernels.philox_kernel import noise_block, positions_of

ROW = tl.constexpr(NUM_COLUMNS)
SLOTS = tl.constexpr(NUM_SLOTS)
X0_X = tl.constexpr(int(Column.X0_X))
X0_OUT = tl.constexpr(int(Column.X0_OUT))
EPS_X = tl.constexpr(int(Column.EPS_X))
EPS_OUT = tl.constexpr(int(Column.EPS_OUT))
CLIP = tl.constexpr(int(Column.CLIP))
RE_X = tl.constexpr(int(Column.RE_X))
RE_X0 = tl.constexpr(int(Column.RE_X0))
C_X0 = tl.constexpr(int(Column.C_X0))
C_EPS = tl.constexpr(int(Column.C_EPS))
C_X = tl.constexpr(int(Column.C_X))
C_H0 = tl.constexpr(int(Column.C_H0))
C_H1 = tl.constexpr(int(Column.C_H1))
C_H2 = tl.constexpr(int(Column.C_H2))
GUIDANCE = tl.constexpr(int(Column.GUIDANCE))
M_X = tl.constexpr(int(Column.M_X))
M_X0 = tl.constexpr(int(Column.M_X0))
M_EPS = tl.constexpr(int(Column.M_EPS))
M_H = tl.constexpr(int(Column.M_H))
SIGMA = tl.constexpr(int(Column.SIGMA))
LOG_SIGMA = tl.constexpr(int(Column.LOG_SIGMA))
LOG_SIGMA_OUT = tl.constexpr(int(Column.LOG_SIGMA_OUT))
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
STEP_STREAM = tl.constexpr(int(Stream.STEP))


@triton.jit(do_not_specialize=["stage"])
def ddim_step_kernel(
    state_ptr,  # float32 [B, n], x_t; may be next_ptr
    next_ptr,  # float32 [B, n], x_s
    output_ptr,  # float16, bfloat16 or float32 [B or 2B, n], the network's output; 2n if WIDE
    network_input_ptr,  # the same dtypes, [B or 2B, n], the network's next input, 2B if DOUBLED; not if PLACED
    x0_ptr,  # float32 [B, n], written if STORE_X0
    history_ptr,  # float32 [slots, B, n], slot j read if READ_Hj, WRITTEN_SLOT written
    table_ptr,  # float32 [S, B or 1, ROW]
    seeds_ptr,  # int64 [B], read if NOISY
    guidance_ptr,  # float32 [B], read if GUIDED
    rescale_ptr,  # float32 [B], read if RESCALED
    bound_ptr,  # float32 [B], read if THRESHOLDED
    counter_ptr,  # int32 [1], the stage, if COUNTED; [B, 3], place (-1: none), row and stage of samples, if PLACED
    broken_ptr,  # int32 [B], lowered to the first stage that left a sample not finite, if CHECKED
    num_elements,  # n = C·H·W
    stage,  # row of the table and word of the noise counter
    PER_SAMPLE: tl.constexpr,  # the table has a row per sample
    CLIPPED: tl.constexpr,
    THRESHOLDED: tl.constexpr,
    REDERIVED: tl.constexpr,
    ADD_STATE: tl.constexpr,
    READ_H0: tl.constexpr,
    READ_H1: tl.constexpr,
    READ_H2: tl.constexpr,
    WRITTEN_SLOT: tl.constexpr,  # -1 for none
    NOISY: tl.constexpr,
    LEARNED_VARIANCE: tl.constexpr,  # with WIDE
    WIDE: tl.constexpr,  # the network's output has twice the state's channels
    GUIDED: tl.constexpr,
    DOUBLED: tl.constexpr,
    SCALED: tl.constexpr,
    RESCALED: tl.constexpr,
    STORE_X0: tl.constexpr,
    COUNTED: tl.constexpr,
    CHECKED: tl.constexpr,
    PLACED: tl.constexpr,
    CHANNELS: tl.constexpr,  # of the state, if all are in channels-last order; else 0
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    batch_size = tl.num_programs(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    second_half = batch_size * num_elements

    if COUNTED:
        stage = tl.load(counter_ptr)
    place, row = sample, stage
    if PLACED:
        place = tl.load(counter_ptr + 3 * sample).to(tl.int64)
        row = tl.load(counter_ptr + 3 * sample + 1)
        stage = tl.load(counter_ptr + 3 * sample + 2)
        mask = offsets < tl.where(place < 0, 0, num_elements)
        place = tl.maximum(place, 0)
    elements = place * num_elements + offsets
    row_ptr = table_ptr + tl.cast(row, tl.int64) * ROW
    if PER_SAMPLE:
        row_ptr = table_ptr + (tl.cast(stage, tl.int64) * batch_size + sample) * ROW

    x = tl.load(state_ptr + elements, mask=mask)
    predicted = sample * num_elements + offsets
    predicted_half = second_half
    interpolated = tl.cast(num_elements, tl.int64)
    if WIDE:  # [B, 2, n]: the prediction, then its interpolation between two variances.
        predicted += sample * num_elements
        predicted_half = 2 * second_half
        if CHANNELS > 0:  # [B, positions, 2, CHANNELS]
            predicted += positions_of(offsets, num_elements, CHANNELS) * CHANNELS
            interpolated = tl.full((), CHANNELS, tl.int64)
    out = tl.load(output_ptr + predicted, mask=mask).to(tl.float32)
    if GUIDED:
        unconditional = tl.load(output_ptr + predicted_half + predicted, mask=mask).to(tl.float32)
        guidance = tl.load(guidance_ptr + place)
        if SCALED:
            guidance = tl.load(row_ptr + GUIDANCE) * (guidance - 1.0) + 1.0
        out = unconditional + guidance * (out - unconditional)
    if RESCALED:
        out = out * tl.load(rescale_ptr + sample)

    x0 = tl.load(row_ptr + X0_X) * x + tl.load(row_ptr + X0_OUT) * out
    if CLIPPED:
        clip = tl.load(row_ptr + CLIP)
        x0 = tl.minimum(x0, clip, propagate_nan=tl.PropagateNan.ALL)
        x0 = tl.maximum(x0, -clip, propagate_nan=tl.PropagateNan.ALL)
    if THRESHOLDED:
        bound = tl.load(bound_ptr + sample)
        x0 = tl.minimum(x0, bound, propagate_nan=tl.PropagateNan.ALL)
        x0 = tl.div_rn(tl.maximum(x0, -bound, propagate_nan=tl.PropagateNan.ALL), bound)
    if REDERIVED:
        eps = tl.load(row_ptr + RE_X) * x + tl.load(row_ptr + RE_X0) * x0
    else:
        eps = tl.load(row_ptr + EPS_X) * x + tl.load(row_ptr + EPS_OUT) * out

    x_next = tl.load(row_ptr + C_X0) * x0 + tl.load(row_ptr + C_EPS) * eps
    if ADD_STATE:
        x_next += tl.load(row_ptr + C_X) * x
    history = elements
    slot_size = second_half
    if PLACED:
        history = elements + place * ((SLOTS - 1) * num_elements)
        slot_size = tl.cast(num_elements, tl.int64)
    if READ_H0:
        h0 = tl.load(history_ptr + history, mask=mask)
        x_next += tl.load(row_ptr + C_H0) * h0
    if READ_H1:
        h1 = tl.load(history_ptr + slot_size + history, mask=mask)
        x_next += tl.load(row_ptr + C_H1) * h1
    if READ_H2:
        h2 = tl.load(history_ptr + 2 * slot_size + history, mask=mask)
        x_next += tl.load(row_ptr + C_H2) * h2
    if NOISY:
        seed = tl.load(seeds_ptr + place)
        stream = tl.full((), STEP_STREAM, tl.uint32)
        z = noise_block(seed, offsets, num_elements, tl.cast(stage, tl.int32), stream, CHANNELS, BLOCK)
        if LEARNED_VARIANCE:
            v = tl.load(output_ptr + predicted + interpolated, mask=mask).to(tl.float32)
            z = z * tl.exp(tl.load(row_ptr + LOG_SIGMA) + tl.load(row_ptr + LOG_SIGMA_OUT) * v)
        x_next += z * tl.load(row_ptr + SIGMA)

    tl.store(next_ptr + elements, x_next, mask=mask)
    if CHECKED:
        # A comparison with NaN is false.
        sound = (tl.abs(x_next) <= LARGEST) | ~mask
        if tl.min(sound.to(tl.int32)) == 0:
            tl.atomic_min(broken_ptr + place, tl.cast(stage, tl.int32), sem="relaxed")
    if not PLACED:
        network_input = x_next.to(network_input_ptr.dtype.element_ty)
        tl.store(network_input_ptr + elements, network_input, mask=mask)
        if DOUBLED:
            tl.store(network_input_ptr + second_half + elements, network_input, mask=mask)
    if WRITTEN_SLOT >= 0:
        kept = tl.load(row_ptr + M_X) * x + tl.load(row_ptr + M_X0) * x0 + tl.load(row_ptr + M_EPS) * eps
        if WRITTEN_SLOT == 0 and READ_H0:
            kept += tl.load(row_ptr + M_H) * h0
        if WRITTEN_SLOT == 1 and READ_H1:
            kept += tl.load(row_ptr + M_H) * h1
        if WRITTEN_SLOT == 2 and READ_H2:
            kept += tl.load(row_ptr + M_H) * h2
        tl.store(history_ptr + WRITTEN_SLOT * slot_size + history, kept, mask=mask)
    if STORE_X0:
        tl.store(x0_ptr + elements, x0, mask=mask)
