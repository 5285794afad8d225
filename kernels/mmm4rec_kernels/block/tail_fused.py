# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The block's scan at the last places of each sequence, before gate and norm, one Triton kernel a direction.

Letters: S rows of all sequences, B sequences that are read, J read places, K taps, M = J + K - 1 places that the
convolution of C reaches, H heads, P head dim, N state, C = E + 2HN channels; BL, BP, BN, BK are L, P, N, K rounded up.

A program takes one head of one sequence, whole. So few places are read that every product is a sum over a tile in
float32; no state is formed. Backward recomputes all but the inputs. The gradient of the convolved columns is written
where that of the raw ones goes, read again from the cache by the same program, and replaced. A program of backward
goes through many sequences and keeps the sums of the parameters' gradients: results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.launch import processors, tile
from mmm4rec_kernels.sums import summed
from mmm4rec_kernels.tiles import LOG2E, exp2, sigmoid, softplus

PROGRAMS = 2
"""Programs of backward, for each multiprocessor and head."""
FORWARD: dict[str, int] = {"num_warps": 4}
BACKWARD: dict[str, int] = {"num_warps": 4}


@triton.jit
def span(p_ends, p_lengths, i, length, PACKED: tl.constexpr):
    """First row of a sequence, its places, the rows that its gradients are written to."""
    if PACKED:
        first = tl.load(p_ends + i).to(tl.int64)
        count = (tl.load(p_ends + i + 1).to(tl.int64) - first).to(tl.int32)
        return first, count, count
    else:
        return tl.cast(i, tl.int64) * length, tl.load(p_lengths + i).to(tl.int32), length


@triton.jit
def taps_of(p_weight, o_c, m_c, TAPS: tl.constexpr, BACK: tl.constexpr):
    """Taps [columns] for the place BACK places before the present one."""
    return tl.load(p_weight + o_c * TAPS + (TAPS - 1 - BACK), mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def bias_of(p_shift, at, o_c, m_c):
    """Bias [columns] of the projection, zero if it is in the columns already."""
    b_shift = tl.zeros([o_c.shape[0]], tl.float32)
    if p_shift is not None:
        b_shift = tl.load(p_shift + at + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_shift


@triton.jit
def before(p_in, b_shift, o_l, count, o_c, m_c, ROW: tl.constexpr, BACK: tl.constexpr):
    """Raw columns [BL, columns] of the place BACK places before each."""
    mask = ((o_l >= BACK) & (o_l < count))[:, None] & m_c[None, :]
    b_in = tl.load(p_in + (o_l - BACK)[:, None] * ROW + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, b_in + b_shift[None, :], 0.0)


@triton.jit
def convolve(p_in, b_shift, p_weight, p_bias, o_l, count, o_c, m_c, ROW: tl.constexpr, TAPS: tl.constexpr):
    """The convolution before SiLU, [BL, columns]; behind the end of the sequence only its bias."""
    b_sum = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(TAPS):
        b_sum += (
            before(p_in, b_shift, o_l, count, o_c, m_c, ROW, back) * taps_of(p_weight, o_c, m_c, TAPS, back)[None, :]
        )
    return b_sum


@triton.jit
def reached(p_C, j, count, o_k, o_n, m_n, ROW: tl.constexpr, TAPS: tl.constexpr, J: tl.constexpr):
    """Raw columns of C [BK, N] under the taps of read place j, zero before the start of the sequence."""
    m_k = (o_k < TAPS) & (count - J + j - (TAPS - 1) + o_k >= 0)
    return tl.load(p_C + (j + o_k)[:, None] * ROW + o_n[None, :], mask=m_k[:, None] & m_n[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def steps_of(
    p_dt,
    p_shift,
    p_factor,
    p_A_log,
    p_dt_bias,
    i_h,
    o_l,
    count,
    factor_row,
    ROW: tl.constexpr,
):
    """Raw dt, factor, what softplus is taken of, step sizes, A, and running sums of base-2 logarithms of decays."""
    m_in = o_l < count
    b_raw = tl.load(p_dt + o_l * ROW, mask=m_in, other=0.0).to(tl.float32)
    if p_shift is not None:
        b_raw += tl.load(p_shift).to(tl.float32)
    b_factor = tl.full(o_l.shape, 1.0, tl.float32)
    if p_factor is not None:
        b_factor = tl.load(p_factor + o_l * factor_row, mask=m_in, other=0.0).to(tl.float32)
    b_dt = b_raw * b_factor + tl.load(p_dt_bias + i_h).to(tl.float32)
    b_step = tl.where(m_in, softplus(b_dt), 0.0)
    A = -tl.exp(tl.load(p_A_log + i_h).to(tl.float32))
    b_total = tl.cumsum(b_step.to(tl.float64) * (A.to(tl.float64) * LOG2E), 0)
    return b_raw, b_factor, b_dt, b_step, A, b_total


@triton.jit
def decay_to(b_total, o_l, place):
    """2^(sum over (s, place]) for s up to the place, else 0."""
    b_between = (tl.sum(tl.where(o_l == place, b_total, 0.0), 0) - b_total).to(tl.float32)
    return exp2(tl.where(o_l <= place, b_between, float("-inf")))


@triton.jit
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
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    E: tl.constexpr = H * P
    i_h = tl.program_id(0)
    i = tl.program_id(1)
    o_l = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_p = o_p < P
    m_n = o_n < N
    first, count, _ = span(p_ends, p_lengths, i, length, PACKED)
    p_x += first * ROW
    at_x = i_h * P
    at_B = E + i_h * N
    at_C = at_B + H * N
    p_C += tl.cast(i, tl.int64) * (J + TAPS - 1) * ROW_C + i_h * N
    p_f = p_factor
    if p_factor is not None:
        p_f = p_factor + tl.cast(i, tl.int64) * factor_batch + i_h * factor_head
    p_of_dt = p_shift
    if p_shift is not None:
        p_of_dt = p_shift + E + H * N + i_h
    _, _, _, b_step, _, b_total = steps_of(
        p_x + E + H * N + i_h, p_of_dt, p_f, p_A_log, p_dt_bias, i_h, o_l, count, factor_row, ROW
    )
    b_shift = bias_of(p_shift, at_B, o_n, m_n)
    b_B = convolve(p_x + at_B, b_shift, p_weight + at_B * TAPS, p_bias + at_B, o_l, count, o_n, m_n, ROW, TAPS)
    b_B *= sigmoid(b_B)
    b_shift = bias_of(p_shift, at_x, o_p, m_p)
    b_x = convolve(p_x + at_x, b_shift, p_weight + at_x * TAPS, p_bias + at_x, o_l, count, o_p, m_p, ROW, TAPS)
    b_x *= sigmoid(b_x)
    D = tl.load(p_D + i_h).to(tl.float32)
    o_taps = o_n[None, :] * TAPS + o_k[:, None]
    m_taps = (o_k < TAPS)[:, None] & m_n[None, :]
    b_taps = tl.load(p_weight + at_C * TAPS + o_taps, mask=m_taps, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + at_C + o_n, mask=m_n, other=0.0).to(tl.float32)
    for j in range(J):
        place = count - J + j
        b_C = b_bias + tl.sum(b_taps * reached(p_C, j, count, o_k, o_n, m_n, ROW_C, TAPS, J), 0)
        b_C *= sigmoid(b_C)
        b_m = tl.sum(b_B * b_C[None, :], 1) * decay_to(b_total, o_l, place) * b_step
        b_skip = tl.where(o_l == place, D, 0.0)
        if SKIP_DT:
            b_skip *= b_step
        b_y = tl.sum((b_m + b_skip)[:, None] * b_x, 0)
        p_to = p_y + (tl.cast(i, tl.int64) * J + j) * E + at_x
        tl.store(p_to + o_p, b_y.to(p_y.dtype.element_ty), mask=m_p)


@triton.jit
def raw_gradients(p_d, p_weight, o_l, count, o_c, m_c, ROW: tl.constexpr, TAPS: tl.constexpr):
    """Gradients of the raw columns [BL, columns], from those of a convolution's results in memory."""
    b_sum = tl.zeros([o_l.shape[0], o_c.shape[0]], tl.float32)
    for ahead in tl.static_range(TAPS):
        mask = (o_l + ahead < count)[:, None] & m_c[None, :]
        b_d = tl.load(p_d + (o_l + ahead)[:, None] * ROW + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        b_sum += b_d * taps_of(p_weight, o_c, m_c, TAPS, ahead)[None, :]
    return b_sum


@triton.jit
def add_each(a_0, a_1, a_2, a_3, a_4, b_0, b_1, b_2, b_3, b_4):
    """Five sums at once: the warps of a program meet once instead of five times."""
    return a_0 + b_0, a_1 + b_1, a_2 + b_2, a_3 + b_3, a_4 + b_4


@triton.jit
def tap_sums(b_taps, b_bias, p_in, b_shift, b_d, o_l, count, o_k, o_c, m_c, ROW: tl.constexpr, TAPS: tl.constexpr):
    """Gradients of the taps [BK, columns] and of the bias, added to what is given."""
    b_0 = b_d * before(p_in, b_shift, o_l, count, o_c, m_c, ROW, 0)
    b_1 = b_d * before(p_in, b_shift, o_l, count, o_c, m_c, ROW, 1)
    b_2 = b_0
    b_3 = b_0
    if TAPS > 2:
        b_2 = b_d * before(p_in, b_shift, o_l, count, o_c, m_c, ROW, 2)
    if TAPS > 3:
        b_3 = b_d * before(p_in, b_shift, o_l, count, o_c, m_c, ROW, 3)
    b_0, b_1, b_2, b_3, b_4 = tl.reduce((b_0, b_1, b_2, b_3, b_d), 0, add_each)
    # The last tap multiplies the present place.
    o_back = TAPS - 1 - o_k[:, None]
    b_here = tl.where(o_back == 0, b_0[None, :], tl.where(o_back == 1, b_1[None, :], 0.0))
    b_here += tl.where(o_back == 2, b_2[None, :], tl.where(o_back == 3, b_3[None, :], 0.0))
    return b_taps + b_here, b_bias + b_4


@triton.jit
def store_taps(p_sums, b_taps, b_bias, at, o_k, o_c, m_c, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    mask = (o_k < TAPS)[:, None] & m_c[None, :]
    tl.store(p_sums + (at + o_c)[None, :] * TAPS + o_k[:, None], b_taps, mask=mask)
    tl.store(p_sums + CHANNELS * TAPS + at + o_c, b_bias, mask=m_c)


@triton.jit
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
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
):
    E: tl.constexpr = H * P
    CHANNELS: tl.constexpr = E + 2 * H * N
    WIDE: tl.constexpr = E + H * N + H
    M: tl.constexpr = J + TAPS - 1
    i_h = tl.program_id(0)
    o_l = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_m = tl.arange(0, BM)
    m_p = o_p < P
    m_n = o_n < N
    at_x = i_h * P
    at_B = E + i_h * N
    at_C = at_B + H * N
    p_sums += tl.program_id(1).to(tl.int64) * (CHANNELS * (TAPS + 1) + 3 * H + WIDE)
    D = tl.load(p_D + i_h).to(tl.float32)
    o_taps = o_n[None, :] * TAPS + o_k[:, None]
    m_taps = (o_k < TAPS)[:, None] & m_n[None, :]
    b_taps = tl.load(p_weight + at_C * TAPS + o_taps, mask=m_taps, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + at_C + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_shift_x = bias_of(p_shift, at_x, o_p, m_p)
    b_shift_B = bias_of(p_shift, at_B, o_n, m_n)
    p_of_dt = p_shift
    if p_shift is not None:
        p_of_dt = p_shift + E + H * N + i_h
    b_sum_x = tl.zeros([BP], tl.float32)
    b_sum_B = tl.zeros([BN], tl.float32)
    b_sum_dt = tl.zeros([BL], tl.float32)
    b_taps_x = tl.zeros([BK, BP], tl.float32)
    b_taps_B = tl.zeros([BK, BN], tl.float32)
    b_taps_C = tl.zeros([BK, BN], tl.float32)
    b_bias_x = tl.zeros([BP], tl.float32)
    b_bias_B = tl.zeros([BN], tl.float32)
    b_bias_C = tl.zeros([BN], tl.float32)
    b_dD = tl.zeros([BL], tl.float32)
    b_dA = tl.zeros([BL], tl.float32)
    b_ddt_bias = tl.zeros([BL], tl.float32)
    for i in range(tl.program_id(1), sequences, tl.num_programs(1)):
        first, count, rows = span(p_ends, p_lengths, i, length, PACKED)
        p_in = p_x + first * ROW
        p_out = p_dx + first * WIDE
        p_f = p_factor
        if p_factor is not None:
            p_f = p_factor + tl.cast(i, tl.int64) * factor_batch + i_h * factor_head
        m_row = o_l < rows
        if i >= users:  # read by nobody
            m_x = m_row[:, None] & m_p[None, :]
            m_B = m_row[:, None] & m_n[None, :]
            tl.store(p_out + at_x + o_l[:, None] * WIDE + o_p[None, :], tl.zeros([BL, BP], p_dx.dtype.element_ty), m_x)
            tl.store(p_out + at_B + o_l[:, None] * WIDE + o_n[None, :], tl.zeros([BL, BN], p_dx.dtype.element_ty), m_B)
            tl.store(p_out + E + H * N + i_h + o_l * WIDE, tl.zeros([BL], p_dx.dtype.element_ty), m_row)
        else:
            b_raw, b_factor, b_dt, b_step, A, b_total = steps_of(
                p_in + E + H * N + i_h, p_of_dt, p_f, p_A_log, p_dt_bias, i_h, o_l, count, factor_row, ROW
            )
            b_uB = convolve(
                p_in + at_B, b_shift_B, p_weight + at_B * TAPS, p_bias + at_B, o_l, count, o_n, m_n, ROW, TAPS
            )
            b_B = b_uB * sigmoid(b_uB)
            b_ux = convolve(
                p_in + at_x, b_shift_x, p_weight + at_x * TAPS, p_bias + at_x, o_l, count, o_p, m_p, ROW, TAPS
            )
            b_x = b_ux * sigmoid(b_ux)
            b_dx = tl.zeros([BL, BP], tl.float32)
            b_dB = tl.zeros([BL, BN], tl.float32)
            b_dstep = tl.zeros([BL], tl.float32)
            b_ends = tl.zeros([BL], tl.float64)
            p_du = p_dC + (tl.cast(i, tl.int64) * M) * (H * N) + i_h * N
            for j in range(J):
                place = count - J + j
                b_reached = reached(
                    p_C + tl.cast(i, tl.int64) * M * ROW_C + i_h * N, j, count, o_k, o_n, m_n, ROW_C, TAPS, J
                )
                b_uC = b_bias + tl.sum(b_taps * b_reached, 0)
                b_sigmoid = sigmoid(b_uC)
                b_C = b_uC * b_sigmoid
                b_decay = decay_to(b_total, o_l, place)
                b_score = tl.sum(b_B * b_C[None, :], 1) * b_decay
                p_from = p_dy + (tl.cast(i, tl.int64) * J + j) * E + at_x
                b_dy = tl.load(p_from + o_p, mask=m_p & (place >= 0), other=0.0).to(tl.float32)
                b_along = tl.sum(b_x * b_dy[None, :], 1)
                b_here = tl.where(o_l == place, 1.0, 0.0)
                b_weight = b_score * b_step
                b_dM = b_along * b_step
                if SKIP_DT:
                    b_dD += b_here * b_dM
                    b_weight += D * b_here * b_step
                    b_dstep += b_along * (b_score + D * b_here)
                else:
                    b_dD += b_here * b_along
                    b_weight += D * b_here
                    b_dstep += b_along * b_score
                b_dx += b_weight[:, None] * b_dy[None, :]
                b_slope = b_dM * b_decay
                b_dB += b_slope[:, None] * b_C[None, :]
                b_duC = tl.sum(b_slope[:, None] * b_B, 0) * (b_sigmoid * (1.0 + b_uC * (1.0 - b_sigmoid)))
                b_taps_C += b_reached * b_duC[None, :]
                b_bias_C += b_duC
                tl.store(p_du + j * (H * N) + o_n, b_duC.to(p_dC.dtype.element_ty), mask=m_n)
                b_log = (b_dM * b_score).to(tl.float64)
                b_ends += tl.where(o_l == place, tl.sum(b_log, 0), 0.0) - b_log
            b_sigmoid = sigmoid(b_ux)
            b_dx *= b_sigmoid * (1.0 + b_ux * (1.0 - b_sigmoid))
            b_sigmoid = sigmoid(b_uB)
            b_dB *= b_sigmoid * (1.0 + b_uB * (1.0 - b_sigmoid))
            m_x = (o_l < count)[:, None] & m_p[None, :]
            m_B = (o_l < count)[:, None] & m_n[None, :]
            p_to = p_out + at_x + o_l[:, None] * WIDE + o_p[None, :]
            tl.store(p_to, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
            p_to = p_out + at_B + o_l[:, None] * WIDE + o_n[None, :]
            tl.store(p_to, b_dB.to(p_dx.dtype.element_ty), mask=m_B)
            b_taps_x, b_bias_x = tap_sums(
                b_taps_x, b_bias_x, p_in + at_x, b_shift_x, b_dx, o_l, count, o_k, o_p, m_p, ROW, TAPS
            )
            b_taps_B, b_bias_B = tap_sums(
                b_taps_B, b_bias_B, p_in + at_B, b_shift_B, b_dB, o_l, count, o_k, o_n, m_n, ROW, TAPS
            )
            # What was written is read by other threads of the program, and then replaced.
            tl.debug_barrier()
            b_dC = tl.zeros([BM, BN], tl.float32)
            for back in tl.static_range(TAPS):
                # Tap TAPS - 1 - back of read place j lies at j + TAPS - 1 - back.
                o_j = o_m - (TAPS - 1 - back)
                mask = ((o_j >= 0) & (o_j < J))[:, None] & m_n[None, :]
                b_d = tl.load(p_du + o_j[:, None] * (H * N) + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
                b_dC += b_d * taps_of(p_weight + at_C * TAPS, o_n, m_n, TAPS, back)[None, :]
            b_dC = tl.where((count - M + o_m >= 0)[:, None], b_dC, 0.0)
            b_dx = raw_gradients(p_out + at_x, p_weight + at_x * TAPS, o_l, count, o_p, m_p, WIDE, TAPS)
            b_dB = raw_gradients(p_out + at_B, p_weight + at_B * TAPS, o_l, count, o_n, m_n, WIDE, TAPS)
            tl.debug_barrier()
            m_C = (o_m < M)[:, None] & m_n[None, :]
            tl.store(p_du + o_m[:, None] * (H * N) + o_n[None, :], b_dC.to(p_dC.dtype.element_ty), mask=m_C)
            p_to = p_out + at_x + o_l[:, None] * WIDE + o_p[None, :]
            tl.store(p_to, b_dx.to(p_dx.dtype.element_ty), mask=m_row[:, None] & m_p[None, :])
            p_to = p_out + at_B + o_l[:, None] * WIDE + o_n[None, :]
            tl.store(p_to, b_dB.to(p_dx.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])
            b_sum_x += tl.sum(b_dx, 0)
            b_sum_B += tl.sum(b_dB, 0)

            b_da = tl.cumsum(b_ends, 0, reverse=True).to(tl.float32)
            b_dA += b_da * b_step * A
            b_ddt = tl.where(o_l < count, (b_dstep + b_da * A) * sigmoid(b_dt), 0.0)
            b_ddt_bias += b_ddt
            p_to = p_out + E + H * N + i_h + o_l * WIDE
            b_sum_dt += b_ddt * b_factor
            tl.store(p_to, (b_ddt * b_factor).to(p_dx.dtype.element_ty), mask=m_row)
            if p_factor is not None:
                p_to = p_dfactor + (tl.cast(i, tl.int64) * factor_places + o_l) * H + i_h
                tl.store(p_to, (b_ddt * b_raw).to(p_dfactor.dtype.element_ty), mask=o_l < factor_places)
    store_taps(p_sums, b_taps_x, b_bias_x, at_x, o_k, o_p, m_p, CHANNELS, TAPS)
    store_taps(p_sums, b_taps_B, b_bias_B, at_B, o_k, o_n, m_n, CHANNELS, TAPS)
    store_taps(p_sums, b_taps_C, b_bias_C, at_C, o_k, o_n, m_n, CHANNELS, TAPS)
    p_in_sums = p_sums + CHANNELS * (TAPS + 1) + 3 * H
    tl.store(p_in_sums + at_x + o_p, b_sum_x, mask=m_p)
    tl.store(p_in_sums + at_B + o_n, b_sum_B, mask=m_n)
    tl.store(p_in_sums + E + H * N + i_h, tl.sum(b_sum_dt, 0))
    p_sums += CHANNELS * (TAPS + 1) + i_h
    tl.store(p_sums, tl.sum(b_dD, 0))
    tl.store(p_sums + H, tl.sum(b_dA, 0))
    tl.store(p_sums + 2 * H, tl.sum(b_ddt_bias, 0))


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
        "BK": triton.next_power_of_2(weight.shape[1]),
    }


def _rows(longest: int, factor: torch.Tensor | None) -> int:
    return tile(longest if factor is None else max(longest, factor.shape[1]))


def _strides(factor: torch.Tensor | None) -> dict[str, int]:
    batch, row, head, places = (0, 0, 0, 0) if factor is None else (*factor.stride(), factor.shape[1])
    return {"factor_batch": batch, "factor_row": row, "factor_head": head, "factor_places": places}


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
        tail_forward[(sizes["H"], users)](
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
            xBdt.shape[1],
            **_strides(factor),
            **sizes,
            PACKED=ends is not None,
            SKIP_DT=skip_dt,
            BL=_rows(longest, factor),
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
    d_factor = xBdt.new_empty(0) if factor is None else torch.empty_like(factor, memory_format=torch.contiguous_format)
    sequences = users if ends is None else ends.numel() - 1
    programs = max(1, min(sequences, processors(xBdt) * PROGRAMS))
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
        **sizes,
        PACKED=ends is not None,
        SKIP_DT=skip_dt,
        BL=_rows(longest, factor),
        BM=triton.next_power_of_2(read + weight.shape[1] - 1),
        **BACKWARD,
    )
    return d_xBdt, d_C, d_factor, summed(sums[None]).squeeze(0)
