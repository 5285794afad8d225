# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What a program does for one chunk of the scan, forward and backward, with the state at the chunk's start or without.

Letters as in `fused`. Pointers stand at the chunk's first place, `count` and `written` are counted from there. So
offsets in a tile are known but for the thread, and the compiler adds them to few addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmm4rec_kernels.tiles import (
    LENGTHS,
    LOG2E,
    PACKED,
    decay_matrix,
    dot,
    pinned,
    sigmoid,
    softplus,
    step_gradients,
    with_skip,
)


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


@triton.jit
def chunk_result(
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
    STATEFUL: tl.constexpr,
    ENDS: tl.constexpr,
    SKIP_DT: tl.constexpr,
    D_WIDE: tl.constexpr,
    TURN: tl.constexpr,
    P: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Results [BL, BP] of a chunk; with STATEFUL b_state [BP, BN] arrives at its start."""
    b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION) * decay_matrix(b_total, BL)
    D = 0.0
    if p_D is not None and not D_WIDE:
        D = tl.load(p_D + i_h).to(tl.float32)
    b_M = with_skip(b_M, b_step, D, SKIP_DT, BL)
    if STATEFUL:
        b_since = tl.exp2(b_total.to(tl.float32))
        b_y = dot(b_C, tl.trans(b_state), KIND, PRECISION) * b_since[:, None]
    else:
        b_y = tl.zeros([BL, BP], tl.float32)
    b_y = dot(b_M, turnable(b_x, b_M, TURN), KIND, PRECISION, b_y)
    if D_WIDE:
        b_D = tl.load(p_D + i_h * P + o_p, mask=o_p < P, other=0.0).to(tl.float32)[None, :]
        b_y += b_D * b_x.to(tl.float32) * (b_step[:, None] if SKIP_DT else 1.0)
    if ENDS == LENGTHS:
        b_y = tl.where(m_t[:, None], b_y, 0.0)
    return b_y


@triton.jit
def chunk_gradients(
    p_x,
    p_dt,
    p_factor,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_state,
    b_dstate,
    p_grad,
    p_dx,
    p_ddt,
    p_dfactor,
    p_dB,
    p_dC,
    i_h,
    count,
    written,
    A,
    low,
    high,
    dt_row,
    factor_row,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    ROW_X: tl.constexpr,
    ROW_B: tl.constexpr,
    ROW_C: tl.constexpr,
    ROW_DX: tl.constexpr,
    ROW_DDT: tl.constexpr,
    ROW_DB: tl.constexpr,
    ROW_DC: tl.constexpr,
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
    """Writes a chunk's gradients; running sums of logarithms of decays, and what A, bias and D receive at each place.

    With STATEFUL the state at the chunk's start stands at p_state, and b_dstate is the gradient of that at its end.
    """
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    o_t = tl.arange(0, BL)
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
        b_dskip = tl.sum(b_skipped, 0)
        b_skip = b_dy.to(tl.float32) * b_D
    b_W *= b_decay * b_step[None, :]

    if STATEFUL:
        total = last_of(b_total, BL)
        b_until = tl.exp2((total - b_total).to(tl.float32))
        o_state = o_p[:, None] * N + o_n[None, :]
        m_state = m_p[:, None] & m_n[None, :] & (count > 0)
        b_B = again(b_B, p_B + o_B, m_tn, STATEFUL)
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
        b_dB = dot(b_x, b_dstate, KIND, PRECISION) * b_until[:, None]
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
        b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
        # As a row, see `store_sum`.
        passed = tl.sum(tl.sum(b_dstate * b_state, 1)[None, :], 1) * tl.exp2(total.to(tl.float32))
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
    b_dA = b_da * b_step
    b_dbias = b_dstep
    if p_factor is not None:
        tl.store(p_dfactor + o_t * H, (b_dstep * b_raw).to(p_dfactor.dtype.element_ty), mask=m_written)
        b_dstep *= b_factor
    tl.store(p_ddt + o_t * ROW_DDT, b_dstep.to(p_ddt.dtype.element_ty), mask=m_written)
    return b_total, b_dA, b_dbias, b_dskip
