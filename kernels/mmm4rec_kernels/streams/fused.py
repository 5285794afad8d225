# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A whole stage of the time streams as one Triton kernel each way.

Letters: N rows (streams and users), H heads, T places, F bins, K taps; BR, BT, BF are the sides of tiles. A program
takes BR rows, in `stage` of one head, so that a convolution over places is a product with a banded matrix that holds
the head's taps. Everything between reading the rows and writing the results stays in registers; what backward would
need a product to compute again is kept. Products are about float32 whatever torch does with its own: they are small,
and one gap in a stream is often a thousand times another. Gradients of parameters are left as one line a program and
added in a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.sums import summed
from mmm4rec_kernels.tiles import sigmoid

STAGE = {"BR": 16, "num_warps": 4}
FILTER = {"BR": 32, "num_warps": 2}
"""Rows and warps of a program; twice as quick backward as 64 rows with 4 warps (H100)."""
EXACT = tl.constexpr("tf32x3")


@triton.jit
def mul(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def silu_slope(v):
    b_sigmoid = sigmoid(v)
    return b_sigmoid * (1.0 + v * (1.0 - b_sigmoid))


@triton.jit
def tanhshrink(v):
    """Of v minus tanh(v): near 0, where the difference would lose all digits, by its series."""
    s = v * v
    b_near = 21844.0 / 6081075.0
    b_near = -1382.0 / 155925.0 + s * b_near
    b_near = 62.0 / 2835.0 + s * b_near
    b_near = -17.0 / 315.0 + s * b_near
    b_near = 2.0 / 15.0 + s * b_near
    b_near = -1.0 / 3.0 + s * b_near
    b_e = tl.exp(-2.0 * tl.abs(v))
    b_tanh = (1.0 - b_e) / (1.0 + b_e)
    return tl.where(s < 0.25, -s * v * b_near, v - tl.where(v < 0.0, -b_tanh, b_tanh))


@triton.jit
def kept(p_seed, o_element, p):
    """Which elements dropout keeps, times 1 / (1 - p)."""
    b_random = tl.rand(tl.load(p_seed), o_element.to(tl.int32))
    return tl.where(b_random >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def square(p_weight, stride, T: tl.constexpr, BT: tl.constexpr):
    """A linear map [out, in] as [in, out]."""
    o_t = tl.arange(0, BT)
    mask = (o_t < T)[:, None] & (o_t < T)[None, :]
    return tl.load(p_weight + o_t[:, None] + o_t[None, :] * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def line(p_vector, stride, T: tl.constexpr, BT: tl.constexpr):
    o_t = tl.arange(0, BT)
    return tl.load(p_vector + o_t * stride, mask=o_t < T, other=0.0).to(tl.float32)


@triton.jit
def banded(p_taps, i_h, T: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """The causal convolution of a head over T places as a matrix [in, out]."""
    o_t = tl.arange(0, BT)
    back = o_t[None, :] - o_t[:, None]
    mask = (back >= 0) & (back < K) & (o_t < T)[None, :]
    return tl.load(p_taps + i_h * K + K - 1 - back, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_square(p_sum, b_sum, T: tl.constexpr, BT: tl.constexpr):
    """A gradient [in, out] as [out, in]."""
    o_t = tl.arange(0, BT)
    mask = (o_t < T)[:, None] & (o_t < T)[None, :]
    tl.store(p_sum + o_t[:, None] + o_t[None, :] * T, b_sum, mask=mask)


@triton.jit
def store_taps(p_sum, b_sum, T: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """From the gradient of a banded matrix that of its taps: sums along its diagonals."""
    o_t = tl.arange(0, BT)
    back = o_t[None, :] - o_t[:, None]
    for k in tl.static_range(K):
        tl.store(p_sum + k, tl.sum(tl.sum(tl.where(back == K - 1 - k, b_sum, 0.0), 1), 0))


@triton.jit(do_not_specialize=["rows"])
def stage_forward(
    p_r,
    p_w1,
    p_b1,
    p_w2,
    p_b2,
    p_c1,
    p_d1,
    p_c2,
    p_d2,
    p_wg,
    p_bg,
    p_wn,
    p_bn,
    p_seed,
    p_w,
    p_next,
    p_kept,
    rows,
    r_row,
    r_head,
    p,
    eps,
    GATES: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    i_h = tl.program_id(1)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_t = tl.arange(0, BT)
    m_t = (o_t < T)[None, :]
    mask = (o_r < rows)[:, None] & m_t
    b_r = tl.load(p_r + o_r.to(tl.int64)[:, None] * r_row + i_h * r_head + o_t[None, :], mask=mask, other=0.0)
    b_r = b_r.to(tl.float32)
    o_element = (o_r.to(tl.int64) * H + i_h)[:, None] * T + o_t[None, :]
    b_in = b_r
    if p_seed is not None:
        b_in = b_r * kept(p_seed, o_element, p)
    b_a = mul(b_in, square(p_w1, T, T, BT), PRECISION) + line(p_b1, 1, T, BT)[None, :]
    b_f = mul(b_a * sigmoid(b_a), square(p_w2, T, T, BT), PRECISION) + line(p_b2, 1, T, BT)[None, :]
    b_u = mul(tanhshrink(b_f) * b_r, banded(p_c1, i_h, T, K, BT), PRECISION) + tl.load(p_d1 + i_h).to(tl.float32)
    b_y = tl.where(m_t, b_u * sigmoid(b_u), 0.0)
    b_v = mul(b_y, banded(p_c2, i_h, T, K, BT), PRECISION) + tl.load(p_d2 + i_h).to(tl.float32)
    size = tl.cast(rows, tl.int64) * (H * T)
    tl.store(p_kept + o_element, b_a, mask=mask)
    tl.store(p_kept + size + o_element, b_f, mask=mask)
    tl.store(p_kept + 2 * size + o_element, b_u, mask=mask)
    tl.store(p_kept + 3 * size + o_element, b_v, mask=mask)
    b_w = b_v * sigmoid(b_v)
    tl.store(p_w + (o_r.to(tl.int64)[:, None] * T + o_t[None, :]) * H + i_h, b_w, mask=mask)
    if GATES > 0:
        b_in = b_r
        if p_seed is not None:
            b_in = b_r * kept(p_seed, o_element + rows * (H * T), p)
        step = T if GATES > 1 else 0
        unit = 1 if GATES > 1 else 0
        b_gate = sigmoid(mul(b_in, square(p_wg, step, T, BT), PRECISION) + line(p_bg, unit, T, BT)[None, :])
        tl.store(p_kept + 4 * size + o_element, b_gate, mask=mask)
        b_n = tl.where(m_t, b_w + b_gate * (b_r - b_w), 0.0)
        b_centred = tl.where(m_t, b_n - (tl.sum(b_n, 1) / T)[:, None], 0.0)
        b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, 1) / T + eps)
        b_next = b_centred * b_scale[:, None] * line(p_wn, 1, T, BT)[None, :] + line(p_bn, 1, T, BT)[None, :]
        tl.store(p_next + o_element, b_next, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def stage_backward(
    p_dw,
    p_dnext,
    p_r,
    p_w1,
    p_w2,
    p_c1,
    p_c2,
    p_wg,
    p_wn,
    p_seed,
    p_kept,
    p_dr,
    p_sums,
    rows,
    r_row,
    r_head,
    dw_row,
    dw_head,
    dw_place,
    p,
    eps,
    GATES: tl.constexpr,
    SUMS: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    i_h = tl.program_id(1)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_t = tl.arange(0, BT)
    m_t = (o_t < T)[None, :]
    mask = (o_r < rows)[:, None] & m_t
    p_sums += (tl.program_id(0) * H + i_h).to(tl.int64) * SUMS
    b_r = tl.load(p_r + o_r.to(tl.int64)[:, None] * r_row + i_h * r_head + o_t[None, :], mask=mask, other=0.0)
    b_r = b_r.to(tl.float32)
    o_element = (o_r.to(tl.int64) * H + i_h)[:, None] * T + o_t[None, :]
    b_in = b_r
    if p_seed is not None:
        b_keep = kept(p_seed, o_element, p)
        b_in = b_r * b_keep
    b_w1, b_w2 = square(p_w1, T, T, BT), square(p_w2, T, T, BT)
    b_c1, b_c2 = banded(p_c1, i_h, T, K, BT), banded(p_c2, i_h, T, K, BT)
    size = tl.cast(rows, tl.int64) * (H * T)
    b_a = tl.load(p_kept + o_element, mask=mask, other=0.0)
    b_s = b_a * sigmoid(b_a)
    b_f = tl.load(p_kept + size + o_element, mask=mask, other=0.0)
    b_g = tanhshrink(b_f)
    b_x = b_g * b_r
    b_u = tl.load(p_kept + 2 * size + o_element, mask=mask, other=0.0)
    b_y = b_u * sigmoid(b_u)
    b_v = tl.load(p_kept + 3 * size + o_element, mask=mask, other=0.0)
    b_dw = tl.zeros([BR, BT], tl.float32)
    if p_dw is not None:
        o_dw = o_r.to(tl.int64)[:, None] * dw_row + i_h * dw_head + o_t[None, :] * dw_place
        b_dw += tl.load(p_dw + o_dw, mask=mask, other=0.0).to(tl.float32)
    b_dr = tl.zeros([BR, BT], tl.float32)
    if GATES > 0:
        p_gate = p_sums + 2 * T * T + 2 * T + 2 * K + 2
        b_through = b_r
        if p_seed is not None:
            b_pass = kept(p_seed, o_element + rows * (H * T), p)
            b_through = b_r * b_pass
        step = T if GATES > 1 else 0
        b_wg = square(p_wg, step, T, BT)
        b_gate = tl.load(p_kept + 4 * size + o_element, mask=mask, other=0.0)
        b_w = b_v * sigmoid(b_v)
        b_n = tl.where(m_t, b_w + b_gate * (b_r - b_w), 0.0)
        b_centred = tl.where(m_t, b_n - (tl.sum(b_n, 1) / T)[:, None], 0.0)
        b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, 1) / T + eps)
        b_normed = b_centred * b_scale[:, None]
        b_grad = tl.load(p_dnext + o_element, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_gate + T * GATES + GATES + o_t, tl.sum(b_grad * b_normed, 0), mask=o_t < T)
        tl.store(p_gate + T * GATES + GATES + T + o_t, tl.sum(b_grad, 0), mask=o_t < T)
        b_grad *= line(p_wn, 1, T, BT)[None, :]
        b_along = tl.sum(b_grad * b_normed, 1) / T
        b_dn = b_scale[:, None] * (b_grad - (tl.sum(b_grad, 1) / T)[:, None] - b_normed * b_along[:, None])
        b_dn = tl.where(mask, b_dn, 0.0)
        b_dw += b_dn * (1.0 - b_gate)
        b_dr += b_dn * b_gate
        b_dz = b_dn * (b_r - b_w) * b_gate * (1.0 - b_gate)
        b_sum = mul(tl.trans(b_through), b_dz, PRECISION)
        if GATES > 1:
            store_square(p_gate, b_sum, T, BT)
            tl.store(p_gate + T * T + o_t, tl.sum(b_dz, 0), mask=o_t < T)
        else:
            tl.store(p_gate + o_t, tl.sum(b_sum, 1), mask=o_t < T)
            tl.store(p_gate + T, tl.sum(tl.sum(b_dz, 1), 0))
        b_back = mul(b_dz, tl.trans(b_wg), PRECISION)
        if p_seed is not None:
            b_back *= b_pass
        b_dr += b_back
    p_rest = p_sums + 2 * T * T
    b_dv = b_dw * silu_slope(b_v)
    store_taps(p_rest + 2 * T + K + 1, mul(tl.trans(b_y), b_dv, PRECISION), T, K, BT)
    tl.store(p_rest + 2 * T + 2 * K + 1, tl.sum(tl.sum(b_dv, 1), 0))
    b_du = mul(b_dv, tl.trans(b_c2), PRECISION) * silu_slope(b_u)
    b_du = tl.where(m_t, b_du, 0.0)
    store_taps(p_rest + 2 * T, mul(tl.trans(b_x), b_du, PRECISION), T, K, BT)
    tl.store(p_rest + 2 * T + K, tl.sum(tl.sum(b_du, 1), 0))
    b_dx = mul(b_du, tl.trans(b_c1), PRECISION)
    b_dr += b_dx * b_g
    b_tanh = b_f - b_g
    b_df = b_dx * b_r * b_tanh * b_tanh
    store_square(p_sums + T * T, mul(tl.trans(b_s), b_df, PRECISION), T, BT)
    tl.store(p_rest + T + o_t, tl.sum(b_df, 0), mask=o_t < T)
    b_da = mul(b_df, tl.trans(b_w2), PRECISION) * silu_slope(b_a)
    store_square(p_sums, mul(tl.trans(b_in), b_da, PRECISION), T, BT)
    tl.store(p_rest + o_t, tl.sum(b_da, 0), mask=o_t < T)
    b_back = mul(b_da, tl.trans(b_w1), PRECISION)
    if p_seed is not None:
        b_back *= b_keep
    tl.store(p_dr + o_element, b_dr + b_back, mask=mask)


@triton.jit
def waves(T: tl.constexpr, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """Real and imaginary part of the real transform [T, F], with 1 / sqrt(T)."""
    o_t = tl.arange(0, BT)
    o_f = tl.arange(0, BF)
    turn = (o_t[:, None] * o_f[None, :]) % T
    mask = (o_t < T)[:, None] & (o_f < F)[None, :]
    b_angle = turn.to(tl.float32) * (6.283185307179586 / T)
    unit = 1.0 / tl.sqrt_rn(tl.full([1, 1], T, tl.float32))
    b_cos = tl.where(mask, tl.cos(b_angle) * unit, 0.0)
    b_sin = tl.where(mask & (2 * turn != T) & (turn != 0), -tl.sin(b_angle) * unit, 0.0)
    return b_cos, b_sin


@triton.jit
def both(T: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """How often a bin counts in the inverse transform: as its conjugate too, but for the first and the middle one."""
    o_f = tl.arange(0, BF)
    return tl.where((o_f == 0) | (2 * o_f == T), 1.0, 2.0)


@triton.jit
def pair(p_maps, i_map, F: tl.constexpr, BF: tl.constexpr):
    """Real and imaginary map [in, out] and the bias of the real and imaginary result of one complex map."""
    p_map = p_maps + i_map * 2 * (F * F + F)
    b_real = square(p_map, F, F, BF)
    b_imag = square(p_map + F * F, F, F, BF)
    b_rho = line(p_map + 2 * F * F, 1, F, BF)
    b_iota = line(p_map + 2 * F * F + F, 1, F, BF)
    return b_real, b_imag, b_rho - b_iota, b_rho + b_iota


@triton.jit
def store_pair(p_sum, b_dre, b_dim, b_re, b_im, F: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of a complex map's parameters from those of its results and from what it was given."""
    o_f = tl.arange(0, BF)
    t_re, t_im = tl.trans(b_re), tl.trans(b_im)
    store_square(p_sum, mul(t_re, b_dre, PRECISION) + mul(t_im, b_dim, PRECISION), F, BF)
    store_square(p_sum + F * F, mul(t_re, b_dim, PRECISION) - mul(t_im, b_dre, PRECISION), F, BF)
    b_sum_re, b_sum_im = tl.sum(b_dre, 0), tl.sum(b_dim, 0)
    tl.store(p_sum + 2 * F * F + o_f, b_sum_re + b_sum_im, mask=o_f < F)
    tl.store(p_sum + 2 * F * F + F + o_f, b_sum_im - b_sum_re, mask=o_f < F)


@triton.jit(do_not_specialize=["rows"])
def filter_forward(
    p_image,
    p_text,
    p_maps,
    p_out,
    p_kept,
    rows,
    T: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_t = tl.arange(0, BT)
    o_f = tl.arange(0, BF)
    mask = (o_r < rows)[:, None] & (o_t < T)[None, :]
    m_f = (o_r < rows)[:, None] & (o_f < F)[None, :]
    o_element = o_r.to(tl.int64)[:, None] * T + o_t[None, :]
    o_bin = o_r.to(tl.int64)[:, None] * F + o_f[None, :]
    size = tl.cast(rows, tl.int64) * F
    b_cos, b_sin = waves(T, F, BT, BF)
    b_sre = tl.zeros([BR, BF], tl.float32)
    b_sim = tl.zeros([BR, BF], tl.float32)
    for i_map in range(2):
        p_stream = p_image
        if i_map == 1:
            p_stream = p_text
        b_r = tl.load(p_stream + o_element, mask=mask, other=0.0).to(tl.float32)
        b_re, b_im = mul(b_r, b_cos, EXACT), mul(b_r, b_sin, EXACT)
        b_real, b_imag, b_low, b_high = pair(p_maps, i_map, F, BF)
        b_cre = mul(b_re, b_real, PRECISION) - mul(b_im, b_imag, PRECISION) + b_low[None, :]
        b_cim = mul(b_re, b_imag, PRECISION) + mul(b_im, b_real, PRECISION) + b_high[None, :]
        p_here = p_kept + i_map * 4 * size + o_bin
        tl.store(p_here, b_re, mask=m_f)
        tl.store(p_here + size, b_im, mask=m_f)
        tl.store(p_here + 2 * size, b_cre, mask=m_f)
        tl.store(p_here + 3 * size, b_cim, mask=m_f)
        b_sre += b_cre * b_re - b_cim * b_im
        b_sim += b_cre * b_im + b_cim * b_re
    b_real, b_imag, b_low, b_high = pair(p_maps, 2, F, BF)
    b_count = both(T, F, BF)[None, :]
    b_jre = (mul(b_sre, b_real, PRECISION) - mul(b_sim, b_imag, PRECISION) + b_low[None, :]) * b_count
    b_jim = (mul(b_sre, b_imag, PRECISION) + mul(b_sim, b_real, PRECISION) + b_high[None, :]) * b_count
    b_out = mul(b_jre, tl.trans(b_cos), EXACT) + mul(b_jim, tl.trans(b_sin), EXACT)
    tl.store(p_out + o_element, b_out, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def filter_backward(
    p_grad,
    p_maps,
    p_kept,
    p_dstream,
    p_sums,
    rows,
    T: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """One stream and its map; with the first stream also the joint map."""
    i_map = tl.program_id(1)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_t = tl.arange(0, BT)
    o_f = tl.arange(0, BF)
    mask = (o_r < rows)[:, None] & (o_t < T)[None, :]
    m_f = (o_r < rows)[:, None] & (o_f < F)[None, :]
    o_element = o_r.to(tl.int64)[:, None] * T + o_t[None, :]
    size = tl.cast(rows, tl.int64) * F
    p_kept += o_r.to(tl.int64)[:, None] * F + o_f[None, :]
    p_sums += tl.program_id(0).to(tl.int64) * 6 * (F * F + F)
    b_cos, b_sin = waves(T, F, BT, BF)
    b_grad = tl.load(p_grad + o_element, mask=mask, other=0.0).to(tl.float32)
    b_count = both(T, F, BF)[None, :]
    b_djre, b_djim = mul(b_grad, b_cos, EXACT) * b_count, mul(b_grad, b_sin, EXACT) * b_count
    if i_map == 0:
        b_sre = tl.zeros([BR, BF], tl.float32)
        b_sim = tl.zeros([BR, BF], tl.float32)
        for i_other in range(2):
            p_there = p_kept + i_other * 4 * size
            b_re = tl.load(p_there, mask=m_f, other=0.0)
            b_im = tl.load(p_there + size, mask=m_f, other=0.0)
            b_cre = tl.load(p_there + 2 * size, mask=m_f, other=0.0)
            b_cim = tl.load(p_there + 3 * size, mask=m_f, other=0.0)
            b_sre += b_cre * b_re - b_cim * b_im
            b_sim += b_cre * b_im + b_cim * b_re
        store_pair(p_sums + 4 * (F * F + F), b_djre, b_djim, b_sre, b_sim, F, BF, PRECISION)
    b_real, b_imag, _, _ = pair(p_maps, 2, F, BF)
    b_real, b_imag = tl.trans(b_real), tl.trans(b_imag)
    b_dsre = mul(b_djre, b_real, PRECISION) + mul(b_djim, b_imag, PRECISION)
    b_dsim = mul(b_djim, b_real, PRECISION) - mul(b_djre, b_imag, PRECISION)
    p_here = p_kept + i_map * 4 * size
    b_re = tl.load(p_here, mask=m_f, other=0.0)
    b_im = tl.load(p_here + size, mask=m_f, other=0.0)
    b_dcre = b_dsre * b_re + b_dsim * b_im
    b_dcim = b_dsim * b_re - b_dsre * b_im
    store_pair(p_sums + i_map * 2 * (F * F + F), b_dcre, b_dcim, b_re, b_im, F, BF, PRECISION)
    b_cre = tl.load(p_here + 2 * size, mask=m_f, other=0.0)
    b_cim = tl.load(p_here + 3 * size, mask=m_f, other=0.0)
    b_real, b_imag, _, _ = pair(p_maps, i_map, F, BF)
    b_real, b_imag = tl.trans(b_real), tl.trans(b_imag)
    b_dre = b_dsre * b_cre + b_dsim * b_cim
    b_dre += mul(b_dcre, b_real, PRECISION) + mul(b_dcim, b_imag, PRECISION)
    b_dim = b_dsim * b_cre - b_dsre * b_cim
    b_dim += mul(b_dcim, b_real, PRECISION) - mul(b_dcre, b_imag, PRECISION)
    b_back = mul(b_dre, tl.trans(b_cos), EXACT) + mul(b_dim, tl.trans(b_sin), EXACT)
    tl.store(p_dstream + i_map * tl.cast(rows, tl.int64) * T + o_element, b_back, mask=mask)


def _tile(places: int) -> int:
    return max(16, int(triton.next_power_of_2(places)))


def stage(
    stream: torch.Tensor,
    parameters: list[torch.Tensor],
    gate: list[torch.Tensor],
    seed: torch.Tensor | None,
    p: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factor [N, T, H] and, with a gate, the next stream [N, H, T] (else empty), and what backward needs."""
    rows, heads, places = stream.shape
    w = torch.empty(rows, places, heads, dtype=torch.float32, device=stream.device)
    following = w.new_empty(rows, heads, places) if gate else w.new_empty(0)
    kept_here = w.new_empty(5 if gate else 4, rows, heads, places)
    if rows:
        stage_forward[(triton.cdiv(rows, STAGE["BR"]), heads)](
            stream,
            *parameters,
            *(gate or (None,) * 4),
            seed,
            w,
            following if gate else None,
            kept_here,
            rows,
            stream.stride(0),
            stream.stride(1),
            p,
            eps,
            GATES=gate[0].shape[0] if gate else 0,
            H=heads,
            T=places,
            K=parameters[4].shape[1],
            PRECISION="tf32x3",
            BT=_tile(places),
            **STAGE,
        )
    return w, following, kept_here


def stage_gradients(
    d_w: torch.Tensor | None,
    d_next: torch.Tensor | None,
    stream: torch.Tensor,
    parameters: list[torch.Tensor],
    gate: list[torch.Tensor],
    seed: torch.Tensor | None,
    kept_there: torch.Tensor,
    p: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the stream [N, H, T], and of all parameters, one behind the other.

    The order is both maps, their biases, then for each head taps and bias of both convolutions, then the gate's map and
    bias, then the norm's weight and bias.
    """
    rows, heads, places = stream.shape
    taps = parameters[4].shape[1]
    gates = gate[0].shape[0] if gate and d_next is not None else 0
    shared = 2 * places * places + 2 * places
    size = shared + 2 * taps + 2 + ((places + 1) * gates + 2 * places if gates else 0)
    d_stream = torch.empty(rows, heads, places, dtype=torch.float32, device=stream.device)
    blocks = triton.cdiv(rows, STAGE["BR"])
    sums = d_stream.new_empty(blocks, heads, size)
    steps = (0, 0, 0) if d_w is None else (d_w.stride(0), d_w.stride(2), d_w.stride(1))
    if rows:
        stage_backward[(blocks, heads)](
            d_w,
            d_next if gates else None,
            stream,
            *parameters[::2],
            *((gate[0], gate[2]) if gates else (None, None)),
            seed,
            kept_there,
            d_stream,
            sums,
            rows,
            stream.stride(0),
            stream.stride(1),
            *steps,
            p,
            eps,
            GATES=gates,
            SUMS=size,
            H=heads,
            T=places,
            K=taps,
            PRECISION="tf32x3",
            BT=_tile(places),
            **STAGE,
        )
    of_heads = summed(sums[None])[0]
    of_all = of_heads.sum(0)
    ends = shared + 2 * taps + 2
    return d_stream, torch.cat([of_all[:shared], of_heads[:, shared:ends].T.flatten(), of_all[ends:]])


def spectral(image: torch.Tensor, text: torch.Tensor | None, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The joint stream [..., T] of two contiguous ones (or of one in both places), and what backward needs.

    The maps stand one behind the other, each as its real and imaginary matrix and both biases.
    """
    places = image.shape[-1]
    rows, bins = image.numel() // places, places // 2 + 1
    out = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    kept_here = out.new_empty(2, 4, rows, bins)
    if rows:
        filter_forward[(triton.cdiv(rows, FILTER["BR"]),)](
            image,
            image if text is None else text,
            maps,
            out,
            kept_here,
            rows,
            T=places,
            F=bins,
            PRECISION="tf32x3",
            BT=_tile(places),
            BF=_tile(bins),
            **FILTER,
        )
    return out, kept_here


def spectral_gradients(
    grad: torch.Tensor, kept_there: torch.Tensor, maps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both streams [2, ..., T], and of the maps."""
    places = grad.shape[-1]
    rows, bins = kept_there.shape[2:]
    d_streams = torch.empty(2, *grad.shape, dtype=torch.float32, device=grad.device)
    programs = triton.cdiv(rows, FILTER["BR"])
    sums = d_streams.new_empty(programs, maps.numel())
    if rows:
        filter_backward[(programs, 2)](
            grad.contiguous(),
            maps,
            kept_there,
            d_streams,
            sums,
            rows,
            T=places,
            F=bins,
            PRECISION="tf32x3",
            BT=_tile(places),
            BF=_tile(bins),
            **FILTER,
        )
    return d_streams, summed(sums[None])[0]
