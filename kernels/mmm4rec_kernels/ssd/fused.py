# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The scan in Triton: one kernel each way for what fits a tile, chunks side by side for what is longer.

Letters: B sequences, L places, H heads, P head dim, G groups, N state, K chunks of a sequence; BL, BP, BN are places
of a chunk, and P, N rounded up. A program takes one head of one chunk, which is one quadratic product in registers.
Longer sequences need three steps: what each chunk alone writes into the state, a walk over the chunks that turns this
into the state at each chunk's start, and the chunks' results with that state; backward the same in reverse. Time and
memory grow linearly. With fewer groups than heads each head writes its own share of the gradients of B and C; shares
and the gradients of A, D and dt_bias are added in one ordered sum: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.backend import interpreting
from mmm4rec_kernels.launch import align, kind, precision, tile, warp_group_products
from mmm4rec_kernels.ssd.ops import ONE_TILE, chunk_places, chunks
from mmm4rec_kernels.sums import sum_rows
from mmm4rec_kernels.tiles import (
    LENGTHS,
    LOG2E,
    PACKED,
    decay_matrix,
    dot,
    pinned,
    sequence_bounds,
    sequence_start,
    sigmoid,
    softplus,
    step_gradients,
    store_sum,
    with_skip,
)

FORWARD_WARPS = {16: 1, 32: 1, 64: 4}
BACKWARD_WARPS = {16: 1, 32: 1, 64: 4}
"""Warps of a program, by the places of its chunk: measured on an H100, one fixed choice, no tuning at a first call.
Backward, three TF32 products in place of one need twice the registers, and two warps up to 32 places."""
STATE_WARPS = 4
WALK = 256
"""Numbers of a state that a program carries over the chunks."""


@triton.jit
def raw_steps(p_dt, p_factor, p_bias, o_t, m_t, dt_row, factor_row, i_h):
    """Step sizes of a tile before softplus; dt as it was read, and its factor."""
    b_raw = tl.load(p_dt + o_t * dt_row, mask=m_t, other=0.0).to(tl.float32)
    b_factor = 1.0
    b_dt = b_raw
    if p_factor is not None:
        b_factor = tl.load(p_factor + o_t * factor_row, mask=m_t, other=0.0).to(tl.float32)
        b_dt *= b_factor
    if p_bias is not None:
        b_dt += tl.load(p_bias + i_h).to(tl.float32)
    return b_dt, b_raw, b_factor


@triton.jit
def final_steps(b_dt, m_t, low, high, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr):
    """Step sizes of a tile, 0 outside the sequence."""
    b_step = b_dt
    if SOFTPLUS:
        b_step = softplus(b_dt)
    if LIMIT:
        b_step = tl.minimum(tl.maximum(b_step, low), high)
    return pinned(tl.where(m_t, b_step, 0.0))


@triton.jit
def last_of(b_total, BL: tl.constexpr):
    """The last of the running sums."""
    return tl.sum(tl.where(tl.arange(0, BL) == BL - 1, b_total, 0.0), 0)


@triton.jit
def again(b, p, mask, STATEFUL: tl.constexpr):
    """The tile, with STATEFUL read once more.

    Beside the state too little memory is left to hold every input in each layout that a product wants; the cache has
    them. The stores between the products keep the compiler from joining the reads.
    """
    if STATEFUL:
        return tl.load(p, mask=mask, other=0.0)
    else:
        return b


@triton.jit
def turnable(b, b_product, TURN: tl.constexpr):
    """The tile in the register layout of a product's result.

    From there a transposed store into shared memory has no bank conflicts; a tile as it was read has eight-fold ones.
    """
    if TURN:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f,f", [b, b_product], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return b


@triton.jit
def place_of(p_ends, length, chunks, H: tl.constexpr, ENDS: tl.constexpr):
    """Head, chunk and sequence of a program; first row in a packed tensor, places of the sequence, places to write."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_s = i_c // chunks
    first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
    return i_h, i_c % chunks, i_s, first, count, written


@triton.jit
def dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, dt_head, ENDS: tl.constexpr):
    """Where the step sizes of a head of a sequence start."""
    if ENDS == PACKED:
        return p_dt + first * dt_row + i_h * dt_head
    else:
        return p_dt + tl.cast(i_s, tl.int64) * dt_batch + i_h * dt_head


@triton.jit
def row_start(first, i_s, length, ENDS: tl.constexpr):
    """First row of a sequence in a contiguous tensor."""
    if ENDS == PACKED:
        return first
    else:
        return tl.cast(i_s, tl.int64) * length


@triton.jit(do_not_specialize=["length", "x_batch", "B_batch", "dt_batch", "factor_batch"])
def chunk_writes(
    p_x,
    p_dt,
    p_factor,
    p_A,
    p_B,
    p_bias,
    p_ends,
    p_states,
    p_through,
    length,
    chunks,
    low,
    high,
    x_batch,
    B_batch,
    dt_batch,
    dt_row,
    dt_head,
    factor_batch,
    factor_row,
    factor_head,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    SHARES: tl.constexpr,
    ROW_X: tl.constexpr,
    HEAD_X: tl.constexpr,
    ROW_B: tl.constexpr,
    GROUP_B: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    SINCE: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a chunk alone adds to the state, and its whole decay; with SINCE, to the gradient of the state (x = dy)."""
    i_h, i_t, i_s, first, count, _ = place_of(p_ends, length, chunks, H, ENDS)
    if i_t * BL >= count:
        return
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS) + i_h * HEAD_X
    p_B += sequence_start(first, i_s, B_batch, ROW_B, ALIGN, ENDS) + (i_h // SHARES) * GROUP_B
    p_dt = dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, dt_head, ENDS)
    if p_factor is not None:
        p_factor = dt_start(p_factor, first, i_s, i_h, factor_batch, factor_row, factor_head, ENDS)
    o_t = i_t * BL + tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_t = o_t < count
    b_x = tl.load(p_x + o_t[:, None] * ROW_X + o_p[None, :], mask=m_t[:, None] & (o_p < P)[None, :], other=0.0)
    b_B = tl.load(p_B + o_t[:, None] * ROW_B + o_n[None, :], mask=m_t[:, None] & (o_n < N)[None, :], other=0.0)
    b_dt, _, _ = raw_steps(p_dt, p_factor, p_bias, o_t, m_t, dt_row, factor_row, i_h)
    b_step = final_steps(b_dt, m_t, low, high, SOFTPLUS, LIMIT)
    b_total = tl.cumsum(b_step.to(tl.float64) * (tl.load(p_A + i_h).to(tl.float64) * LOG2E), 0)
    total = last_of(b_total, BL)
    b_factor = tl.exp2(b_total.to(tl.float32)) if SINCE else b_step * tl.exp2((total - b_total).to(tl.float32))
    at_state = (tl.cast(i_s, tl.int64) * H + i_h) * chunks + i_t
    b_state = dot(tl.trans(b_x.to(tl.float32) * b_factor[:, None]), b_B, KIND, PRECISION)
    p_state = p_states + at_state * (P * N) + o_p[:, None] * N + o_n[None, :]
    tl.store(p_state, b_state, mask=(o_p < P)[:, None] & (o_n < N)[None, :])
    tl.store(p_through + at_state, tl.exp2(total.to(tl.float32)))


@triton.jit
def carried(p_states, p_through, k, m_k, o_i, m_i, SIZE: tl.constexpr):
    """What chunk k alone adds, and its decay."""
    b_add = tl.load(p_states + k.to(tl.int64) * SIZE + o_i, mask=m_i & m_k, other=0.0)
    return b_add, tl.load(p_through + k, mask=m_k, other=1.0)


@triton.jit(do_not_specialize=["length"])
def walk(
    p_states,
    p_through,
    p_first,
    p_last,
    p_ends,
    length,
    chunks,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    ENDS: tl.constexpr,
    BACK: tl.constexpr,
    BL: tl.constexpr,
    BI: tl.constexpr,
):
    """Replaces what each chunk alone adds by what arrives at it, forward or, with BACK, from the end."""
    i_sh = tl.program_id(0)
    _, count, _ = sequence_bounds(p_ends, i_sh // H, length, ENDS)
    used = (count + BL - 1) // BL
    o_i = tl.program_id(1) * BI + tl.arange(0, BI)
    m_i = o_i < SIZE
    at = tl.cast(i_sh, tl.int64)
    p_states += at * chunks * SIZE
    p_through += at * chunks
    b_state = tl.zeros([BI], tl.float32)
    if p_first is not None:
        b_state += tl.load(p_first + at * SIZE + o_i, mask=m_i, other=0.0).to(tl.float32)
    k = used * 0
    step = 1
    if BACK:
        k = used - 1
        step = -1
    for done in range(0, used, 4):
        # Four loads together before the first store: a store would hold back the loads behind it.
        b_0, through_0 = carried(p_states, p_through, k, done < used, o_i, m_i, SIZE)
        b_1, through_1 = carried(p_states, p_through, k + step, done + 1 < used, o_i, m_i, SIZE)
        b_2, through_2 = carried(p_states, p_through, k + 2 * step, done + 2 < used, o_i, m_i, SIZE)
        b_3, through_3 = carried(p_states, p_through, k + 3 * step, done + 3 < used, o_i, m_i, SIZE)
        p_to = p_states + k.to(tl.int64) * SIZE + o_i
        tl.store(p_to, b_state, mask=m_i)
        b_state = b_state * through_0 + b_0
        tl.store(p_to + step * SIZE, b_state, mask=m_i & (done + 1 < used))
        b_state = b_state * through_1 + b_1
        tl.store(p_to + 2 * step * SIZE, b_state, mask=m_i & (done + 2 < used))
        b_state = b_state * through_2 + b_2
        tl.store(p_to + 3 * step * SIZE, b_state, mask=m_i & (done + 3 < used))
        b_state = b_state * through_3 + b_3
        k += 4 * step
    if p_last is not None:
        tl.store(p_last + at * SIZE + o_i, b_state, mask=m_i)


@triton.jit(do_not_specialize=["length", "x_batch", "B_batch", "C_batch", "dt_batch", "factor_batch"])
def scan_forward(
    p_x,
    p_dt,
    p_factor,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_ends,
    p_y,
    p_states,
    length,
    chunks,
    low,
    high,
    x_batch,
    B_batch,
    C_batch,
    dt_batch,
    dt_row,
    dt_head,
    factor_batch,
    factor_row,
    factor_head,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    SHARES: tl.constexpr,
    ROW_X: tl.constexpr,
    HEAD_X: tl.constexpr,
    ROW_B: tl.constexpr,
    GROUP_B: tl.constexpr,
    ROW_C: tl.constexpr,
    GROUP_C: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    SKIP_DT: tl.constexpr,
    D_WIDE: tl.constexpr,
    STATEFUL: tl.constexpr,
    TURN: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h, i_t, i_s, first, count, written = place_of(p_ends, length, chunks, H, ENDS)
    if i_t * BL >= written:
        return
    i_g = i_h // SHARES
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS) + i_h * HEAD_X
    p_B += sequence_start(first, i_s, B_batch, ROW_B, ALIGN, ENDS) + i_g * GROUP_B
    p_C += sequence_start(first, i_s, C_batch, ROW_C, ALIGN, ENDS) + i_g * GROUP_C
    p_dt = dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, dt_head, ENDS)
    if p_factor is not None:
        p_factor = dt_start(p_factor, first, i_s, i_h, factor_batch, factor_row, factor_head, ENDS)
    p_y += row_start(first, i_s, length, ENDS) * (H * P) + i_h * P

    o_t = i_t * BL + tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_t = o_t < count
    m_p = o_p < P
    m_n = o_n < N
    m_tx = m_t[:, None] & m_p[None, :]
    m_tn = m_t[:, None] & m_n[None, :]
    A = tl.load(p_A + i_h).to(tl.float64) * LOG2E
    b_dt, _, _ = raw_steps(p_dt, p_factor, p_bias, o_t, m_t, dt_row, factor_row, i_h)
    b_step = final_steps(b_dt, m_t, low, high, SOFTPLUS, LIMIT)
    b_total = tl.cumsum(b_step.to(tl.float64) * A, 0)
    b_B = tl.load(p_B + o_t[:, None] * ROW_B + o_n[None, :], mask=m_tn, other=0.0)
    b_C = tl.load(p_C + o_t[:, None] * ROW_C + o_n[None, :], mask=m_tn, other=0.0)
    b_x = tl.load(p_x + o_t[:, None] * ROW_X + o_p[None, :], mask=m_tx, other=0.0)
    b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION) * decay_matrix(b_total, BL)
    D = 0.0
    if p_D is not None and not D_WIDE:
        D = tl.load(p_D + i_h).to(tl.float32)
    b_M = with_skip(b_M, b_step, D, SKIP_DT, BL)
    if STATEFUL:
        at_state = (tl.cast(i_s, tl.int64) * H + i_h) * chunks + i_t
        p_state = p_states + at_state * (P * N) + o_p[:, None] * N + o_n[None, :]
        m_state = m_p[:, None] & m_n[None, :] & (i_t * BL < count)
        b_state = tl.load(p_state, mask=m_state, other=0.0)
        b_since = tl.exp2(b_total.to(tl.float32))
        b_y = dot(b_C, tl.trans(b_state), KIND, PRECISION) * b_since[:, None]
    else:
        b_y = tl.zeros([BL, BP], tl.float32)
    b_y = dot(b_M, turnable(b_x, b_M, TURN), KIND, PRECISION, b_y)
    if D_WIDE:
        b_D = tl.load(p_D + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)[None, :]
        b_y += b_D * b_x.to(tl.float32) * (b_step[:, None] if SKIP_DT else 1.0)
    if ENDS == LENGTHS:
        b_y = tl.where(m_t[:, None], b_y, 0.0)
    m_y = (o_t < written)[:, None] & m_p[None, :]
    tl.store(p_y + o_t[:, None] * (H * P) + o_p[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["length", "x_batch", "B_batch", "C_batch", "dt_batch", "factor_batch"])
def scan_backward(
    p_x,
    p_dt,
    p_factor,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_ends,
    p_states,
    p_dstates,
    p_grad,
    p_dx,
    p_ddt,
    p_dfactor,
    p_dB,
    p_dC,
    p_sums,
    p_dD,
    length,
    chunks,
    low,
    high,
    x_batch,
    B_batch,
    C_batch,
    dt_batch,
    dt_row,
    dt_head,
    factor_batch,
    factor_row,
    factor_head,
    share,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    SHARES: tl.constexpr,
    ROW_X: tl.constexpr,
    HEAD_X: tl.constexpr,
    ROW_B: tl.constexpr,
    GROUP_B: tl.constexpr,
    ROW_C: tl.constexpr,
    GROUP_C: tl.constexpr,
    ROW_DX: tl.constexpr,
    ROW_DDT: tl.constexpr,
    ROW_DB: tl.constexpr,
    ROW_DC: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    SKIP_DT: tl.constexpr,
    D_WIDE: tl.constexpr,
    STATEFUL: tl.constexpr,
    TURN: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h, i_t, i_s, first, count, written = place_of(p_ends, length, chunks, H, ENDS)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    at_chunk = tl.cast(i_s, tl.int64) * chunks + i_t
    p_sums += at_chunk * (3 * H) + i_h
    p_dD += (at_chunk * H + i_h) * P + o_p
    if i_t * BL >= written:
        tl.store(p_sums, 0.0)
        tl.store(p_sums + H, 0.0)
        if D_WIDE:
            tl.store(p_dD, tl.zeros([BP], tl.float32), mask=m_p)
        else:
            tl.store(p_sums + 2 * H, 0.0)
        return
    i_g = i_h // SHARES
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS) + i_h * HEAD_X
    p_B += sequence_start(first, i_s, B_batch, ROW_B, ALIGN, ENDS) + i_g * GROUP_B
    p_C += sequence_start(first, i_s, C_batch, ROW_C, ALIGN, ENDS) + i_g * GROUP_C
    p_dt = dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, dt_head, ENDS)
    if p_factor is not None:
        p_factor = dt_start(p_factor, first, i_s, i_h, factor_batch, factor_row, factor_head, ENDS)
    row = row_start(first, i_s, length, ENDS)
    p_grad += row * (H * P) + i_h * P
    p_dx += row * ROW_DX + i_h * P
    p_dB += (i_h % SHARES).to(tl.int64) * share + row * ROW_DB + i_g * N
    p_dC += (i_h % SHARES).to(tl.int64) * share + row * ROW_DC + i_g * N
    p_ddt += row * ROW_DDT + i_h
    A = tl.load(p_A + i_h).to(tl.float32)

    o_t = i_t * BL + tl.arange(0, BL)
    m_t = o_t < count
    m_written = o_t < written
    m_tx = m_t[:, None] & m_p[None, :]
    m_tn = m_t[:, None] & m_n[None, :]
    m_n_out = m_written[:, None] & m_n[None, :]
    m_p_out = m_written[:, None] & m_p[None, :]
    o_x = o_t[:, None] * ROW_X + o_p[None, :]
    o_B = o_t[:, None] * ROW_B + o_n[None, :]
    o_C = o_t[:, None] * ROW_C + o_n[None, :]
    o_dy = o_t[:, None] * (H * P) + o_p[None, :]
    b_dt, b_raw, b_factor = raw_steps(p_dt, p_factor, p_bias, o_t, m_t, dt_row, factor_row, i_h)
    b_step = final_steps(b_dt, m_t, low, high, SOFTPLUS, LIMIT)
    b_total = tl.cumsum(b_step.to(tl.float64) * (A.to(tl.float64) * LOG2E), 0)
    b_B = tl.load(p_B + o_B, mask=m_tn, other=0.0)
    b_C = tl.load(p_C + o_C, mask=m_tn, other=0.0)
    b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION)
    b_dy = tl.load(p_grad + o_dy, mask=m_tx, other=0.0)
    b_x = tl.load(p_x + o_x, mask=m_tx, other=0.0)
    # All that is summed over the head dim is in this product: gradients of steps, decays and skip are sums of it.
    b_W = dot(b_dy, tl.trans(b_x), KIND, PRECISION)
    b_decay = decay_matrix(b_total, BL)
    b_M *= b_decay
    D = 0.0
    if p_D is not None and not D_WIDE:
        D = tl.load(p_D + i_h).to(tl.float32)
    b_ends, b_dstep, b_dskip = step_gradients(b_W, b_M, b_step, D, SKIP_DT, BL, KIND, PRECISION)
    b_M = with_skip(b_M, b_step, D, SKIP_DT, BL)
    if D_WIDE:
        b_D = tl.load(p_D + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)[None, :]
        b_skipped = b_dy.to(tl.float32) * b_x.to(tl.float32)
        if SKIP_DT:
            b_dstep += tl.sum(b_skipped * b_D, 1)
            b_skipped *= b_step[:, None]
            b_D *= b_step[:, None]
        tl.store(p_dD, tl.sum(b_skipped, 0), mask=m_p)
        b_skip = b_dy.to(tl.float32) * b_D
    else:
        store_sum(p_sums + 2 * H, b_dskip)
    b_W *= b_decay * b_step[None, :]

    if STATEFUL:
        total = last_of(b_total, BL)
        b_until = tl.exp2((total - b_total).to(tl.float32))
        at_state = ((tl.cast(i_s, tl.int64) * H + i_h) * chunks + i_t) * (P * N)
        o_state = at_state + o_p[:, None] * N + o_n[None, :]
        m_state = m_p[:, None] & m_n[None, :] & (i_t * BL < count)
        b_B = again(b_B, p_B + o_B, m_tn, STATEFUL)
        b_dstate = tl.load(p_dstates + o_state, mask=m_state, other=0.0)
        b_dx = dot(b_B, tl.trans(b_dstate), KIND, PRECISION) * (b_until * b_step)[:, None]
    else:
        b_dx = tl.zeros([BL, BP], tl.float32)
    b_dy = again(b_dy, p_grad + o_dy, m_tx, STATEFUL)
    b_dx = dot(tl.trans(b_M), turnable(b_dy, b_W, TURN), KIND, PRECISION, b_dx)
    if D_WIDE:
        b_dx += b_skip
    tl.store(p_dx + o_t[:, None] * ROW_DX + o_p[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_p_out)

    if STATEFUL:
        b_B = again(b_B, p_B + o_B, m_tn, STATEFUL)
        b_x = again(b_x, p_x + o_x, m_tx, STATEFUL)
        b_dB = dot(b_x, turnable(b_dstate, b_W, TURN), KIND, PRECISION) * b_until[:, None]
        b_wrote = tl.sum(b_dB * b_B.to(tl.float32), 1)
        b_dstep += b_wrote
        b_wrote = (b_wrote * b_step).to(tl.float64)
        b_dB *= b_step[:, None]
    else:
        b_dB = tl.zeros([BL, BN], tl.float32)
    b_C = again(b_C, p_C + o_C, m_tn, STATEFUL)
    b_dB = dot(tl.trans(b_W), turnable(b_C, b_W, TURN), KIND, PRECISION, b_dB)
    tl.store(p_dB + o_t[:, None] * ROW_DB + o_n[None, :], b_dB.to(p_dB.dtype.element_ty), mask=m_n_out)

    if STATEFUL:
        b_dy = again(b_dy, p_grad + o_dy, m_tx, STATEFUL)
        b_C = again(b_C, p_C + o_C, m_tn, STATEFUL)
        b_dstate = again(b_dstate, p_dstates + o_state, m_state, STATEFUL)
        b_state = tl.load(p_states + o_state, mask=m_state, other=0.0)
        passed = tl.sum(tl.sum(b_dstate * b_state, 1), 0) * tl.exp2(total.to(tl.float32))
        b_since = tl.exp2(b_total.to(tl.float32))[:, None]
        b_dC = dot(b_dy, turnable(b_state, b_W, TURN), KIND, PRECISION) * b_since
        b_ends += tl.sum(b_dC * b_C.to(tl.float32), 1).to(tl.float64)
    else:
        b_dC = tl.zeros([BL, BN], tl.float32)
    b_B = again(b_B, p_B + o_B, m_tn, STATEFUL)
    b_dC = dot(b_W, turnable(b_B, b_W, TURN), KIND, PRECISION, b_dC)
    tl.store(p_dC + o_t[:, None] * ROW_DC + o_n[None, :], b_dC.to(p_dC.dtype.element_ty), mask=m_n_out)

    # A step's decay acts on what was written before it, in the chunk and before the chunk, and is read behind it.
    b_da = tl.cumsum(b_ends, 0, reverse=True)
    if STATEFUL:
        b_da += tl.cumsum(b_wrote, 0) - b_wrote + passed.to(tl.float64)
    b_da = tl.where(m_t, b_da.to(tl.float32), 0.0)
    b_dstep += b_da * A
    if LIMIT:
        b_free = b_dt
        if SOFTPLUS:
            b_free = softplus(b_dt)
        b_dstep = tl.where((b_free >= low) & (b_free <= high), b_dstep, 0.0)
    if SOFTPLUS:
        b_dstep *= sigmoid(b_dt)
    b_dstep = tl.where(m_t, b_dstep, 0.0)
    store_sum(p_sums, b_da * b_step)
    store_sum(p_sums + H, b_dstep)
    if p_factor is not None:
        p_dfactor += row * H + i_h
        tl.store(p_dfactor + o_t * H, (b_dstep * b_raw).to(p_dfactor.dtype.element_ty), mask=m_written)
        b_dstep *= b_factor
    tl.store(p_ddt + o_t * ROW_DDT, b_dstep.to(p_ddt.dtype.element_ty), mask=m_written)


def _sizes(
    x: torch.Tensor, B: torch.Tensor, ends: torch.Tensor | None, packed: bool, longest: int
) -> tuple[int, int, int, int, int]:
    """Sequences, places of a chunk, chunks, and P and N rounded up."""
    sequences = ends.numel() - 1 if packed and ends is not None else x.shape[0]
    width, state = x.shape[3], B.shape[3]
    return (
        sequences,
        chunk_places(longest, width, state),
        chunks(longest, width, state),
        tile(width),
        tile(state),
    )


def _warps(table: dict[int, int], BL: int, BP: int, BN: int, stateful: bool) -> int:
    if BP * BN > ONE_TILE * ONE_TILE:
        return 8
    return 4 if stateful else table[BL]


def _turns(x: torch.Tensor, BL: int, BP: int, BN: int) -> bool:
    """Whether tiles are laid out for a transposed store: float32 operands of warp-group products, square tiles."""
    square = BL == BP == BN == ONE_TILE
    return square and x.dtype == torch.float32 and not interpreting() and warp_group_products(x)


def _arrivals(
    writer: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    softplus_on: bool,
    limit: tuple[float, float] | None,
    factor: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    back: bool,
) -> torch.Tensor:
    """What arrives at each chunk [S, H, K, P, N]: the state or, with `back`, its gradient; `last` receives the end."""
    length, heads, width = writer.shape[1:]
    groups, state = B.shape[2:]
    sequences, BL, count, BP, BN = _sizes(writer, B, ends, packed, longest)
    states = torch.empty(sequences, heads, count, width, state, dtype=torch.float32, device=writer.device)
    through = torch.empty(sequences, heads, count, dtype=torch.float32, device=writer.device)
    unit = align(*(t.stride(i) for t in (writer, B) for i in (0, 1, 2)))
    mode = 0 if ends is None else 2 if packed else 1
    chunk_writes[(heads * count * sequences,)](
        writer,
        dt,
        factor,
        A,
        B,
        bias,
        ends,
        states,
        through,
        length,
        count,
        *((0.0, 0.0) if limit is None else limit),
        writer.stride(0) // unit,
        B.stride(0) // unit,
        *dt.stride(),
        *_factor_strides(factor),
        H=heads,
        P=width,
        N=state,
        SHARES=heads // groups,
        ROW_X=writer.stride(1),
        HEAD_X=writer.stride(2),
        ROW_B=B.stride(1),
        GROUP_B=B.stride(2),
        ALIGN=unit,
        ENDS=mode,
        SOFTPLUS=softplus_on,
        LIMIT=limit is not None,
        SINCE=back,
        BL=BL,
        BP=BP,
        BN=BN,
        KIND=kind(writer.dtype),
        PRECISION=precision(),
        num_warps=STATE_WARPS,
        num_stages=1,
    )
    walk[(heads * sequences, triton.cdiv(width * state, WALK))](
        states,
        through,
        first,
        last,
        ends,
        length,
        count,
        H=heads,
        SIZE=width * state,
        ENDS=mode,
        BACK=back,
        BL=BL,
        BI=WALK,
        num_warps=2,
    )
    return states


def _factor_strides(factor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if factor is None else factor.stride()


def _strides(
    x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, factor: torch.Tensor | None
) -> tuple[tuple[int, ...], dict[str, int]]:
    unit = align(*(t.stride(i) for t in (x, B, C) for i in (0, 1, 2)))
    batch = (x.stride(0) // unit, B.stride(0) // unit, C.stride(0) // unit, *dt.stride(), *_factor_strides(factor))
    return batch, {
        "ROW_X": x.stride(1),
        "HEAD_X": x.stride(2),
        "ROW_B": B.stride(1),
        "GROUP_B": B.stride(2),
        "ROW_C": C.stride(1),
        "GROUP_C": C.stride(2),
        "ALIGN": unit,
    }


def forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    softplus_on: bool,
    limit: tuple[float, float] | None,
    skip_dt: bool,
    want_final: bool,
    factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Y [B, L, H, P], the states at the chunks' starts [B, H, K, P, N], the last states; empty where not needed.

    `factor` [B, L, H] multiplies dt before the bias.
    """
    batch, length, heads, width = x.shape
    groups, state = B.shape[2:]
    sequences, BL, count, BP, BN = _sizes(x, B, ends, packed, longest)
    y = torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device)
    stateful = count > 1 or initial is not None or want_final
    states = torch.empty((0,), dtype=torch.float32, device=x.device)
    final = torch.empty((sequences, heads, width, state) if want_final else (0,), dtype=torch.float32, device=x.device)
    if sequences == 0:
        return y, states.new_empty((0, heads, count, width, state)) if stateful else states, final
    if stateful:
        first = None if initial is None else initial.contiguous()
        last = final if want_final else None
        where = (ends, packed, longest, softplus_on, limit, factor)
        states = _arrivals(x, dt, A, B, bias, *where, first, last, False)
    strides, layout = _strides(x, dt, B, C, factor)
    scan_forward[(heads * count * sequences,)](
        x,
        dt,
        factor,
        A,
        B,
        C,
        D,
        bias,
        ends,
        y,
        states,
        length,
        count,
        *((0.0, 0.0) if limit is None else limit),
        *strides,
        H=heads,
        P=width,
        N=state,
        SHARES=heads // groups,
        **layout,
        ENDS=0 if ends is None else 2 if packed else 1,
        SOFTPLUS=softplus_on,
        LIMIT=limit is not None,
        SKIP_DT=skip_dt,
        D_WIDE=D is not None and D.dim() == 2,
        STATEFUL=stateful,
        TURN=not stateful and _turns(x, BL, BP, BN),
        BL=BL,
        BP=BP,
        BN=BN,
        KIND=kind(x.dtype),
        PRECISION=precision(),
        num_warps=_warps(FORWARD_WARPS, BL, BP, BN, stateful),
        num_stages=1,
    )
    return y, states, final


def backward(
    grad: torch.Tensor,
    grad_final: torch.Tensor | None,
    states: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    softplus_on: bool,
    limit: tuple[float, float] | None,
    skip_dt: bool,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    factor: torch.Tensor | None = None,
    d_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, B, C, the initial states, of A, bias, D [3, H] and of D [H, P]; empty where there is none.

    `into` receives the gradients of x, B, C and dt: [B, L, E], [B, L, GN], [B, L, GN] and [B, L, H], their columns
    contiguous and their places a fixed stride apart. `factor` [B, L, H] multiplied dt; `d_factor` receives its
    gradient, contiguous.
    """
    batch, length, heads, width = x.shape
    groups, state = B.shape[2:]
    shares = heads // groups
    sequences, BL, count, BP, BN = _sizes(x, B, ends, packed, longest)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    wide = D is not None and D.dim() == 2
    three_pass = x.dtype == torch.float32 and precision() == "tf32x3"
    if into is None:
        d_x = new(batch, length, heads * width, dtype=x.dtype)
        d_B, d_C = (new(batch, length, groups * state, dtype=x.dtype) for _ in range(2))
        d_dt = new(batch, length, heads, dtype=dt.dtype)
    else:
        d_x, d_B, d_C, d_dt = into
    if shares > 1:
        B_target, C_target = (new(shares, batch, length, groups * state) for _ in range(2))
    else:
        B_target, C_target = d_B, d_C
    d_initial = new(0) if initial is None else new(*initial.shape)
    sums = new(sequences * count, 3, heads) if sequences else torch.zeros(1, 3, heads, device=x.device)
    d_D = new(sequences * count if wide else 0, heads, width)
    if sequences:
        grad = grad.reshape(x.shape).contiguous()
        d_states = states
        if states.numel():
            first = None if grad_final is None else grad_final.contiguous()
            last = None if initial is None else d_initial
            where = (ends, packed, longest, softplus_on, limit, factor)
            d_states = _arrivals(grad, dt, A, C, bias, *where, first, last, True)
        strides, layout = _strides(x, dt, B, C, factor)
        scan_backward[(heads * count * sequences,)](
            x,
            dt,
            factor,
            A,
            B,
            C,
            D,
            bias,
            ends,
            states,
            d_states,
            grad,
            d_x,
            d_dt,
            d_factor,
            B_target,
            C_target,
            sums,
            d_D,
            length,
            count,
            *((0.0, 0.0) if limit is None else limit),
            *strides,
            batch * length * groups * state,
            H=heads,
            P=width,
            N=state,
            SHARES=shares,
            **layout,
            ROW_DX=d_x.stride(1),
            ROW_DDT=d_dt.stride(1),
            ROW_DB=B_target.stride(-2),
            ROW_DC=C_target.stride(-2),
            ENDS=0 if ends is None else 2 if packed else 1,
            SOFTPLUS=softplus_on,
            LIMIT=limit is not None,
            SKIP_DT=skip_dt,
            D_WIDE=wide,
            STATEFUL=states.numel() > 0,
            TURN=states.numel() > 0 and _turns(x, BL, BP, BN),
            BL=BL,
            BP=BP,
            BN=BN,
            KIND=kind(x.dtype),
            PRECISION=precision(),
            num_warps=max(_warps(BACKWARD_WARPS, BL, BP, BN, states.numel() > 0), 2 if three_pass and BL == 32 else 1),
            num_stages=1,
        )
    if shares > 1:
        d_B.copy_(B_target.sum(0))
        d_C.copy_(C_target.sum(0))
    totals = sum_rows(sums.view(-1, 3 * heads)).view(3, heads)
    return d_x, d_dt, d_B, d_C, d_initial, totals, d_D.sum(0) if wide else new(0)
