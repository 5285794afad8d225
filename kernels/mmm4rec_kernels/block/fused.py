"""The block as one Triton kernel each way, for sequences that fit one tile.

Letters: B sequences, L places, E width, H heads, P head dim, G groups, N state, C = E + 2GN channels, K taps; BL, BP, BN are
L, P, N rounded up to what a tile needs.

Forward: a program takes one sequence, goes through the heads, writes the gated output unnormalised while it sums the squares,
and scales what it wrote (still in the cache). Backward: nothing but the projections, the output and 1/rms was saved.
A program takes one head of every S-th sequence and recomputes convolution, gate and scan; gradients of parameters stay in its
registers until its last sequence, and one ordered sum over the programs ends them: no atomics, so results repeat bit for bit.
With fewer groups than heads each head writes its own share of the gradients of B and C, which are then added in order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.launch import align, kind, precision, processors, tile
from mmm4rec_kernels.tiles import (
    LOG2E,
    PACKED,
    decay_gradient,
    decay_matrix,
    dot,
    sequence_bounds,
    sequence_start,
    sigmoid,
    softplus,
)

PROGRAMS = 4
"""Programs of the backward kernel for each multiprocessor."""

FORWARD_LAUNCH: dict[int, dict[str, int]] = {
    16: {"num_warps": 4, "num_stages": 1},
    32: {"num_warps": 4, "num_stages": 1},
    64: {"num_warps": 8, "num_stages": 1},
}
BACKWARD_LAUNCH: dict[int, dict[str, int]] = {
    16: {"num_warps": 4, "num_stages": 1},
    32: {"num_warps": 8, "num_stages": 1},
    64: {"num_warps": 8, "num_stages": 1},
}
"""How each tile length is launched, measured on an H200; one fixed choice, so a first call compiles one kernel."""


@triton.jit
def convolve(p_in, p_weight, p_bias, o_l, o_c, m_c, count, ROW: tl.constexpr, TAPS: tl.constexpr):
    """Convolution and SiLU, [BL, columns]; the pointers stand at the first place and the first column.

    The taps are one more dimension, summed inside a thread. Written as separate loads, Triton would compute all of this
    in the layout of a matrix operand, where every warp repeats the whole tile.
    """
    o_k = tl.arange(0, 4)
    o_from = o_l[None, :] - o_k[:, None]
    m_from = (o_from >= 0) & (o_from < count) & (o_k < TAPS)[:, None]
    b_in = tl.load(
        p_in + o_from[:, :, None] * ROW + o_c[None, None, :], mask=m_from[:, :, None] & m_c[None, None, :], other=0.0
    ).to(tl.float32)
    m_weight = (o_k < TAPS)[:, None] & m_c[None, :]
    b_weight = tl.load(p_weight + (TAPS - 1 - o_k)[:, None] + o_c[None, :] * TAPS, mask=m_weight, other=0.0)
    b_sum = tl.sum(b_in * b_weight.to(tl.float32)[:, None, :], 0)
    b_sum += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_sum * sigmoid(b_sum)


@triton.jit
def block_forward(
    p_z,
    p_x,
    p_c,
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
    length,
    z_batch,
    x_batch,
    c_batch,
    factor_batch,
    factor_row,
    factor_column,
    eps,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    ROW_Z: tl.constexpr,
    ROW_X: tl.constexpr,
    ROW_C: tl.constexpr,
    X_AT: tl.constexpr,
    C_AT: tl.constexpr,
    DT_AT: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    WITH_FACTOR: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    E: tl.constexpr = H * P
    i_s = tl.program_id(0)
    first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
    p_z += sequence_start(first, i_s, z_batch, ROW_Z, ALIGN, ENDS)
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS)
    p_c += sequence_start(first, i_s, c_batch, ROW_C, ALIGN, ENDS)
    if ENDS == PACKED:
        row = first
        factor_at = first * factor_row
    else:
        row = i_s.to(tl.int64) * length
        factor_at = i_s.to(tl.int64) * factor_batch
    p_out += row * E

    o_l = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    m_in = o_l < count
    m_out = (o_l < written)[:, None] & m_p[None, :]
    b_squares = tl.zeros([BL], tl.float32)

    for i_h in range(H):
        at_x = i_h * P
        at_B = E + (i_h // (H // G)) * N
        at_C = at_B + G * N
        b_dt = tl.load(p_x + DT_AT + o_l * ROW_X + i_h, mask=m_in, other=0.0).to(tl.float32)
        if WITH_FACTOR:
            b_dt *= tl.load(p_factor + factor_at + o_l * factor_row + i_h * factor_column, mask=m_in, other=0.0).to(tl.float32)
        b_step = softplus(b_dt + tl.load(p_dt_bias + i_h).to(tl.float32))
        b_step = tl.where(m_in, b_step, 0.0)
        A = -tl.exp(tl.load(p_A_log + i_h).to(tl.float32))
        b_total = tl.cumsum(b_step.to(tl.float64) * (A.to(tl.float64) * LOG2E), 0)

        p_B = p_x + X_AT + at_B
        p_C = p_c + C_AT + (at_B - E)
        b_B = convolve(p_B, p_weight + at_B * TAPS, p_bias + at_B, o_l, o_n, m_n, count, ROW_X, TAPS)
        b_C = convolve(p_C, p_weight + at_C * TAPS, p_bias + at_C, o_l, o_n, m_n, count, ROW_C, TAPS)
        b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION) * decay_matrix(b_total, BL)

        p_xh = p_x + X_AT + at_x
        b_x = convolve(p_xh, p_weight + at_x * TAPS, p_bias + at_x, o_l, o_p, m_p, count, ROW_X, TAPS)
        b_x = tl.where(m_in[:, None], b_x, 0.0)
        b_written = b_x * b_step[:, None]
        D = tl.load(p_D + i_h).to(tl.float32)
        if SKIP_DT:
            b_y = dot(b_M, b_written, KIND, PRECISION) + D * b_written
        else:
            b_y = dot(b_M, b_written, KIND, PRECISION) + D * b_x

        o_z = o_l[:, None] * ROW_Z + o_p[None, :]
        b_z = tl.load((p_z + at_x) + o_z, mask=m_in[:, None] & m_p[None, :], other=0.0)
        b_z = b_z.to(tl.float32)
        b_gated = b_y * (b_z * sigmoid(b_z))
        b_squares += tl.sum(b_gated * b_gated, 1)
        o_out = o_l[:, None] * E + o_p[None, :]
        tl.store((p_out + at_x) + o_out, b_gated.to(p_out.dtype.element_ty), mask=m_out)

    b_scale = 1.0 / tl.sqrt_rn(b_squares / E + eps)
    tl.store(p_scale + row + o_l, b_scale, mask=o_l < written)
    tl.debug_barrier()
    for i_h in range(H):
        p_tile = (p_out + i_h * P) + (o_l[:, None] * E + o_p[None, :])
        b_norm = tl.load(p_norm + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
        b_out = tl.load(p_tile, mask=m_out, other=0.0).to(tl.float32) * b_scale[:, None] * b_norm[None, :]
        tl.store(p_tile, tl.where(m_in[:, None], b_out, 0.0).to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def row_products(p_a, p_b, p_sum, rows, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """Sum of a times b over each row of two contiguous [rows, E] tensors."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_e = tl.arange(0, BE)
    mask = (o_r < rows)[:, None] & (o_e < E)[None, :]
    o_at = o_r.to(tl.int64)[:, None] * E + o_e[None, :]
    b_a = tl.load(p_a + o_at, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + o_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_sum + o_r, tl.sum(b_a * b_b, 1), mask=o_r < rows)


@triton.jit
def fold(b, FOLD: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr):
    """[BL, BC] to [FOLD, BC], sums of every FOLD-th row: with the right FOLD registers of one thread, no exchange."""
    return tl.sum(tl.reshape(b, [BL // FOLD, FOLD, BC]), 0)


@triton.jit
def row_in(p_x, p_c, t, o_c, m_c, is_C, inside, ROW_X: tl.constexpr, ROW_C: tl.constexpr, JOINED: tl.constexpr):
    """Columns of one place, before the convolution; p_x and p_c point at channel 0."""
    if JOINED:
        b_in = tl.load(p_x + t * ROW_X + o_c, mask=m_c & inside, other=0.0).to(tl.float32)
    else:
        b_in = tl.load(p_x + t * ROW_X + o_c, mask=m_c & (is_C == 0) & inside, other=0.0).to(tl.float32)
        b_in += tl.load(p_c + t * ROW_C + o_c, mask=m_c & is_C & inside, other=0.0).to(tl.float32)
    return b_in


@triton.jit
def block_backward(
    p_z,
    p_x,
    p_c,
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
    p_dB,
    p_dC,
    p_dfactor,
    p_sums,
    p_scratch,
    length,
    sequences,
    z_batch,
    x_batch,
    c_batch,
    share,
    factor_batch,
    factor_row,
    factor_column,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    ROW_Z: tl.constexpr,
    ROW_X: tl.constexpr,
    ROW_C: tl.constexpr,
    ROW_DZ: tl.constexpr,
    ROW_DX: tl.constexpr,
    ROW_DB: tl.constexpr,
    ROW_DC: tl.constexpr,
    X_AT: tl.constexpr,
    C_AT: tl.constexpr,
    DT_AT: tl.constexpr,
    DX_AT: tl.constexpr,
    DB_AT: tl.constexpr,
    DC_AT: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    WITH_FACTOR: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    FOLD: tl.constexpr,
    JOINED: tl.constexpr,
    JOINED_OUT: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    E: tl.constexpr = H * P
    C: tl.constexpr = E + 2 * G * N
    SHARES: tl.constexpr = H // G
    i_h = tl.program_id(0)
    i_split = tl.program_id(1)
    i_g = i_h // SHARES
    i_share = i_h % SHARES

    o_l = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    at_x = i_h * P
    at_B = E + i_g * N
    at_C = at_B + G * N
    bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    A = -tl.exp(tl.load(p_A_log + i_h).to(tl.float32))
    D = tl.load(p_D + i_h).to(tl.float32)
    b_norm = tl.load(p_norm + at_x + o_p, mask=m_p, other=0.0).to(tl.float32)

    # One vector over the columns of x, B and C of this head, for the convolution backwards.
    o_r = tl.arange(0, BR)
    is_C = o_r >= P + N
    o_c = tl.where(o_r < P, i_h * P + o_r, E - P + i_g * N + o_r + tl.where(is_C, (G - 1) * N, 0))
    m_c = o_r < P + 2 * N
    o_d = tl.where(o_r < P, o_c, i_g * N + (o_r - P) % N)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_tap_0 = tl.load(p_weight + o_c * TAPS + TAPS - 1, mask=m_c, other=0.0).to(tl.float32)
    b_tap_1 = tl.load(p_weight + o_c * TAPS + TAPS - 2, mask=m_c, other=0.0).to(tl.float32)
    b_tap_2 = tl.load(p_weight + o_c * TAPS + TAPS - 3, mask=m_c & (TAPS > 2), other=0.0).to(tl.float32)
    b_tap_3 = tl.load(p_weight + o_c * TAPS + TAPS - 4, mask=m_c & (TAPS > 3), other=0.0).to(tl.float32)
    tap_sum_0 = tl.zeros([BR], tl.float32)
    tap_sum_1 = tl.zeros([BR], tl.float32)
    tap_sum_2 = tl.zeros([BR], tl.float32)
    tap_sum_3 = tl.zeros([BR], tl.float32)
    tap_bias_sum = tl.zeros([BR], tl.float32)
    p_scratch += (i_split * H + i_h).to(tl.int64) * (BL * BR)

    norm_sum = tl.zeros([FOLD, BP], tl.float32)
    D_sum = tl.zeros([FOLD, BP], tl.float32)
    A_sum = tl.zeros([BL], tl.float32)
    bias_sum = tl.zeros([BL], tl.float32)

    for i_s in range(i_split, sequences, tl.num_programs(1)):
        first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
        z_at = sequence_start(first, i_s, z_batch, ROW_Z, ALIGN, ENDS)
        x_at = sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS)
        c_at = sequence_start(first, i_s, c_batch, ROW_C, ALIGN, ENDS)
        if ENDS == PACKED:
            row = first
            factor_at = first * factor_row
        else:
            row = tl.cast(i_s, tl.int64) * length
            factor_at = tl.cast(i_s, tl.int64) * factor_batch
        m_in = o_l < count
        m_written = o_l < written
        m_x = m_in[:, None] & m_p[None, :]

        b_raw = tl.load((p_x + x_at + DT_AT + i_h) + o_l * ROW_X, mask=m_in, other=0.0).to(tl.float32)
        b_dt = b_raw
        if WITH_FACTOR:
            b_factor = tl.load(p_factor + factor_at + o_l * factor_row + i_h * factor_column, mask=m_in, other=0.0)
            b_factor = b_factor.to(tl.float32)
            b_dt = b_raw * b_factor
        b_dt += bias
        b_step = tl.where(m_in, softplus(b_dt), 0.0)
        b_total = tl.cumsum(b_step.to(tl.float64) * (A.to(tl.float64) * LOG2E), 0)
        b_decay = decay_matrix(b_total, BL)

        p_B = p_x + x_at + X_AT + at_B
        p_C = p_c + c_at + C_AT + (at_B - E)
        b_B = convolve(p_B, p_weight + at_B * TAPS, p_bias + at_B, o_l, o_n, m_n, count, ROW_X, TAPS)
        b_C = convolve(p_C, p_weight + at_C * TAPS, p_bias + at_C, o_l, o_n, m_n, count, ROW_C, TAPS)
        b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION) * b_decay

        p_xh = p_x + x_at + X_AT + at_x
        b_x = convolve(p_xh, p_weight + at_x * TAPS, p_bias + at_x, o_l, o_p, m_p, count, ROW_X, TAPS)
        b_x = tl.where(m_in[:, None], b_x, 0.0)
        b_writes = b_x * b_step[:, None]
        if SKIP_DT:
            b_skipped = b_writes
        else:
            b_skipped = b_x
        b_y = dot(b_M, b_writes, KIND, PRECISION) + D * b_skipped

        b_z = tl.load((p_z + z_at + at_x) + (o_l[:, None] * ROW_Z + o_p[None, :]), mask=m_x, other=0.0).to(tl.float32)
        b_z_gate = sigmoid(b_z)
        b_grad = tl.load((p_grad + row * E + at_x) + (o_l[:, None] * E + o_p[None, :]), mask=m_x, other=0.0).to(tl.float32)
        b_scale = tl.load(p_scale + row + o_l, mask=m_in, other=0.0)
        b_product = tl.load(p_products + row + o_l, mask=m_in, other=0.0) / E
        b_normed = b_y * (b_z * b_z_gate) * b_scale[:, None]
        norm_sum += fold(b_grad * b_normed, FOLD, BL, BP)
        b_dgated = b_scale[:, None] * (b_grad * b_norm[None, :] - b_normed * b_product[:, None])
        b_dy = b_dgated * (b_z * b_z_gate)
        b_dz = b_dgated * b_y * (b_z_gate * (1.0 + b_z * (1.0 - b_z_gate)))
        tl.store(
            (p_dz + row * ROW_DZ + at_x) + (o_l[:, None] * ROW_DZ + o_p[None, :]),
            b_dz.to(p_dz.dtype.element_ty),
            mask=m_written[:, None] & m_p[None, :],
        )
        D_sum += fold(b_dy * b_skipped, FOLD, BL, BP)

        b_W = dot(b_dy, tl.trans(b_writes), KIND, PRECISION)
        b_ends = decay_gradient(b_W * b_M)
        b_da = (tl.sum(b_ends, 0) - tl.cumsum(b_ends, 0) + b_ends).to(tl.float32)
        b_dscores = b_W * b_decay
        b_dC = dot(b_dscores, b_B, KIND, PRECISION) 
        b_dB = dot(tl.trans(b_dscores), b_C, KIND, PRECISION) 
        b_dwrites = dot(tl.trans(b_M), b_dy, KIND, PRECISION)
        if SKIP_DT:
            b_dwrites += D * b_dy
            b_dx = b_dwrites * b_step[:, None]
        else:
            b_dx = b_dwrites * b_step[:, None] + D * b_dy
        b_dstep = tl.sum(b_dwrites * b_x, 1) + b_da * A
        A_sum += b_da * b_step
        b_ddt = tl.where(m_in, b_dstep * sigmoid(b_dt), 0.0)
        bias_sum += b_ddt
        if WITH_FACTOR:
            tl.store(p_dfactor + row * H + o_l * H + i_h, (b_ddt * b_raw).to(p_dfactor.dtype.element_ty), mask=m_written)
            b_ddt *= b_factor
        tl.store(
            (p_dx + row * ROW_DX + DT_AT + i_h) + o_l * ROW_DX, b_ddt.to(p_dx.dtype.element_ty), mask=m_written
        )

        # Hand the gradients of x, B and C over from tiles to rows: what follows runs along the places.
        p_tile = p_scratch + o_l[:, None] * BR
        tl.store(p_tile + o_p[None, :], b_dx, mask=m_x)
        tl.store(p_tile + P + o_n[None, :], b_dB, mask=m_in[:, None] & m_n[None, :])
        tl.store(p_tile + P + N + o_n[None, :], b_dC, mask=m_in[:, None] & m_n[None, :])
        tl.debug_barrier()

        p_x_row = p_x + x_at + X_AT
        p_c_row = p_c + c_at + C_AT - (E + G * N)
        p_dx_row = p_dx + row * ROW_DX + DX_AT
        p_dB_row = p_dB + i_share.to(tl.int64) * share + row * ROW_DB + DB_AT
        p_dC_row = p_dC + i_share.to(tl.int64) * share + row * ROW_DC + DC_AT
        b_in_1 = tl.zeros([BR], tl.float32)
        b_in_2 = tl.zeros([BR], tl.float32)
        b_in_3 = tl.zeros([BR], tl.float32)
        b_pre_1 = tl.zeros([BR], tl.float32)
        b_pre_2 = tl.zeros([BR], tl.float32)
        b_pre_3 = tl.zeros([BR], tl.float32)
        for t in tl.range(0, count + TAPS - 1, loop_unroll_factor=4):
            b_in_0 = row_in(p_x_row, p_c_row, t, o_c, m_c, is_C, t < count, ROW_X, ROW_C, JOINED)
            b_pre_0 = tl.load(p_scratch + t * BR + o_r, mask=m_c & (t < count), other=0.0)
            b_sum = b_bias + b_tap_0 * b_in_0 + b_tap_1 * b_in_1 + b_tap_2 * b_in_2 + b_tap_3 * b_in_3
            b_gate = sigmoid(b_sum)
            b_pre_0 *= b_gate * (1.0 + b_sum * (1.0 - b_gate))
            tap_bias_sum += b_pre_0
            tap_sum_0 += b_pre_0 * b_in_0
            tap_sum_1 += b_pre_0 * b_in_1
            tap_sum_2 += b_pre_0 * b_in_2
            tap_sum_3 += b_pre_0 * b_in_3
            if TAPS == 4:
                b_d = b_tap_0 * b_pre_3 + b_tap_1 * b_pre_2 + b_tap_2 * b_pre_1 + b_tap_3 * b_pre_0
            elif TAPS == 3:
                b_d = b_tap_0 * b_pre_2 + b_tap_1 * b_pre_1 + b_tap_2 * b_pre_0
            else:
                b_d = b_tap_0 * b_pre_1 + b_tap_1 * b_pre_0
            t_d = t - (TAPS - 1)
            if JOINED_OUT:
                tl.store(p_dx_row + t_d * ROW_DX + o_c, b_d.to(p_dx.dtype.element_ty), mask=m_c & (t_d >= 0))
            else:
                m_x_row = (o_r < P) & (t_d >= 0)
                m_B_row = (o_r >= P) & (o_r < P + N) & (t_d >= 0)
                m_C_row = is_C & m_c & (t_d >= 0)
                tl.store(p_dx_row + t_d * ROW_DX + o_d, b_d.to(p_dx.dtype.element_ty), mask=m_x_row)
                tl.store(p_dB_row + t_d * ROW_DB + o_d, b_d.to(p_dB.dtype.element_ty), mask=m_B_row)
                tl.store(p_dC_row + t_d * ROW_DC + o_d, b_d.to(p_dC.dtype.element_ty), mask=m_C_row)
            b_in_3 = b_in_2
            b_in_2 = b_in_1
            b_in_1 = b_in_0
            b_pre_3 = b_pre_2
            b_pre_2 = b_pre_1
            b_pre_1 = b_pre_0
        b_zero = tl.zeros([BR], tl.float32)
        for t in range(count, written):
            tl.store(p_dx_row + t * ROW_DX + o_d, b_zero.to(p_dx.dtype.element_ty), mask=o_r < P)
            tl.store(p_dB_row + t * ROW_DB + o_d, b_zero.to(p_dB.dtype.element_ty), mask=(o_r >= P) & (o_r < P + N))
            tl.store(p_dC_row + t * ROW_DC + o_d, b_zero.to(p_dC.dtype.element_ty), mask=is_C & m_c)
        tl.debug_barrier()

    p_sums += (i_split * SHARES + i_share).to(tl.int64) * (C * (TAPS + 1) + E + 3 * H)
    tl.store(p_sums + o_c * TAPS + TAPS - 1, tap_sum_0, mask=m_c)
    tl.store(p_sums + o_c * TAPS + TAPS - 2, tap_sum_1, mask=m_c)
    if TAPS > 2:
        tl.store(p_sums + o_c * TAPS + TAPS - 3, tap_sum_2, mask=m_c)
    if TAPS > 3:
        tl.store(p_sums + o_c * TAPS + TAPS - 4, tap_sum_3, mask=m_c)
    tl.store(p_sums + C * TAPS + o_c, tap_bias_sum, mask=m_c)
    p_rest = p_sums + C * (TAPS + 1)
    tl.store(p_rest + at_x + o_p, tl.sum(norm_sum, 0), mask=m_p)
    tl.store(p_rest + E + i_h, tl.sum(A_sum) * A)
    tl.store(p_rest + E + H + i_h, tl.sum(tl.sum(D_sum, 0), 0))
    tl.store(p_rest + E + 2 * H + i_h, tl.sum(bias_sum))


def _layout(projected: torch.Tensor, width: int, states: int, crossing: bool) -> dict[str, int]:
    """Columns of x, C and dt inside their tensors."""
    if crossing:
        return {"X_AT": 0, "C_AT": 0, "DT_AT": width + states}
    return {"X_AT": width, "C_AT": 2 * width + states, "DT_AT": 2 * (width + states)}


def _sequence_count(projected: torch.Tensor, ends: torch.Tensor | None, packed: bool) -> int:
    return ends.numel() - 1 if packed and ends is not None else projected.shape[0]


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
    groups: int,
    eps: float,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised output [B, L, E] and 1/rms [B, L]; `ends` are lengths, or offsets if `packed`."""
    batch, length = projected.shape[:2]
    heads, width = A_log.shape[0], norm.shape[0]
    states = (weight.shape[0] - width) // 2
    z_in, c_in = projected if z is None else z, projected if C is None else C
    unit = align(*(t.stride(i) for t in (projected, z_in, c_in) for i in (0, 1)))
    out = projected.new_empty(batch, length, width)
    scale = projected.new_empty(batch, length, dtype=torch.float32)
    sequences = _sequence_count(projected, ends, packed)
    if sequences == 0:
        return out, scale
    BL, BP, BN = tile(longest), tile(width // heads), tile(states // groups)
    block_forward[(sequences,)](
        z_in,
        projected,
        c_in,
        factor,
        weight,
        bias,
        A_log,
        D,
        dt_bias,
        norm,
        ends,
        out,
        scale,
        length,
        z_in.stride(0) // unit,
        projected.stride(0) // unit,
        c_in.stride(0) // unit,
        *((0, 0, 0) if factor is None else factor.stride()),
        eps,
        H=heads,
        P=width // heads,
        N=states // groups,
        G=groups,
        TAPS=weight.shape[1],
        ROW_Z=z_in.stride(1),
        ROW_X=projected.stride(1),
        ROW_C=c_in.stride(1),
        **_layout(projected, width, states, z is not None),
        ALIGN=unit,
        ENDS=0 if ends is None else 2 if packed else 1,
        WITH_FACTOR=factor is not None,
        SKIP_DT=skip_dt,
        BL=BL,
        BP=BP,
        BN=BN,
        KIND=kind(projected.dtype),
        PRECISION=precision(),
        **FORWARD_LAUNCH[BL],
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
    groups: int,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of projected, z, C, factor (empty where absent) and, one behind the other, of the parameters.

    The parameters' order is taps [C, K], bias [C], norm [E], A_log [H], D [H], dt_bias [H], all float32.
    """
    batch, length = projected.shape[:2]
    heads, width, (channels, taps) = A_log.shape[0], norm.shape[0], weight.shape
    states = (channels - width) // 2
    shares = heads // groups
    z_in, c_in = projected if z is None else z, projected if C is None else C
    unit = align(*(t.stride(i) for t in (projected, z_in, c_in) for i in (0, 1)))
    grad = grad.contiguous()
    d_projected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    d_z = d_projected if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    d_C = d_projected if C is None else torch.empty_like(C, memory_format=torch.contiguous_format)
    d_factor = projected.new_empty((0,) if factor is None else (batch, length, heads))
    if factor is not None:
        d_factor = d_factor.to(factor.dtype)
    layout = _layout(projected, width, states, z is not None)
    if shares == 1:
        B_target, B_at, C_target, C_at, share = d_projected, layout["X_AT"] + width, d_C, layout["C_AT"], 0
    else:
        partial = projected.new_empty(2, shares, batch, length, states, dtype=torch.float32)
        B_target, B_at, C_target, C_at, share = partial[0], 0, partial[1], 0, batch * length * states
    sequences = _sequence_count(projected, ends, packed)
    BL, BP, BN = tile(longest), tile(width // heads), tile(states // groups)
    splits = max(1, min(sequences, math.ceil(processors(projected) * PROGRAMS / heads)))
    size = channels * (taps + 1) + width + 3 * heads
    sums = (torch.zeros if shares > 1 or sequences == 0 else torch.empty)(
        splits * shares, size, dtype=torch.float32, device=projected.device
    )
    BR = triton.next_power_of_2(width // heads + 2 * (states // groups))
    scratch = torch.empty(splits * heads * BL * BR, dtype=torch.float32, device=projected.device)
    rows = batch * length
    products = torch.empty_like(scale)
    if sequences:
        row_block = max(1, min(8, 4096 // triton.next_power_of_2(width)))
        row_products[(triton.cdiv(rows, row_block),)](
            grad, out, products, rows, E=width, BR=row_block, BE=triton.next_power_of_2(width), num_warps=4
        )
        block_backward[(heads, splits)](
            z_in,
            projected,
            c_in,
            factor,
            weight,
            bias,
            A_log,
            D,
            dt_bias,
            norm,
            ends,
            scale,
            products,
            grad,
            d_z,
            d_projected,
            B_target,
            C_target,
            d_factor,
            sums,
            scratch,
            length,
            sequences,
            z_in.stride(0) // unit,
            projected.stride(0) // unit,
            c_in.stride(0) // unit,
            share,
            *((0, 0, 0) if factor is None else factor.stride()),
            H=heads,
            P=width // heads,
            N=states // groups,
            G=groups,
            TAPS=taps,
            ROW_Z=z_in.stride(1),
            ROW_X=projected.stride(1),
            ROW_C=c_in.stride(1),
            ROW_DZ=d_z.shape[-1],
            ROW_DX=d_projected.shape[-1],
            ROW_DB=B_target.shape[-1],
            ROW_DC=C_target.shape[-1],
            **layout,
            DX_AT=layout["X_AT"],
            DB_AT=B_at,
            DC_AT=C_at,
            ALIGN=unit,
            ENDS=0 if ends is None else 2 if packed else 1,
            WITH_FACTOR=factor is not None,
            SKIP_DT=skip_dt,
            BL=BL,
            BP=BP,
            BN=BN,
            BR=BR,
            FOLD=min(BL, 8),
            JOINED=C is None,
            JOINED_OUT=C is None and shares == 1,
            KIND=kind(projected.dtype),
            PRECISION=precision(),
            **BACKWARD_LAUNCH[BL],
        )
    if shares > 1:
        at = layout["X_AT"] + width
        d_projected[..., at : at + states] = partial[0].sum(0)
        d_C[..., layout["C_AT"] : layout["C_AT"] + states] = partial[1].sum(0)
    empty = projected.new_empty(0)
    return (
        d_projected,
        empty if z is None else d_z,
        projected.new_empty(0) if C is None else d_C,
        d_factor,
        sums.sum(0),
    )
