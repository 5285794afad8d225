# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The block's scan at the last places of each sequence, before gate and norm, one Triton kernel a direction.

Letters: S rows of all sequences, B sequences that are read, J read places, K taps, M = J + K - 1 places that the
convolution of C reaches, H heads, P head dim, N state, C = E + 2HN channels; BS sequences of a program, BP, BN, BJ,
BL are P, N, J, L rounded up.

A program takes one head of BS neighbouring sequences and walks along their places side by side, with the last three of
the raw columns in registers, so that every column is read once. So few places are read that the products with B and
with dy are sums over a row, and no state is formed: forward keeps the J results, each of which decays from place to
place. Backward recomputes all but the inputs; the gradient of the convolved columns stays in registers until the
gradient of the raw ones three places behind is complete, and each is written once. A program of backward goes through
many sequences and keeps the sums of the parameters' gradients: results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.launch import processors, tile
from mmm4rec_kernels.sums import summed
from mmm4rec_kernels.tiles import LOG2E, exp2, sigmoid, softplus

FORWARD: dict[str, int] = {"num_warps": 1, "BS": 1}
BACKWARD: dict[int, dict[str, int]] = {
    1: {"programs": 12, "num_warps": 1, "BS": 1, "maxnreg": 168},
    8: {"programs": 8, "num_warps": 1, "BS": 1},
}
"""Options of a launch, backward by the most read places; programs of all heads together, for each multiprocessor."""


@triton.jit
def spans(p_ends, p_lengths, o_s, sequences, length, PACKED: tl.constexpr):
    """First row of each sequence, its places, the rows that its gradients are written to."""
    m_s = o_s < sequences
    if PACKED:
        first = tl.load(p_ends + o_s, mask=m_s, other=0).to(tl.int64)
        count = (tl.load(p_ends + o_s + 1, mask=m_s, other=0).to(tl.int64) - first).to(tl.int32)
        return first, count, count
    else:
        count = tl.load(p_lengths + o_s, mask=m_s, other=0).to(tl.int32)
        return o_s.to(tl.int64) * length, count, tl.where(m_s, length, 0)


@triton.jit
def vector(p, o_c, m_c):
    """A vector of columns [1, columns], zero where there is none."""
    b = tl.zeros([o_c.shape[0]], tl.float32)
    if p is not None:
        b = tl.load(p + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b[None, :]


@triton.jit
def tap(p_weight, o_c, m_c, BACK: tl.constexpr, TAPS: tl.constexpr):
    """The tap [1, columns] for the place BACK places before the present one; zero behind the last tap."""
    m_tap = m_c & (BACK < TAPS)
    return tl.load(p_weight + o_c * TAPS + (TAPS - 1 - BACK), mask=m_tap, other=0.0).to(tl.float32)[None, :]


@triton.jit
def taps_of(p_weight, o_c, m_c, TAPS: tl.constexpr):
    """The taps for the present place and for one, two and three places before it."""
    now, one = tap(p_weight, o_c, m_c, 0, TAPS), tap(p_weight, o_c, m_c, 1, TAPS)
    return now, one, tap(p_weight, o_c, m_c, 2, TAPS), tap(p_weight, o_c, m_c, 3, TAPS)


@triton.jit
def raw(p_in, first, t, count, b_shift, o_c, m_c, ROW: tl.constexpr):
    """Raw columns [BS, columns] of place t of each sequence, zero behind its end."""
    m_in = (t < count)[:, None] & m_c[None, :]
    b_in = tl.load(p_in + (first + t)[:, None] * ROW + o_c[None, :], mask=m_in, other=0.0).to(tl.float32)
    return tl.where(m_in, b_in + b_shift, 0.0)


@triton.jit
def step_at(p_dt, p_factor, first, o_s, t, m_in, shift, dt_bias, factor_batch, factor_row, ROW: tl.constexpr):
    """Step sizes [BS] at place t, zero outside."""
    b_dt = tl.load(p_dt + (first + t) * ROW, mask=m_in, other=0.0).to(tl.float32) + shift
    if p_factor is not None:
        p_from = p_factor + o_s.to(tl.int64) * factor_batch + t * factor_row
        b_dt *= tl.load(p_from, mask=m_in, other=0.0).to(tl.float32)
    return tl.where(m_in, softplus(b_dt + dt_bias), 0.0)


@triton.jit
def all_steps(p_dt, p_factor, first, o_s, o_l, m_in, shift, dt_bias, factor_batch, factor_row, ROW: tl.constexpr):
    """Raw dt, factor, and what softplus is taken of [BS, BL]."""
    b_raw = tl.load(p_dt + (first[:, None] + o_l[None, :]) * ROW, mask=m_in, other=0.0).to(tl.float32) + shift
    b_factor = tl.full(b_raw.shape, 1.0, tl.float32)
    if p_factor is not None:
        p_from = p_factor + o_s.to(tl.int64)[:, None] * factor_batch + o_l[None, :] * factor_row
        b_factor = tl.load(p_from, mask=m_in, other=0.0).to(tl.float32)
    return b_raw, b_factor, b_raw * b_factor + dt_bias


@triton.jit
def reads(
    p_C, p_weight, p_bias, o_s, o_j, count, m_s, o_n, m_n, J: tl.constexpr, TAPS: tl.constexpr, ROW: tl.constexpr
):
    """The convolved C before SiLU [BJ, BS, N]; what lies before the start of a sequence counts as zero."""
    b_u = tl.zeros([o_j.shape[0], o_s.shape[0], o_n.shape[0]], tl.float32)
    b_u += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, None, :]
    o_row = o_s.to(tl.int64)[None, :] * (J + TAPS - 1) + o_j[:, None]
    for k in tl.static_range(TAPS):
        m_k = m_s[None, :] & (o_j < J)[:, None] & (count[None, :] - J - (TAPS - 1) + k + o_j[:, None] >= 0)
        mask = m_k[:, :, None] & m_n[None, None, :]
        b_C = tl.load(p_C + (o_row + k)[:, :, None] * ROW + o_n[None, None, :], mask=mask, other=0.0).to(tl.float32)
        b_u += b_C * tl.load(p_weight + o_n * TAPS + k, mask=m_n, other=0.0).to(tl.float32)[None, None, :]
    return b_u


@triton.jit(do_not_specialize=["users", "length", "factor_batch"])
def tail_forward(
    p_x,
    p_shift,
    p_C,
    p_factor,
    p_weight,
    p_bias,
    p_A_log,
    p_D,
    p_dt_bias,
    p_ends,
    p_lengths,
    p_y,
    users,
    length,
    factor_batch,
    factor_row,
    factor_head,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    J: tl.constexpr,
    TAPS: tl.constexpr,
    ROW: tl.constexpr,
    ROW_C: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    E: tl.constexpr = H * P
    i_h = tl.program_id(0)
    o_s = tl.program_id(1) * BS + tl.arange(0, BS)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    o_j = tl.arange(0, BJ)
    m_s = o_s < users
    m_p = o_p < P
    m_n = o_n < N
    first, count, _ = spans(p_ends, p_lengths, o_s, users, length, PACKED)
    at_x = i_h * P
    at_B = E + i_h * N
    at_C = at_B + H * N
    p_dt = p_x + E + H * N + i_h
    shift = 0.0
    p_shift_x = p_shift
    p_shift_B = p_shift
    if p_shift is not None:
        shift = tl.load(p_shift + E + H * N + i_h).to(tl.float32)
        p_shift_x = p_shift + at_x
        p_shift_B = p_shift + at_B
    p_f = p_factor
    if p_factor is not None:
        p_f = p_factor + i_h * factor_head
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    A = -tl.exp(tl.load(p_A_log + i_h).to(tl.float32)) * LOG2E
    D = tl.load(p_D + i_h).to(tl.float32)
    b_C = reads(p_C + i_h * N, p_weight + at_C * TAPS, p_bias + at_C, o_s, o_j, count, m_s, o_n, m_n, J, TAPS, ROW_C)
    b_C *= sigmoid(b_C)
    b_shift_x = vector(p_shift_x, o_p, m_p)
    b_shift_B = vector(p_shift_B, o_n, m_n)
    x_0, x_1, x_2, x_3 = taps_of(p_weight + at_x * TAPS, o_p, m_p, TAPS)
    B_0, B_1, B_2, B_3 = taps_of(p_weight + at_B * TAPS, o_n, m_n, TAPS)
    b_bias_x = vector(p_bias + at_x, o_p, m_p)
    b_bias_B = vector(p_bias + at_B, o_n, m_n)
    place = count[None, :] - J + o_j[:, None]
    b_y = tl.zeros([BJ, BS, BP], tl.float32)
    b_x1 = tl.zeros([BS, BP], tl.float32)
    b_x2 = tl.zeros([BS, BP], tl.float32)
    b_x3 = tl.zeros([BS, BP], tl.float32)
    b_B1 = tl.zeros([BS, BN], tl.float32)
    b_B2 = tl.zeros([BS, BN], tl.float32)
    b_B3 = tl.zeros([BS, BN], tl.float32)
    b_next_x = raw(p_x + at_x, first, 0, count, b_shift_x, o_p, m_p, ROW)
    b_next_B = raw(p_x + at_B, first, 0, count, b_shift_B, o_n, m_n, ROW)
    for t in range(tl.max(count, 0)):
        b_x0 = b_next_x
        b_B0 = b_next_B
        b_next_x = raw(p_x + at_x, first, t + 1, count, b_shift_x, o_p, m_p, ROW)
        b_next_B = raw(p_x + at_B, first, t + 1, count, b_shift_B, o_n, m_n, ROW)
        b_step = step_at(p_dt, p_f, first, o_s, t, t < count, shift, dt_bias, factor_batch, factor_row, ROW)
        b_u = b_bias_B + B_0 * b_B0 + B_1 * b_B1 + B_2 * b_B2 + B_3 * b_B3
        b_B = b_u * sigmoid(b_u)
        b_u = b_bias_x + x_0 * b_x0 + x_1 * b_x1 + x_2 * b_x2 + x_3 * b_x3
        b_x = b_u * sigmoid(b_u)
        b_m = tl.sum(b_C * b_B[None, :, :], 2) * b_step[None, :]
        b_skip = tl.where(place == t, D, 0.0)
        if SKIP_DT:
            b_skip *= b_step[None, :]
        b_m = tl.where(place >= t, b_m + b_skip, 0.0)
        b_decay = tl.where(place >= t, exp2(b_step * A)[None, :], 1.0)
        b_y = b_y * b_decay[:, :, None] + b_m[:, :, None] * b_x[None, :, :]
        b_x3, b_x2, b_x1 = b_x2, b_x1, b_x0
        b_B3, b_B2, b_B1 = b_B2, b_B1, b_B0
    o_y = (o_s.to(tl.int64)[None, :] * J + o_j[:, None])[:, :, None] * E + at_x + o_p[None, None, :]
    mask = (m_s[None, :] & (o_j < J)[:, None])[:, :, None] & m_p[None, None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def slope(b_u):
    """Derivative of SiLU."""
    b_sigmoid = sigmoid(b_u)
    return b_sigmoid * (1.0 + b_u * (1.0 - b_sigmoid))


@triton.jit
def store_raw(p_out, first, t, rows, b_d, o_c, m_c, WIDE: tl.constexpr):
    """Gradients of the raw columns [BS, columns] of place t."""
    m_out = ((t >= 0) & (t < rows))[:, None] & m_c[None, :]
    p_to = p_out + (first + t)[:, None] * WIDE + o_c[None, :]
    tl.store(p_to, b_d.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def store_taps(p_sums, b_0, b_1, b_2, b_3, b_bias, at, o_c, m_c, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """Sums over the sequences of the gradients of the taps, the present place's first, and of the bias."""
    p_to = p_sums + (at + o_c) * TAPS + (TAPS - 1)
    tl.store(p_to, tl.sum(b_0, 0), mask=m_c)
    tl.store(p_to - 1, tl.sum(b_1, 0), mask=m_c)
    if TAPS > 2:
        tl.store(p_to - 2, tl.sum(b_2, 0), mask=m_c)
    if TAPS > 3:
        tl.store(p_to - 3, tl.sum(b_3, 0), mask=m_c)
    tl.store(p_sums + CHANNELS * TAPS + at + o_c, tl.sum(b_bias, 0), mask=m_c)


@triton.jit(do_not_specialize=["sequences", "users", "length", "factor_batch", "factor_places"])
def tail_backward(
    p_dy,
    p_x,
    p_shift,
    p_C,
    p_factor,
    p_weight,
    p_bias,
    p_A_log,
    p_D,
    p_dt_bias,
    p_ends,
    p_lengths,
    p_dx,
    p_dC,
    p_dfactor,
    p_sums,
    sequences,
    users,
    length,
    factor_batch,
    factor_row,
    factor_head,
    factor_places,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    J: tl.constexpr,
    TAPS: tl.constexpr,
    ROW: tl.constexpr,
    ROW_C: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
    BL: tl.constexpr,
):
    E: tl.constexpr = H * P
    CHANNELS: tl.constexpr = E + 2 * H * N
    WIDE: tl.constexpr = E + H * N + H
    M: tl.constexpr = J + TAPS - 1
    i_h = tl.program_id(0)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    o_j = tl.arange(0, BJ)
    o_l = tl.arange(0, BL)
    m_p = o_p < P
    m_n = o_n < N
    at_x = i_h * P
    at_B = E + i_h * N
    at_C = at_B + H * N
    at_dt = E + H * N + i_h
    p_sums += tl.program_id(1).to(tl.int64) * (CHANNELS * (TAPS + 1) + 3 * H + WIDE)
    shift = 0.0
    p_shift_x = p_shift
    p_shift_B = p_shift
    if p_shift is not None:
        shift = tl.load(p_shift + at_dt).to(tl.float32)
        p_shift_x = p_shift + at_x
        p_shift_B = p_shift + at_B
    p_f = p_factor
    if p_factor is not None:
        p_f = p_factor + i_h * factor_head
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    A = -tl.exp(tl.load(p_A_log + i_h).to(tl.float32))
    wide_A = A.to(tl.float64) * LOG2E
    D = tl.load(p_D + i_h).to(tl.float32)
    b_shift_x = vector(p_shift_x, o_p, m_p)
    b_shift_B = vector(p_shift_B, o_n, m_n)
    x_0, x_1, x_2, x_3 = taps_of(p_weight + at_x * TAPS, o_p, m_p, TAPS)
    B_0, B_1, B_2, B_3 = taps_of(p_weight + at_B * TAPS, o_n, m_n, TAPS)
    b_bias_x = vector(p_bias + at_x, o_p, m_p)
    b_bias_B = vector(p_bias + at_B, o_n, m_n)
    b_tx0 = tl.zeros([BS, BP], tl.float32)
    b_tx1 = tl.zeros([BS, BP], tl.float32)
    b_tx2 = tl.zeros([BS, BP], tl.float32)
    b_tx3 = tl.zeros([BS, BP], tl.float32)
    b_tB0 = tl.zeros([BS, BN], tl.float32)
    b_tB1 = tl.zeros([BS, BN], tl.float32)
    b_tB2 = tl.zeros([BS, BN], tl.float32)
    b_tB3 = tl.zeros([BS, BN], tl.float32)
    b_dbias_x = tl.zeros([BS, BP], tl.float32)
    b_dbias_B = tl.zeros([BS, BN], tl.float32)
    b_sum_x = tl.zeros([BS, BP], tl.float32)
    b_sum_B = tl.zeros([BS, BN], tl.float32)
    b_tC0 = tl.zeros([BS, BN], tl.float32)
    b_tC1 = tl.zeros([BS, BN], tl.float32)
    b_tC2 = tl.zeros([BS, BN], tl.float32)
    b_tC3 = tl.zeros([BS, BN], tl.float32)
    b_dbias_C = tl.zeros([BS, BN], tl.float32)
    b_sum_dt = tl.zeros([BS, BL], tl.float32)
    b_dD = tl.zeros([BS], tl.float32)
    b_dA = tl.zeros([BS, BL], tl.float32)
    b_ddt_bias = tl.zeros([BS, BL], tl.float32)
    for i in range(tl.program_id(1) * BS, sequences, tl.num_programs(1) * BS):
        o_s = i + tl.arange(0, BS)
        m_s = o_s < users
        first, count, rows = spans(p_ends, p_lengths, o_s, sequences, length, PACKED)
        place = count[None, :] - J + o_j[:, None]
        # Nothing reads a place before the start, or a sequence behind the users'.
        m_read = m_s[None, :] & (o_j < J)[:, None] & (place >= 0)
        # Logarithms of decays up to each read place.
        m_in = (o_l[None, :] < count[:, None]) & m_s[:, None]
        b_raw, b_factor, b_dt = all_steps(
            p_x + at_dt, p_f, first, o_s, o_l, m_in, shift, dt_bias, factor_batch, factor_row, ROW
        )
        b_steps = tl.where(m_in, softplus(b_dt), 0.0).to(tl.float64)
        m_upto = o_l[None, None, :] <= place[:, :, None]
        b_upto = tl.sum(tl.where(m_upto, b_steps[None, :, :], 0.0), 2)
        b_uC = reads(
            p_C + i_h * N, p_weight + at_C * TAPS, p_bias + at_C, o_s, o_j, count, m_s, o_n, m_n, J, TAPS, ROW_C
        )
        b_C = b_uC * sigmoid(b_uC)
        o_y = (o_s.to(tl.int64)[None, :] * J + o_j[:, None])[:, :, None] * E + at_x + o_p[None, None, :]
        b_dy = tl.load(p_dy + o_y, mask=m_read[:, :, None] & m_p[None, None, :], other=0.0).to(tl.float32)
        b_dC = tl.zeros([BJ, BS, BN], tl.float32)
        b_logs = tl.zeros([BJ, BS], tl.float32)
        b_sofar = tl.zeros([BS], tl.float64)
        b_dsteps = tl.zeros([BS, BL], tl.float32)
        b_dlogs = tl.zeros([BS, BL], tl.float32)
        b_x1 = tl.zeros([BS, BP], tl.float32)
        b_x2 = tl.zeros([BS, BP], tl.float32)
        b_x3 = tl.zeros([BS, BP], tl.float32)
        b_B1 = tl.zeros([BS, BN], tl.float32)
        b_B2 = tl.zeros([BS, BN], tl.float32)
        b_B3 = tl.zeros([BS, BN], tl.float32)
        b_dx1 = tl.zeros([BS, BP], tl.float32)
        b_dx2 = tl.zeros([BS, BP], tl.float32)
        b_dx3 = tl.zeros([BS, BP], tl.float32)
        b_dB1 = tl.zeros([BS, BN], tl.float32)
        b_dB2 = tl.zeros([BS, BN], tl.float32)
        b_dB3 = tl.zeros([BS, BN], tl.float32)
        b_next_x = raw(p_x + at_x, first, 0, count, b_shift_x, o_p, m_p, ROW)
        b_next_B = raw(p_x + at_B, first, 0, count, b_shift_B, o_n, m_n, ROW)
        last = tl.max(rows, 0)
        for t in range(last):
            b_x0 = b_next_x
            b_B0 = b_next_B
            b_next_x = raw(p_x + at_x, first, t + 1, count, b_shift_x, o_p, m_p, ROW)
            b_next_B = raw(p_x + at_B, first, t + 1, count, b_shift_B, o_n, m_n, ROW)
            m_here = (t < count) & m_s
            b_step = step_at(p_x + at_dt, p_f, first, o_s, t, m_here, shift, dt_bias, factor_batch, factor_row, ROW)
            b_sofar += b_step.to(tl.float64)
            m_before = m_read & (place >= t)
            b_between = ((b_upto - b_sofar[None, :]) * wide_A).to(tl.float32)
            b_decay = tl.where(m_before, exp2(tl.where(m_before, b_between, 0.0)), 0.0)
            b_uB = b_bias_B + B_0 * b_B0 + B_1 * b_B1 + B_2 * b_B2 + B_3 * b_B3
            b_sigmoid = sigmoid(b_uB)
            b_B = b_uB * b_sigmoid
            b_slope_B = b_sigmoid * (1.0 + b_uB * (1.0 - b_sigmoid))
            b_ux = b_bias_x + x_0 * b_x0 + x_1 * b_x1 + x_2 * b_x2 + x_3 * b_x3
            b_sigmoid = sigmoid(b_ux)
            b_x = b_ux * b_sigmoid
            b_slope_x = b_sigmoid * (1.0 + b_ux * (1.0 - b_sigmoid))
            b_score = tl.sum(b_C * b_B[None, :, :], 2) * b_decay
            b_along = tl.sum(b_dy * b_x[None, :, :], 2)
            b_here = tl.where(place == t, 1.0, 0.0)
            b_dM = b_along * b_step[None, :]
            if SKIP_DT:
                b_weight = (b_score + D * b_here) * b_step[None, :]
                b_dD += tl.sum(b_here * b_dM, 0)
                b_dstep = tl.sum(b_along * (b_score + D * b_here), 0)
            else:
                b_weight = b_score * b_step[None, :] + D * b_here
                b_dD += tl.sum(b_here * b_along, 0)
                b_dstep = tl.sum(b_along * b_score, 0)
            b_da = tl.sum(tl.where(m_before, b_logs, 0.0), 0)
            b_logs += b_dM * b_score
            b_slope = b_dM * b_decay
            b_dx0 = tl.sum(b_weight[:, :, None] * b_dy, 0) * b_slope_x
            b_dB0 = tl.sum(b_slope[:, :, None] * b_C, 0) * b_slope_B
            b_dC += b_slope[:, :, None] * b_B[None, :, :]

            m_now = o_l[None, :] == t
            b_dsteps += tl.where(m_now, b_dstep[:, None], 0.0)
            b_dlogs += tl.where(m_now, b_da[:, None], 0.0)
            b_tx0 += b_dx0 * b_x0
            b_tx1 += b_dx0 * b_x1
            b_tx2 += b_dx0 * b_x2
            b_tx3 += b_dx0 * b_x3
            b_dbias_x += b_dx0
            b_tB0 += b_dB0 * b_B0
            b_tB1 += b_dB0 * b_B1
            b_tB2 += b_dB0 * b_B2
            b_tB3 += b_dB0 * b_B3
            b_dbias_B += b_dB0
            b_d = x_0 * b_dx3 + x_1 * b_dx2 + x_2 * b_dx1 + x_3 * b_dx0
            b_sum_x += tl.where(t >= 3, b_d, 0.0)
            store_raw(p_dx + at_x, first, t - 3, rows, b_d, o_p, m_p, WIDE)
            b_d = B_0 * b_dB3 + B_1 * b_dB2 + B_2 * b_dB1 + B_3 * b_dB0
            b_sum_B += tl.where(t >= 3, b_d, 0.0)
            store_raw(p_dx + at_B, first, t - 3, rows, b_d, o_n, m_n, WIDE)
            b_x3, b_x2, b_x1 = b_x2, b_x1, b_x0
            b_B3, b_B2, b_B1 = b_B2, b_B1, b_B0
            b_dx3, b_dx2, b_dx1 = b_dx2, b_dx1, b_dx0
            b_dB3, b_dB2, b_dB1 = b_dB2, b_dB1, b_dB0
        # The last three places.
        for t in tl.static_range(3):
            b_d = x_0 * b_dx3 + x_1 * b_dx2 + x_2 * b_dx1
            b_sum_x += tl.where(last + t >= 3, b_d, 0.0)
            store_raw(p_dx + at_x, first, last + t - 3, rows, b_d, o_p, m_p, WIDE)
            b_d = B_0 * b_dB3 + B_1 * b_dB2 + B_2 * b_dB1
            b_sum_B += tl.where(last + t >= 3, b_d, 0.0)
            store_raw(p_dx + at_B, first, last + t - 3, rows, b_d, o_n, m_n, WIDE)
            b_dx3, b_dx2, b_dx1 = b_dx2, b_dx1, tl.zeros([BS, BP], tl.float32)
            b_dB3, b_dB2, b_dB1 = b_dB2, b_dB1, tl.zeros([BS, BN], tl.float32)

        # The step sizes, all places at once.
        b_raw, b_factor, b_dt = all_steps(
            p_x + at_dt, p_f, first, o_s, o_l, m_in, shift, dt_bias, factor_batch, factor_row, ROW
        )
        b_dA += tl.where(m_in, b_dlogs * softplus(b_dt), 0.0)
        b_ddt = tl.where(m_in, (b_dsteps + b_dlogs * A) * sigmoid(b_dt), 0.0)
        b_ddt_bias += b_ddt
        b_sum_dt += b_ddt * b_factor
        m_out = o_l[None, :] < rows[:, None]
        p_to = p_dx + (first[:, None] + o_l[None, :]) * WIDE + at_dt
        tl.store(p_to, (b_ddt * b_factor).to(p_dx.dtype.element_ty), mask=m_out)
        if p_factor is not None:
            p_to = p_dfactor + (o_s.to(tl.int64)[:, None] * factor_places + o_l[None, :]) * H + i_h
            tl.store(p_to, (b_ddt * b_raw).to(p_dfactor.dtype.element_ty), mask=m_in)

        # The convolution of C, a place of the result at a time.
        b_duC = b_dC * slope(b_uC)
        m_C = m_s[:, None] & m_n[None, :]
        for j in tl.static_range(J):
            b_d = tl.sum(tl.where((o_j == j)[:, None, None], b_duC, 0.0), 0)
            b_dbias_C += b_d
            for back in tl.static_range(TAPS):
                m_back = m_C & (count - J + j - back >= 0)[:, None]
                o_row = o_s.to(tl.int64) * M + j + TAPS - 1 - back
                b_from = tl.load(p_C + i_h * N + o_row[:, None] * ROW_C + o_n[None, :], mask=m_back, other=0.0)
                b_grad = b_d * b_from.to(tl.float32)
                if back == 0:
                    b_tC0 += b_grad
                elif back == 1:
                    b_tC1 += b_grad
                elif back == 2:
                    b_tC2 += b_grad
                else:
                    b_tC3 += b_grad
        for m in tl.static_range(M):
            b_d = tl.zeros([BS, BN], tl.float32)
            for back in tl.static_range(TAPS):
                j = m - (TAPS - 1) + back
                if j >= 0 and j < J:
                    b_part = tl.sum(tl.where((o_j == j)[:, None, None], b_duC, 0.0), 0)
                    b_d += b_part * tap(p_weight + at_C * TAPS, o_n, m_n, back, TAPS)
            b_d = tl.where((count - M + m >= 0)[:, None], b_d, 0.0)
            o_row = o_s.to(tl.int64) * M + m
            p_to = p_dC + o_row[:, None] * (H * N) + i_h * N + o_n[None, :]
            tl.store(p_to, b_d.to(p_dC.dtype.element_ty), mask=m_C)
    store_taps(p_sums, b_tx0, b_tx1, b_tx2, b_tx3, b_dbias_x, at_x, o_p, m_p, CHANNELS, TAPS)
    store_taps(p_sums, b_tB0, b_tB1, b_tB2, b_tB3, b_dbias_B, at_B, o_n, m_n, CHANNELS, TAPS)
    store_taps(p_sums, b_tC0, b_tC1, b_tC2, b_tC3, b_dbias_C, at_C, o_n, m_n, CHANNELS, TAPS)
    p_in_sums = p_sums + CHANNELS * (TAPS + 1) + 3 * H
    tl.store(p_in_sums + at_x + o_p, tl.sum(b_sum_x, 0), mask=m_p)
    tl.store(p_in_sums + at_B + o_n, tl.sum(b_sum_B, 0), mask=m_n)
    tl.store(p_in_sums + at_dt, tl.sum(tl.sum(b_sum_dt, 1), 0))
    p_sums += CHANNELS * (TAPS + 1) + i_h
    tl.store(p_sums, tl.sum(b_dD, 0))
    tl.store(p_sums + H, tl.sum(tl.sum(b_dA, 1), 0) * A)
    tl.store(p_sums + 2 * H, tl.sum(tl.sum(b_ddt_bias, 1), 0))


def _sizes(xBdt: torch.Tensor, C: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor, read: int) -> dict[str, int]:
    heads, states = A_log.shape[0], C.shape[2] // A_log.shape[0]
    width = xBdt.shape[-1] - heads - C.shape[2]
    return {
        "H": heads,
        "P": width // heads,
        "N": states,
        "J": read,
        "TAPS": weight.shape[1],
        "ROW": xBdt.stride(-2),
        "ROW_C": C.stride(1),
        "BP": tile(width // heads),
        "BN": tile(states),
        "BJ": triton.next_power_of_2(read),
    }


def _strides(factor: torch.Tensor | None) -> dict[str, int]:
    batch, row, head = (0, 0, 0) if factor is None else factor.stride()
    return {"factor_batch": batch, "factor_row": row, "factor_head": head}


def forward(
    xBdt: torch.Tensor,
    shift: torch.Tensor | None,
    C: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    ends: torch.Tensor | None,
    lengths: torch.Tensor,
    longest: int,
    skip_dt: bool,
) -> torch.Tensor:
    """The result y [B, J, E], from xBdt [B, L, E + HN + H], or [1, S, ...] with `ends`, and C [B, M, HN].

    Columns are contiguous. `shift` [E + HN + H] is added to the places of xBdt. The factor is [B, L or more, H], any
    strides, in both cases.
    """
    users, read = C.shape[0], C.shape[1] - weight.shape[1] + 1
    sizes = _sizes(xBdt, C, weight, A_log, read)
    y = torch.empty(users, read, sizes["H"] * sizes["P"], dtype=xBdt.dtype, device=xBdt.device)
    if users:
        tail_forward[(sizes["H"], triton.cdiv(users, FORWARD["BS"]))](
            xBdt,
            shift,
            C,
            factor,
            weight,
            bias,
            A_log,
            D,
            dt_bias,
            ends,
            lengths,
            y,
            users,
            xBdt.shape[1],
            **_strides(factor),
            **sizes,
            PACKED=ends is not None,
            SKIP_DT=skip_dt,
            **FORWARD,
        )
    return y


def backward(
    grad: torch.Tensor,
    xBdt: torch.Tensor,
    shift: torch.Tensor | None,
    C: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    ends: torch.Tensor | None,
    lengths: torch.Tensor,
    longest: int,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of xBdt, C, factor (empty where absent) and, one behind the other, of the parameters.

    The parameters' order is taps [C, K], bias [C], D [H], A_log [H], dt_bias [H], shift [E + HN + H], all float32;
    the last whether there is one or not.
    """
    users, read = grad.shape[:2]
    sizes = _sizes(xBdt, C, weight, A_log, read)
    d_xBdt = torch.empty(xBdt.shape, dtype=xBdt.dtype, device=xBdt.device)
    d_C = torch.empty(C.shape, dtype=C.dtype, device=C.device)
    d_factor = xBdt.new_empty(0) if factor is None else torch.zeros_like(factor, memory_format=torch.contiguous_format)
    sequences = users if ends is None else ends.numel() - 1
    options = dict(next(each for most, each in BACKWARD.items() if read <= most))
    tiles = triton.cdiv(sequences, options["BS"])
    programs = max(1, min(tiles, processors(xBdt) * options.pop("programs") // sizes["H"]))
    sums = torch.empty(programs, weight.numel() + bias.numel() + 3 * sizes["H"] + xBdt.shape[-1], device=xBdt.device)
    tail_backward[(sizes["H"], programs)](
        grad.contiguous(),
        xBdt,
        shift,
        C,
        factor,
        weight,
        bias,
        A_log,
        D,
        dt_bias,
        ends,
        lengths,
        d_xBdt,
        d_C,
        d_factor,
        sums,
        sequences,
        users,
        xBdt.shape[1],
        **_strides(factor),
        factor_places=0 if factor is None else factor.shape[1],
        **sizes,
        PACKED=ends is not None,
        SKIP_DT=skip_dt,
        BL=triton.next_power_of_2(longest),
        **options,
    )
    return d_xBdt, d_C, d_factor, summed(sums[None]).squeeze(0)
