# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The block of short sequences with one group a head: one kernel each way, one head of one sequence a program.

Letters: B sequences, L places, E width, H heads, P head dim, N state, C = E + 2HN channels, K taps; BL, BP, BN are the
places of a tile, and P, N rounded up, BC the columns P + 2N of a head rounded up.

Forward, a program convolves its columns, scans and gates; the last head of a sequence to arrive scales what all heads
wrote, which is still in the cache: the order of arrival changes nothing in the sums. Backward everything is computed
again from the projections. A program takes one head of every S-th sequence; convolved columns that are wanted twice,
and their gradients, stand meanwhile where the gradients of the raw columns go, in the cache; at last a walk along the
places replaces them. The gradients of the parameters are kept for each program and added in one ordered sum, so
results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.block.short import row_products, sigmoid
from mmm4rec_kernels.launch import align, kind, precision, processors, tile
from mmm4rec_kernels.ssd.fused import dt_start, final_steps, raw_steps, row_start
from mmm4rec_kernels.sums import sum_rows
from mmm4rec_kernels.tiles import (
    INTERPRETED,
    LENGTHS,
    LOG2E,
    decay_matrix,
    dot,
    sequence_bounds,
    sequence_start,
    step_gradients,
    with_skip,
)

FORWARD_WARPS = 1
BACKWARD_WARPS = 1
"""Warps of a program; twice as many where three TF32 products take the place of one."""
PROGRAMS = 8
"""Programs of the backward kernel for each multiprocessor."""
COLUMNS = 32
"""Columns that a program takes at a time: registers hold a few such pieces, not whole tiles."""


FETCHED = tl.constexpr(64)
"""Bytes that one request brings into the cache."""


@triton.jit
def fetch(p, o_t, count, ROW: tl.constexpr, BW: tl.constexpr):
    """Asks for BW columns of the places of a sequence to be brought into the cache of the whole device."""
    if not INTERPRETED:
        STEP: tl.constexpr = FETCHED * 8 // p.dtype.element_ty.primitive_bitwidth
        o_c = tl.arange(0, (BW + STEP - 1) // STEP) * STEP
        p_at = p + o_t[:, None] * ROW + o_c[None, :]
        b_wanted = (o_t < count).to(tl.int32)[:, None] + o_c[None, :] * 0
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r",
            [p_at.to(tl.int64), b_wanted],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def activated(p_in, p_weight, p_bias, o_t, count, o_c, m_c, ROW: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr):
    """Convolution and SiLU [BL, columns]; what stands behind the sequence's end is of no meaning."""
    b_sum = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(TAPS):
        b_tap = tl.load(p_weight + (TAPS - 1 - back) * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        o_back = o_t - back
        mask = ((o_back >= 0) & (o_t < count))[:, None] & m_c[None, :]
        b_in = tl.load(p_in + o_back[:, None] * ROW + o_c[None, :], mask=mask, other=0.0)
        b_sum += b_in.to(tl.float32) * b_tap[None, :]
    return b_sum * sigmoid(b_sum)


@triton.jit
def block_forward(
    p_z,
    p_x,
    p_c,
    p_dt,
    p_factor,
    p_weight,
    p_bias,
    p_A_log,
    p_D,
    p_dt_bias,
    p_norm,
    p_ends,
    p_out,
    p_scale,
    p_squares,
    p_arrived,
    length,
    eps,
    z_batch,
    x_batch,
    C_batch,
    dt_batch,
    dt_row,
    factor_batch,
    factor_row,
    factor_head,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    ROW_Z: tl.constexpr,
    ROW_X: tl.constexpr,
    ROW_C: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    E: tl.constexpr = H * P
    CHANNELS: tl.constexpr = E + 2 * H * N
    i_h = tl.program_id(0) % H
    i_s = tl.program_id(0) // H
    first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
    at_x = i_h * P
    at_B = E + i_h * N
    at_C = at_B + H * N
    p_z += sequence_start(first, i_s, z_batch, ROW_Z, ALIGN, ENDS) + at_x
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS)
    p_c += sequence_start(first, i_s, C_batch, ROW_C, ALIGN, ENDS) + i_h * N
    p_dt = dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, 1, ENDS)
    if p_factor is not None:
        p_factor = dt_start(p_factor, first, i_s, i_h, factor_batch, factor_row, factor_head, ENDS)
    row = row_start(first, i_s, length, ENDS)
    o_t = tl.arange(0, BL)
    m_t = o_t < count
    m_written = o_t < written
    fetch(p_x + at_x, o_t, count, ROW_X, BP)
    fetch(p_z, o_t, count, ROW_Z, BP)
    b_M = tl.zeros([BL, BL], tl.float32)
    for at in range(0, BN, BC):
        o_c = at + tl.arange(0, BC)
        m_c = o_c < N
        b_B = activated(p_x + at_B, p_weight + at_B, p_bias + at_B, o_t, count, o_c, m_c, ROW_X, CHANNELS, TAPS)
        b_C = activated(p_c, p_weight + at_C, p_bias + at_C, o_t, count, o_c, m_c, ROW_C, CHANNELS, TAPS)
        b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION, b_M)
    b_dt, _, _ = raw_steps(p_dt, p_factor, p_dt_bias, o_t, m_t, dt_row, factor_row, i_h)
    b_step = final_steps(b_dt, m_t, 0.0, 0.0, True, False)
    A = -tl.exp(tl.load(p_A_log + i_h).to(tl.float32))
    b_total = tl.cumsum(b_step.to(tl.float64) * (A.to(tl.float64) * LOG2E), 0)
    D = tl.load(p_D + i_h).to(tl.float32)
    b_M = with_skip(b_M * decay_matrix(b_total, BL), b_step, D, SKIP_DT, BL)
    p_out += row * E
    b_squares = tl.zeros([BL], tl.float32)
    for at in range(0, BP, BC):
        o_c = at + tl.arange(0, BC)
        m_c = o_c < P
        b_x = activated(p_x + at_x, p_weight + at_x, p_bias + at_x, o_t, count, o_c, m_c, ROW_X, CHANNELS, TAPS)
        b_y = dot(b_M, b_x, KIND, PRECISION)
        m_z = m_t[:, None] & m_c[None, :]
        b_z = tl.load(p_z + o_t[:, None] * ROW_Z + o_c[None, :], mask=m_z, other=0.0).to(tl.float32)
        b_g = b_y * (b_z * sigmoid(b_z))
        b_squares += tl.sum(b_g * b_g, 1)
        p_to = p_out + at_x + o_t[:, None] * E + o_c[None, :]
        tl.store(p_to, b_g.to(p_out.dtype.element_ty), mask=m_written[:, None] & m_c[None, :])
    p_squares += row * H
    tl.store(p_squares + o_t * H + i_h, b_squares, mask=m_written)
    tl.debug_barrier()
    if tl.atomic_add(p_arrived + i_s, 1, sem="acq_rel") == H - 1:
        o_h = tl.arange(0, BH)
        m_squares = m_written[:, None] & (o_h < H)[None, :]
        b_parts = tl.load(p_squares + o_t[:, None] * H + o_h[None, :], mask=m_squares, other=0.0)
        b_scale = tl.rsqrt(tl.sum(b_parts, 1) / E + eps)
        tl.store(p_scale + row + o_t, b_scale, mask=m_written)
        o_p = tl.arange(0, BP)
        m_p = o_p < P
        m_out = m_written[:, None] & m_p[None, :]
        o_out = o_t[:, None] * E + o_p[None, :]
        for h in range(H):
            b_norm = tl.load(p_norm + h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
            b_out = tl.load(p_out + h * P + o_out, mask=m_out, other=0.0).to(tl.float32)
            b_out *= b_scale[:, None] * b_norm[None, :]
            if ENDS == LENGTHS:
                b_out = tl.where(m_t[:, None], b_out, 0.0)
            tl.store(p_out + h * P + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def add_to(p, b, mask, more):
    """Adds to what an earlier sequence of this program left, if there was one."""
    tl.store(p, b + tl.load(p, mask=mask & more, other=0.0), mask=mask)


@triton.jit
def add_sum_to(p, b, more):
    """Adds the sum of a vector; it stands as a row for sm_100, see `store_sum`."""
    o = tl.arange(0, 1)
    add_to(p + o, tl.sum(b[None, :], 1), o == 0, more)


@triton.jit
def rows_of(p_raw, p_d, t, o_c, m_c, count, ROW: tl.constexpr, ROW_D: tl.constexpr):
    """Raw columns and gradients of the convolved ones of place t, zero outside the sequence."""
    mask = m_c & (t < count)
    b_raw = tl.load(p_raw + t * ROW + o_c, mask=mask, other=0.0).to(tl.float32)
    return b_raw, tl.load(p_d + t * ROW_D + o_c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def walk_start(
    p_raw,
    p_d,
    p_weight,
    p_bias,
    o_c,
    m_c,
    count,
    ROW: tl.constexpr,
    ROW_D: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
):
    """What a walk carries: taps and bias; first rows; last raw columns and gradients; sums for taps and bias."""
    bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    w_0 = tl.load(p_weight + (TAPS - 1) * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    w_1 = tl.load(p_weight + (TAPS - 2) * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    w_2 = tl.load(p_weight + (TAPS - 3) * C + o_c, mask=m_c & (TAPS > 2), other=0.0).to(tl.float32)
    w_3 = tl.load(p_weight + (TAPS - 4) * C + o_c, mask=m_c & (TAPS > 3), other=0.0).to(tl.float32)
    z = w_0 * 0.0
    taps = (bias, w_0, w_1, w_2, w_3)
    return taps, rows_of(p_raw, p_d, 0, o_c, m_c, count, ROW, ROW_D), (z, z, z), (z, z, z), (z, z, z, z, z)


@triton.jit
def walk_step(p_d, t, o_c, m_c, taps, rows, raws, grads, sums, ROW_D: tl.constexpr, TAPS: tl.constexpr):
    """One place of the convolution's backward: the gradient of the raw columns TAPS - 1 places before."""
    bias, w_0, w_1, w_2, w_3 = taps
    b_0, g_0 = rows
    b_1, b_2, b_3 = raws
    g_1, g_2, g_3 = grads
    s_0, s_1, s_2, s_3, s_bias = sums
    b_y = bias + w_0 * b_0 + w_1 * b_1 + w_2 * b_2 + w_3 * b_3
    b_gate = sigmoid(b_y)
    g_0 *= b_gate * (1.0 + b_y * (1.0 - b_gate))
    if TAPS == 4:
        b_d = w_0 * g_3 + w_1 * g_2 + w_2 * g_1 + w_3 * g_0
    elif TAPS == 3:
        b_d = w_0 * g_2 + w_1 * g_1 + w_2 * g_0
    else:
        b_d = w_0 * g_1 + w_1 * g_0
    t_d = t - (TAPS - 1)
    tl.store(p_d + t_d * ROW_D + o_c, b_d.to(p_d.dtype.element_ty), mask=m_c & (t_d >= 0))
    sums = (s_0 + g_0 * b_0, s_1 + g_0 * b_1, s_2 + g_0 * b_2, s_3 + g_0 * b_3, s_bias + g_0)
    return (b_0, b_1, b_2), (g_0, g_1, g_2), sums


@triton.jit
def walk_end(p_taps_to, p_bias_to, p_d, o_c, m_c, sums, count, written, more, ROW_D: tl.constexpr, TAPS: tl.constexpr):
    """Keeps the sums; zeros behind the sequence's end."""
    s_0, s_1, s_2, s_3, s_bias = sums
    for t in range(count, written):
        tl.store(p_d + t * ROW_D + o_c, (s_0 * 0.0).to(p_d.dtype.element_ty), mask=m_c)
    add_to(p_bias_to + o_c, s_bias, m_c, more)
    p_taps_to += o_c * TAPS
    add_to(p_taps_to + TAPS - 1, s_0, m_c, more)
    add_to(p_taps_to + TAPS - 2, s_1, m_c, more)
    if TAPS > 2:
        add_to(p_taps_to + TAPS - 3, s_2, m_c, more)
    if TAPS > 3:
        add_to(p_taps_to + TAPS - 4, s_3, m_c, more)


@triton.jit
def block_backward(
    p_z,
    p_x,
    p_c,
    p_dt,
    p_factor,
    p_weight,
    p_bias,
    p_A_log,
    p_D,
    p_dt_bias,
    p_norm,
    p_ends,
    p_scale,
    p_products,
    p_grad,
    p_dz,
    p_dx,
    p_dc,
    p_ddt,
    p_dfactor,
    p_sums,
    length,
    sequences,
    z_batch,
    x_batch,
    C_batch,
    dt_batch,
    dt_row,
    factor_batch,
    factor_row,
    factor_head,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    ROW_Z: tl.constexpr,
    ROW_X: tl.constexpr,
    ROW_C: tl.constexpr,
    ROW_DZ: tl.constexpr,
    ROW_DX: tl.constexpr,
    ROW_DC: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    E: tl.constexpr = H * P
    CHANNELS: tl.constexpr = E + 2 * H * N
    i_h = tl.program_id(0) % H
    i_split = tl.program_id(0) // H
    splits = tl.num_programs(0) // H
    at_x = i_h * P
    at_B = E + i_h * N
    at_C = at_B + H * N
    p_sums += i_split.to(tl.int64) * (CHANNELS * (TAPS + 1) + E + 3 * H)
    p_sums_bias = p_sums + CHANNELS * TAPS
    p_sums_norm = p_sums_bias + CHANNELS
    p_sums_heads = p_sums_norm + E + i_h
    o_t = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    for i_s in range(i_split, sequences, splits):
        more = i_s >= splits
        first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
        p_xs = p_x + sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS)
        p_cs = p_c + sequence_start(first, i_s, C_batch, ROW_C, ALIGN, ENDS) + i_h * N
        p_zs = p_z + sequence_start(first, i_s, z_batch, ROW_Z, ALIGN, ENDS) + at_x
        row = row_start(first, i_s, length, ENDS)
        p_dxs = p_dx + row * ROW_DX
        p_dcs = p_dc + row * ROW_DC + i_h * N
        p_dts = dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, 1, ENDS)
        p_factors = p_factor
        if p_factor is not None:
            p_factors = dt_start(p_factor, first, i_s, i_h, factor_batch, factor_row, factor_head, ENDS)
        m_t = o_t < count
        m_written = o_t < written
        # B and C are wanted again: each stands where the other's gradient goes.
        p_dBs = p_dxs + at_B + o_t[:, None] * ROW_DX
        p_dCs = p_dcs + o_t[:, None] * ROW_DC
        b_M = tl.zeros([BL, BL], tl.float32)
        for at in range(0, BN, BC):
            o_c = at + tl.arange(0, BC)
            m_c = o_c < N
            m_tc = m_t[:, None] & m_c[None, :]
            b_B = activated(p_xs + at_B, p_weight + at_B, p_bias + at_B, o_t, count, o_c, m_c, ROW_X, CHANNELS, TAPS)
            tl.store(p_dCs + o_c[None, :], b_B.to(p_dc.dtype.element_ty), mask=m_tc)
            b_C = activated(p_cs, p_weight + at_C, p_bias + at_C, o_t, count, o_c, m_c, ROW_C, CHANNELS, TAPS)
            tl.store(p_dBs + o_c[None, :], b_C.to(p_dx.dtype.element_ty), mask=m_tc)
            b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION, b_M)
        b_dt, b_raw, b_factor = raw_steps(p_dts, p_factors, p_dt_bias, o_t, m_t, dt_row, factor_row, i_h)
        b_step = final_steps(b_dt, m_t, 0.0, 0.0, True, False)
        A = -tl.exp(tl.load(p_A_log + i_h).to(tl.float32))
        b_total = tl.cumsum(b_step.to(tl.float64) * (A.to(tl.float64) * LOG2E), 0)
        b_decay = decay_matrix(b_total, BL)
        b_M *= b_decay
        D = tl.load(p_D + i_h).to(tl.float32)
        b_read = with_skip(b_M, b_step, D, SKIP_DT, BL)
        b_scale = tl.load(p_scale + row + o_t, mask=m_t, other=0.0)[:, None]
        b_mean = tl.load(p_products + row + o_t, mask=m_t, other=0.0)[:, None]
        b_W = tl.zeros([BL, BL], tl.float32)
        for at in range(0, BP, BC):
            o_c = at + tl.arange(0, BC)
            m_c = o_c < P
            m_tc = m_t[:, None] & m_c[None, :]
            b_x = activated(p_xs + at_x, p_weight + at_x, p_bias + at_x, o_t, count, o_c, m_c, ROW_X, CHANNELS, TAPS)
            b_y = dot(b_read, b_x, KIND, PRECISION)
            b_z = tl.load(p_zs + o_t[:, None] * ROW_Z + o_c[None, :], mask=m_tc, other=0.0).to(tl.float32)
            b_gate = sigmoid(b_z)
            b_norm = tl.load(p_norm + at_x + o_c, mask=m_c, other=0.0).to(tl.float32)
            p_grads = p_grad + row * E + at_x + o_t[:, None] * E + o_c[None, :]
            b_dy = tl.load(p_grads, mask=m_tc, other=0.0).to(tl.float32)
            b_normed = b_y * (b_z * b_gate) * b_scale
            add_to(p_sums_norm + at_x + o_c, tl.sum(b_dy * b_normed, 0), m_c, more)
            b_dy = b_scale * (b_dy * b_norm[None, :] - b_normed * b_mean)
            b_dz = b_dy * b_y * (b_gate * (1.0 + b_z * (1.0 - b_gate)))
            p_dzs = p_dz + row * ROW_DZ + at_x + o_t[:, None] * ROW_DZ + o_c[None, :]
            tl.store(p_dzs, b_dz.to(p_dz.dtype.element_ty), mask=m_written[:, None] & m_c[None, :])
            b_dy *= b_z * b_gate
            b_W = dot(b_dy, tl.trans(b_x), KIND, PRECISION, b_W)
            b_dx = dot(tl.trans(b_read), b_dy, KIND, PRECISION)
            p_to = p_dxs + at_x + o_t[:, None] * ROW_DX + o_c[None, :]
            tl.store(p_to, b_dx.to(p_dx.dtype.element_ty), mask=m_tc)
        b_ends, b_dstep, b_dskip = step_gradients(b_W, b_M, b_step, D, SKIP_DT, BL, KIND, PRECISION)
        add_sum_to(p_sums_heads, b_dskip, more)
        b_W *= b_decay * b_step[None, :]
        tl.debug_barrier()
        for at in range(0, BN, BC):
            o_c = at + tl.arange(0, BC)
            m_tc = m_t[:, None] & (o_c < N)[None, :]
            b_C = tl.load(p_dBs + o_c[None, :], mask=m_tc, other=0.0)
            b_B = tl.load(p_dCs + o_c[None, :], mask=m_tc, other=0.0)
            b_dB = dot(tl.trans(b_W), b_C, KIND, PRECISION)
            b_dC = dot(b_W, b_B, KIND, PRECISION)
            tl.debug_barrier()
            tl.store(p_dBs + o_c[None, :], b_dB.to(p_dx.dtype.element_ty), mask=m_tc)
            tl.store(p_dCs + o_c[None, :], b_dC.to(p_dc.dtype.element_ty), mask=m_tc)

        b_da = tl.where(m_t, tl.cumsum(b_ends, 0, reverse=True).to(tl.float32), 0.0)
        add_sum_to(p_sums_heads + H, b_da * b_step * A, more)
        b_ddt = tl.where(m_t, (b_dstep + b_da * A) * sigmoid(b_dt), 0.0)
        add_sum_to(p_sums_heads + 2 * H, b_ddt, more)
        if p_factor is not None:
            p_dfactors = p_dfactor + row * H + i_h + o_t * H
            tl.store(p_dfactors, (b_ddt * b_raw).to(p_dfactor.dtype.element_ty), mask=m_written)
            b_ddt *= b_factor
        tl.store(p_ddt + row * ROW_DX + i_h + o_t * ROW_DX, b_ddt.to(p_ddt.dtype.element_ty), mask=m_written)
        tl.debug_barrier()
        if i_s + splits < sequences:
            first, there, _ = sequence_bounds(p_ends, i_s + splits, length, ENDS)
            p_next = p_x + sequence_start(first, i_s + splits, x_batch, ROW_X, ALIGN, ENDS)
            fetch(p_next + at_B, o_t, there, ROW_X, BN)
            fetch(p_next + at_x, o_t, there, ROW_X, BP)
            p_next = p_c + sequence_start(first, i_s + splits, C_batch, ROW_C, ALIGN, ENDS)
            fetch(p_next + i_h * N, o_t, there, ROW_C, BN)
            p_next = p_z + sequence_start(first, i_s + splits, z_batch, ROW_Z, ALIGN, ENDS)
            fetch(p_next + at_x, o_t, there, ROW_Z, BP)
            p_next = p_grad + row_start(first, i_s + splits, length, ENDS) * E
            fetch(p_next + at_x, o_t, there, E, BP)
        o_p = tl.arange(0, BP)
        o_n = tl.arange(0, BN)
        m_p = o_p < P
        m_n = o_n < N
        p_xh = p_xs + at_x
        p_Bh = p_xs + at_B
        p_dxh = p_dxs + at_x
        p_dBh = p_dxs + at_B
        taps_x, rows_x, raws_x, grads_x, sums_x = walk_start(
            p_xh, p_dxh, p_weight + at_x, p_bias + at_x, o_p, m_p, count, ROW_X, ROW_DX, CHANNELS, TAPS
        )
        taps_B, rows_B, raws_B, grads_B, sums_B = walk_start(
            p_Bh, p_dBh, p_weight + at_B, p_bias + at_B, o_n, m_n, count, ROW_X, ROW_DX, CHANNELS, TAPS
        )
        taps_C, rows_C, raws_C, grads_C, sums_C = walk_start(
            p_cs, p_dcs, p_weight + at_C, p_bias + at_C, o_n, m_n, count, ROW_C, ROW_DC, CHANNELS, TAPS
        )
        for t in tl.range(0, count + TAPS - 1, loop_unroll_factor=3):
            # Ahead of the stores, which would hold them back.
            next_x = rows_of(p_xh, p_dxh, t + 1, o_p, m_p, count, ROW_X, ROW_DX)
            next_B = rows_of(p_Bh, p_dBh, t + 1, o_n, m_n, count, ROW_X, ROW_DX)
            next_C = rows_of(p_cs, p_dcs, t + 1, o_n, m_n, count, ROW_C, ROW_DC)
            raws_x, grads_x, sums_x = walk_step(
                p_dxh, t, o_p, m_p, taps_x, rows_x, raws_x, grads_x, sums_x, ROW_DX, TAPS
            )
            raws_B, grads_B, sums_B = walk_step(
                p_dBh, t, o_n, m_n, taps_B, rows_B, raws_B, grads_B, sums_B, ROW_DX, TAPS
            )
            raws_C, grads_C, sums_C = walk_step(
                p_dcs, t, o_n, m_n, taps_C, rows_C, raws_C, grads_C, sums_C, ROW_DC, TAPS
            )
            rows_x = next_x
            rows_B = next_B
            rows_C = next_C
        walk_end(p_sums + at_x * TAPS, p_sums_bias + at_x, p_dxh, o_p, m_p, sums_x, count, written, more, ROW_DX, TAPS)
        walk_end(p_sums + at_B * TAPS, p_sums_bias + at_B, p_dBh, o_n, m_n, sums_B, count, written, more, ROW_DX, TAPS)
        walk_end(p_sums + at_C * TAPS, p_sums_bias + at_C, p_dcs, o_n, m_n, sums_C, count, written, more, ROW_DC, TAPS)


def _columns(
    projected: torch.Tensor, z: torch.Tensor | None, C: torch.Tensor | None, width: int, states: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views whose columns start with the gate, with x and B, and with C."""
    if z is None or C is None:
        return projected, projected[..., width:], projected[..., 2 * width + states :]
    return z, projected, C


def _products(projected: torch.Tensor) -> int:
    return 2 if projected.dtype == torch.float32 and precision() == "tf32x3" else 1


def _shared(
    gate: torch.Tensor,
    xB: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    heads: int,
    width: int,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    skip_dt: bool,
) -> dict[str, object]:
    """Launch parameters of both kernels."""
    states = (weight.shape[0] - width) // 2
    unit = align(*(t.stride(i) for t in (gate, xB, C) for i in (0, 1)))
    strides = (0, 0, 0) if factor is None else factor.stride()
    return {
        "z_batch": gate.stride(0) // unit,
        "x_batch": xB.stride(0) // unit,
        "C_batch": C.stride(0) // unit,
        "dt_batch": dt.stride(0),
        "dt_row": dt.stride(1),
        "factor_batch": strides[0],
        "factor_row": strides[1],
        "factor_head": strides[2],
        "H": heads,
        "P": width // heads,
        "N": states // heads,
        "TAPS": weight.shape[1],
        "ROW_Z": gate.stride(1),
        "ROW_X": xB.stride(1),
        "ROW_C": C.stride(1),
        "ALIGN": unit,
        "ENDS": 0 if ends is None else 2 if packed else 1,
        "SKIP_DT": skip_dt,
        "BL": tile(longest),
        "BP": tile(width // heads),
        "BN": tile(states // heads),
        "BC": min(COLUMNS, tile(width // heads), tile(states // heads)),
        "KIND": kind(xB.dtype),
        "PRECISION": precision(),
        "num_stages": 1,
    }


def forward(
    projected: torch.Tensor,
    z: torch.Tensor | None,
    C: torch.Tensor | None,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    norm: torch.Tensor,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    eps: float,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised output [B, L, E] and 1/rms [B, L]; arguments as in `fused.forward`."""
    batch, length = projected.shape[:2]
    heads, width = A_log.shape[0], norm.shape[0]
    states = (weight.shape[0] - width) // 2
    sequences = ends.numel() - 1 if packed and ends is not None else batch
    out = projected.new_empty(batch, length, width)
    scale = projected.new_empty(batch, length, dtype=torch.float32)
    if sequences == 0:
        return out, scale
    columns, dt = _columns(projected, z, C, width, states), projected[..., -heads:]
    block_forward[(heads * sequences,)](
        *columns,
        dt,
        factor,
        weight.t().contiguous(),
        bias,
        A_log,
        D,
        dt_bias,
        norm,
        ends,
        out,
        scale,
        projected.new_empty(batch * length, heads, dtype=torch.float32),
        torch.zeros(sequences, dtype=torch.int32, device=projected.device),
        length,
        eps,
        **_shared(*columns, dt, factor, weight, heads, width, ends, packed, longest, skip_dt),
        BH=triton.next_power_of_2(heads),
        num_warps=FORWARD_WARPS * _products(projected),
    )
    return out, scale


def backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    projected: torch.Tensor,
    z: torch.Tensor | None,
    C: torch.Tensor | None,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    norm: torch.Tensor,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients as in `fused.backward`."""
    batch, length = projected.shape[:2]
    rows = batch * length
    heads, width, (channels, taps) = A_log.shape[0], norm.shape[0], weight.shape
    states = (channels - width) // 2
    sequences = ends.numel() - 1 if packed and ends is not None else batch

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=projected.device)

    d_projected, d_z, d_C = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (projected, z, C)
    )
    assert d_projected is not None
    d_factor = new(0) if factor is None else new(batch, length, heads, dtype=factor.dtype)
    splits = max(1, min(sequences, processors(projected) * PROGRAMS // heads))
    sums = (new if sequences else torch.zeros)(splits, channels * (taps + 1) + width + 3 * heads)
    if sequences:
        products, block = new(rows), max(1, 2048 // triton.next_power_of_2(width))
        row_products[(triton.cdiv(rows, block),)](
            grad, out, products, rows, E=width, BR=block, BE=triton.next_power_of_2(width), num_warps=4
        )
        columns, dt = _columns(projected, z, C, width, states), projected[..., -heads:]
        d_gate, d_xB, d_Cs = _columns(d_projected, d_z, d_C, width, states)
        block_backward[(heads * splits,)](
            *columns,
            dt,
            factor,
            weight.t().contiguous(),
            bias,
            A_log,
            D,
            dt_bias,
            norm,
            ends,
            scale,
            products,
            grad,
            d_gate,
            d_xB,
            d_Cs,
            d_projected[..., -heads:],
            d_factor,
            sums,
            length,
            sequences,
            **_shared(*columns, dt, factor, weight, heads, width, ends, packed, longest, skip_dt),
            ROW_DZ=d_gate.stride(1),
            ROW_DX=d_xB.stride(1),
            ROW_DC=d_Cs.stride(1),
            num_warps=BACKWARD_WARPS * _products(projected),
        )
    d_z, d_C = (projected.new_empty(0) if t is None else t for t in (d_z, d_C))
    return d_projected, d_z, d_C, d_factor, sum_rows(sums)
