# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Scans of more than one chunk, or with states in or out: a program walks over the chunks of one head of a segment.

Letters as in `fused`; a segment is CS neighbouring chunks of a sequence, and a sequence has SC segments. The state,
backward its gradient, stays in registers from chunk to chunk. What arrives at a segment is found before: what each
segment alone adds, and a walk over the segments. A sequence of one segment needs neither. The compiler is told to keep
what is the same for all chunks inside the loop: carried along it takes the registers of two tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmm4rec_kernels.ssd.chunk import (
    again,
    chunk_gradients,
    chunk_result,
    dt_start,
    final_steps,
    last_of,
    raw_steps,
    row_start,
)
from mmm4rec_kernels.tiles import LOG2E, dot, sequence_bounds, sequence_start, store_sum


@triton.jit
def segment_of(p_ends, length, CS, SC, H: tl.constexpr, ENDS: tl.constexpr, BL: tl.constexpr):
    """Head, segment and sequence of a program, as `sequence_bounds`, first chunk and the chunk behind the last."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_s = i_c // SC
    i_c %= SC
    first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
    return i_h, i_c, i_s, first, count, written, i_c * CS, tl.minimum(i_c * CS + CS, (written + BL - 1) // BL)


@triton.jit
def arriving(
    p, at, start, count, SC, o_state, m_state, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr
):
    """What arrives at a segment that starts at place `start`: the state or its gradient; zero where p is None."""
    b_state = tl.zeros([BP, BN], tl.float32)
    if p is not None:
        m_state = m_state & ((start < count) | (SC == 1))
        b_state += tl.load(p + at * (P * N) + o_state, mask=m_state, other=0.0).to(tl.float32)
    return b_state


@triton.jit(do_not_specialize=["length", "x_batch", "B_batch", "dt_batch", "factor_batch"])
def segment_writes(
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
    CS,
    SC,
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
    """What a segment alone adds to the state, and its whole decay; with SINCE, to the state's gradient (x = dy)."""
    i_h, i_c, i_s, first, count, _written, i_first, i_end = segment_of(p_ends, length, CS, SC, H, ENDS, BL)
    i_end = tl.minimum(i_end, (count + BL - 1) // BL)
    if i_first >= i_end:
        return
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS) + i_h * HEAD_X
    p_B += sequence_start(first, i_s, B_batch, ROW_B, ALIGN, ENDS) + (i_h // SHARES) * GROUP_B
    p_dt = dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, dt_head, ENDS)
    if p_factor is not None:
        p_factor = dt_start(p_factor, first, i_s, i_h, factor_batch, factor_row, factor_head, ENDS)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    o_t = tl.arange(0, BL)
    A = tl.load(p_A + i_h).to(tl.float64) * LOG2E
    whole = tl.zeros((), tl.float64)
    b_state = tl.zeros([BP, BN], tl.float32)
    for i in tl.range(i_first, i_end, disable_licm=True):
        i_t = i_first + i_end - 1 - i if SINCE else i
        start = tl.cast(i_t * BL, tl.int64)
        m_t = o_t < count - i_t * BL
        p_x_here = p_x + start * ROW_X + (o_t[:, None] * ROW_X + o_p[None, :])
        p_B_here = p_B + start * ROW_B + (o_t[:, None] * ROW_B + o_n[None, :])
        b_x = tl.load(p_x_here, mask=m_t[:, None] & (o_p < P)[None, :], other=0.0)
        b_B = tl.load(p_B_here, mask=m_t[:, None] & (o_n < N)[None, :], other=0.0)
        p_factor_here = p_factor
        if p_factor is not None:
            p_factor_here = p_factor + start * factor_row
        b_dt, _, _ = raw_steps(p_dt + start * dt_row, p_factor_here, p_bias, o_t, m_t, dt_row, factor_row, i_h)
        b_step = final_steps(b_dt, m_t, low, high, SOFTPLUS, LIMIT)
        b_total = tl.cumsum(b_step.to(tl.float64) * A, 0)
        total = last_of(b_total, BL)
        whole += total
        b_until = tl.exp2(b_total.to(tl.float32)) if SINCE else b_step * tl.exp2((total - b_total).to(tl.float32))
        b_state *= tl.exp2(total.to(tl.float32))
        b_state = dot(tl.trans(b_x.to(tl.float32) * b_until[:, None]), b_B, KIND, PRECISION, b_state)
    at = (tl.cast(i_s, tl.int64) * H + i_h) * SC + i_c
    p_state = p_states + at * (P * N) + o_p[:, None] * N + o_n[None, :]
    tl.store(p_state, b_state, mask=(o_p < P)[:, None] & (o_n < N)[None, :])
    tl.store(p_through + at, tl.exp2(whole.to(tl.float32)))


@triton.jit
def carried(p_states, p_through, k, m_k, o_i, m_i, SIZE: tl.constexpr):
    """What segment k alone adds, and its decay."""
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
    CS,
    SC,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    ENDS: tl.constexpr,
    BACK: tl.constexpr,
    BL: tl.constexpr,
    BI: tl.constexpr,
):
    """Replaces what each segment alone adds by what arrives at it, forward or, with BACK, from the end."""
    i_sh = tl.program_id(0)
    _, count, _ = sequence_bounds(p_ends, i_sh // H, length, ENDS)
    used = (count + CS * BL - 1) // (CS * BL)
    o_i = tl.program_id(1) * BI + tl.arange(0, BI)
    m_i = o_i < SIZE
    at = tl.cast(i_sh, tl.int64)
    p_states += at * SC * SIZE
    p_through += at * SC
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
def segment_forward(
    p_x,
    p_dt,
    p_factor,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_ends,
    p_first,
    p_y,
    p_states,
    p_last,
    length,
    chunks,
    CS,
    SC,
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
    TURN: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Results of a segment; the states at its chunks' starts and behind its last place where they are wanted."""
    i_h, i_c, i_s, first, count, written, i_first, i_end = segment_of(p_ends, length, CS, SC, H, ENDS, BL)
    i_g = i_h // SHARES
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS) + i_h * HEAD_X
    p_B += sequence_start(first, i_s, B_batch, ROW_B, ALIGN, ENDS) + i_g * GROUP_B
    p_C += sequence_start(first, i_s, C_batch, ROW_C, ALIGN, ENDS) + i_g * GROUP_C
    p_dt = dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, dt_head, ENDS)
    if p_factor is not None:
        p_factor = dt_start(p_factor, first, i_s, i_h, factor_batch, factor_row, factor_head, ENDS)
    p_y += row_start(first, i_s, length, ENDS) * (H * P) + i_h * P
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    o_state = o_p[:, None] * N + o_n[None, :]
    m_state = m_p[:, None] & m_n[None, :]
    o_t = tl.arange(0, BL)
    A = tl.load(p_A + i_h).to(tl.float64) * LOG2E
    scan = tl.cast(i_s, tl.int64) * H + i_h
    b_state = arriving(p_first, scan * SC + i_c, i_first * BL, count, SC, o_state, m_state, P, N, BP, BN)
    for i_t in tl.range(i_first, i_end, disable_licm=True):
        start = tl.cast(i_t * BL, tl.int64)
        m_t = o_t < count - i_t * BL
        m_tn = m_t[:, None] & m_n[None, :]
        m_tx = m_t[:, None] & m_p[None, :]
        p_B_here = p_B + start * ROW_B + (o_t[:, None] * ROW_B + o_n[None, :])
        b_B = tl.load(p_B_here, mask=m_tn, other=0.0)
        b_C = tl.load(p_C + start * ROW_C + (o_t[:, None] * ROW_C + o_n[None, :]), mask=m_tn, other=0.0)
        p_x_here = p_x + start * ROW_X + (o_t[:, None] * ROW_X + o_p[None, :])
        b_x = tl.load(p_x_here, mask=m_tx, other=0.0)
        p_factor_here = p_factor
        if p_factor is not None:
            p_factor_here = p_factor + start * factor_row
        b_dt, _, _ = raw_steps(p_dt + start * dt_row, p_factor_here, p_bias, o_t, m_t, dt_row, factor_row, i_h)
        b_step = final_steps(b_dt, m_t, low, high, SOFTPLUS, LIMIT)
        b_total = tl.cumsum(b_step.to(tl.float64) * A, 0)
        if p_states is not None:
            tl.store(p_states + (scan * chunks + i_t) * (P * N) + o_state, b_state, mask=m_state)
        b_y = chunk_result(
            b_x,
            b_B,
            b_C,
            b_step,
            b_total,
            b_state,
            p_D,
            i_h,
            o_p,
            m_t,
            True,
            ENDS,
            SKIP_DT,
            D_WIDE,
            TURN,
            P,
            BL,
            BP,
            KIND,
            PRECISION,
        )
        m_y = (o_t < written - i_t * BL)[:, None] & m_p[None, :]
        p_y_here = p_y + start * (H * P) + (o_t[:, None] * (H * P) + o_p[None, :])
        tl.store(p_y_here, b_y.to(p_y.dtype.element_ty), mask=m_y)
        b_B = again(b_B, p_B_here, m_tn, True)
        b_x = again(b_x, p_x_here, m_tx, True)
        total = last_of(b_total, BL)
        b_until = b_step * tl.exp2((total - b_total).to(tl.float32))
        b_state *= tl.exp2(total.to(tl.float32))
        b_state = dot(tl.trans(b_x.to(tl.float32) * b_until[:, None]), b_B, KIND, PRECISION, b_state)
    if p_last is not None:
        tl.store(p_last + scan * (P * N) + o_state, b_state, mask=m_state)


@triton.jit(do_not_specialize=["length", "x_batch", "B_batch", "C_batch", "dt_batch", "factor_batch"])
def segment_backward(
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
    p_last,
    p_grad,
    p_dx,
    p_ddt,
    p_dfactor,
    p_dB,
    p_dC,
    p_first,
    p_sums,
    p_dD,
    length,
    chunks,
    CS,
    SC,
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
    TURN: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a segment, from its end; p_last has what arrives there, p_first receives the initial state's."""
    i_h, i_c, i_s, first, count, written, i_first, i_end = segment_of(p_ends, length, CS, SC, H, ENDS, BL)
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
    if p_factor is not None:
        p_dfactor += row * H + i_h
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    o_state = o_p[:, None] * N + o_n[None, :]
    m_state = m_p[:, None] & m_n[None, :]
    o_t = tl.arange(0, BL)
    A = tl.load(p_A + i_h).to(tl.float32)
    scan = tl.cast(i_s, tl.int64) * H + i_h
    b_dstate = arriving(p_last, scan * SC + i_c, i_first * BL, count, SC, o_state, m_state, P, N, BP, BN)
    b_dA = tl.zeros([BL], tl.float32)
    b_dbias = tl.zeros([BL], tl.float32)
    b_dD = tl.zeros([BP if D_WIDE else BL], tl.float32)
    for i in tl.range(i_first, i_end, disable_licm=True):
        i_t = i_first + i_end - 1 - i
        start = tl.cast(i_t * BL, tl.int64)
        p_C_here = p_C + start * ROW_C
        p_grad_here = p_grad + start * (H * P)
        p_factor_here = p_factor
        p_dfactor_here = p_dfactor
        if p_factor is not None:
            p_factor_here = p_factor + start * factor_row
            p_dfactor_here = p_dfactor + start * H
        b_total, b_more_A, b_more_bias, b_more_D = chunk_gradients(
            p_x + start * ROW_X,
            p_dt + start * dt_row,
            p_factor_here,
            p_B + start * ROW_B,
            p_C_here,
            p_D,
            p_bias,
            p_states + (scan * chunks + i_t) * (P * N),
            b_dstate,
            p_grad_here,
            p_dx + start * ROW_DX,
            p_ddt + start * ROW_DDT,
            p_dfactor_here,
            p_dB + start * ROW_DB,
            p_dC + start * ROW_DC,
            i_h,
            count - i_t * BL,
            written - i_t * BL,
            A,
            low,
            high,
            dt_row,
            factor_row,
            H,
            P,
            N,
            ROW_X,
            ROW_B,
            ROW_C,
            ROW_DX,
            ROW_DDT,
            ROW_DB,
            ROW_DC,
            SOFTPLUS,
            LIMIT,
            SKIP_DT,
            D_WIDE,
            True,
            TURN,
            BL,
            BP,
            BN,
            KIND,
            PRECISION,
        )
        b_dA += b_more_A
        b_dbias += b_more_bias
        b_dD += b_more_D
        m_t = (o_t < count - i_t * BL)[:, None]
        b_dy = tl.load(p_grad_here + (o_t[:, None] * (H * P) + o_p[None, :]), mask=m_t & m_p[None, :], other=0.0)
        b_C = tl.load(p_C_here + (o_t[:, None] * ROW_C + o_n[None, :]), mask=m_t & m_n[None, :], other=0.0)
        b_since = tl.exp2(b_total.to(tl.float32))
        b_dstate *= tl.exp2(last_of(b_total, BL).to(tl.float32))
        b_dstate = dot(tl.trans(b_dy.to(tl.float32) * b_since[:, None]), b_C, KIND, PRECISION, b_dstate)
    if p_first is not None:
        tl.store(p_first + scan * (P * N) + o_state, b_dstate, mask=m_state)
    at = tl.cast(i_s, tl.int64) * SC + i_c
    p_sums += at * (3 * H) + i_h
    store_sum(p_sums, b_dA)
    store_sum(p_sums + H, b_dbias)
    if D_WIDE:
        tl.store(p_dD + (at * H + i_h) * P + o_p, b_dD, mask=m_p)
    else:
        store_sum(p_sums + 2 * H, b_dD)
