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
from mmm4rec_kernels.tiles import INTERPRETED, LOG2E, exp2, reciprocal, sigmoid

STAGE = {"BR": 16, "num_warps": 2}
FILTER = {"BR": 32, "num_warps": 2}
"""Rows and warps of a program; twice as quick backward as 64 rows with 4 warps (H100)."""


@triton.jit
def halves(b):
    """A float32 tile as its nearest TF32 numbers and the rest."""
    b_high = ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return b_high, b - b_high


@triton.jit
def mul(a, b):
    """About the float32 product: the three largest of the four products of TF32 parts, with less ado than "tf32x3"."""
    if INTERPRETED:
        return tl.dot(a, b, input_precision="ieee")
    else:
        a_high, a_low = halves(a)
        b_high, b_low = halves(b)
        b_sum = tl.dot(a_low, b_high, input_precision="tf32")
        b_sum = tl.dot(a_high, b_low, b_sum, input_precision="tf32")
        return tl.dot(a_high, b_high, b_sum, input_precision="tf32")


@triton.jit
def once(b):
    """The tile as it is, but computed once: not again in every register layout in which a product wants it."""
    if INTERPRETED:
        return b
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [b], tl.float32, is_pure=False, pack=1)


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
    b_e = exp2(tl.abs(v) * (-2.0 * LOG2E))
    b_tanh = (1.0 - b_e) * reciprocal(1.0 + b_e)
    return tl.where(s < 0.25, -s * v * b_near, v - tl.where(v < 0.0, -b_tanh, b_tanh))


@triton.jit
def kept(p_seed, o_row, p, BT: tl.constexpr):
    """Which elements of rows o_row dropout keeps [BR, BT], times 1 / (1 - p); four neighbours share a draw."""
    o_draw = o_row.to(tl.int32)[:, None] * (BT // 4) + tl.arange(0, BT // 4)[None, :]
    b_0, b_1, b_2, b_3 = tl.randint4x(tl.load(p_seed), o_draw)
    b_random = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)).reshape(o_row.shape[0], BT).to(tl.int32, bitcast=True)
    least = tl.cast(p * 4294967296.0 - 2147483648.0, tl.int32)
    return once(tl.where(b_random >= least, 1.0 / (1.0 - p), 0.0))


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
def store_taps(p_sum, b_sum, T: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """From the gradient of a banded matrix that of its taps: sums along its diagonals."""
    o_t = tl.arange(0, BT)[:, None]
    o_k = tl.arange(0, BK)[None, :]
    at = o_t + K - 1 - o_k
    m_k = o_k < K
    b_taps = tl.gather(b_sum, tl.where(m_k & (at < BT), at, 0), 1)
    b_taps = tl.sum(tl.where(m_k & (at < T), b_taps, 0.0), 0)
    tl.store(p_sum + tl.arange(0, BK), b_taps, mask=tl.arange(0, BK) < K)


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
    o_row = o_r.to(tl.int64) * H + i_h
    o_element = o_row[:, None] * T + o_t[None, :]
    b_in = b_r
    if p_seed is not None:
        b_in = b_r * kept(p_seed, o_row, p, BT)
    b_a = mul(b_in, square(p_w1, T, T, BT)) + line(p_b1, 1, T, BT)[None, :]
    b_f = mul(b_a * sigmoid(b_a), square(p_w2, T, T, BT)) + line(p_b2, 1, T, BT)[None, :]
    b_u = mul(tanhshrink(b_f) * b_r, banded(p_c1, i_h, T, K, BT)) + tl.load(p_d1 + i_h).to(tl.float32)
    b_y = tl.where(m_t, b_u * sigmoid(b_u), 0.0)
    b_v = mul(b_y, banded(p_c2, i_h, T, K, BT)) + tl.load(p_d2 + i_h).to(tl.float32)
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
            b_in = b_r * kept(p_seed, o_row + rows * H, p, BT)
        if GATES > 1:
            b_gate = sigmoid(mul(b_in, square(p_wg, T, T, BT)) + line(p_bg, 1, T, BT)[None, :])
            tl.store(p_kept + 4 * size + o_element, b_gate, mask=mask)
        else:
            b_gate = tl.sum(b_in * line(p_wg, 1, T, BT)[None, :], 1) + tl.load(p_bg).to(tl.float32)
            b_gate = sigmoid(b_gate)
            tl.store(p_kept + 4 * size + o_row, b_gate, mask=o_r < rows)
            b_gate = b_gate[:, None]
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
    BR: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    i_h = tl.program_id(1)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_t = tl.arange(0, BT)
    m_t = (o_t < T)[None, :]
    mask = (o_r < rows)[:, None] & m_t
    p_sums += (tl.program_id(0) * H + i_h).to(tl.int64) * SUMS
    b_r = tl.load(p_r + o_r.to(tl.int64)[:, None] * r_row + i_h * r_head + o_t[None, :], mask=mask, other=0.0)
    b_r = b_r.to(tl.float32)
    o_row = o_r.to(tl.int64) * H + i_h
    o_element = o_row[:, None] * T + o_t[None, :]
    b_in = b_r
    if p_seed is not None:
        b_keep = kept(p_seed, o_row, p, BT)
        b_in = once(b_r * b_keep)
    b_w1, b_w2 = square(p_w1, T, T, BT), square(p_w2, T, T, BT)
    b_c1, b_c2 = banded(p_c1, i_h, T, K, BT), banded(p_c2, i_h, T, K, BT)
    size = tl.cast(rows, tl.int64) * (H * T)
    b_a = tl.load(p_kept + o_element, mask=mask, other=0.0)
    b_s = once(b_a * sigmoid(b_a))
    b_f = tl.load(p_kept + size + o_element, mask=mask, other=0.0)
    b_g = once(tanhshrink(b_f))
    b_x = once(b_g * b_r)
    b_u = tl.load(p_kept + 2 * size + o_element, mask=mask, other=0.0)
    b_y = once(b_u * sigmoid(b_u))
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
            b_pass = kept(p_seed, o_row + rows * H, p, BT)
            b_through = once(b_r * b_pass)
        if GATES > 1:
            b_gate = tl.load(p_kept + 4 * size + o_element, mask=mask, other=0.0)
        else:
            b_gate = tl.load(p_kept + 4 * size + o_row, mask=o_r < rows, other=0.0)[:, None]
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
        if GATES > 1:
            b_dz = once(b_dz)
            store_square(p_gate, mul(tl.trans(b_through), b_dz), T, BT)
            tl.store(p_gate + T * T + o_t, tl.sum(b_dz, 0), mask=o_t < T)
            b_back = mul(b_dz, tl.trans(square(p_wg, T, T, BT)))
        else:
            b_dz = tl.sum(b_dz, 1)
            tl.store(p_gate + o_t, tl.sum(b_through * b_dz[:, None], 0), mask=o_t < T)
            tl.store(p_gate + T, tl.sum(b_dz, 0))
            b_back = b_dz[:, None] * line(p_wg, 1, T, BT)[None, :]
        if p_seed is not None:
            b_back *= b_pass
        b_dr += b_back
    p_rest = p_sums + 2 * T * T
    b_dv = once(b_dw * silu_slope(b_v))
    store_taps(p_rest + 2 * T + K + 1, mul(tl.trans(b_y), b_dv), T, K, BT, BK)
    tl.store(p_rest + 2 * T + 2 * K + 1, tl.sum(tl.sum(b_dv, 1), 0))
    b_du = mul(b_dv, tl.trans(b_c2)) * silu_slope(b_u)
    b_du = once(tl.where(m_t, b_du, 0.0))
    store_taps(p_rest + 2 * T, mul(tl.trans(b_x), b_du), T, K, BT, BK)
    tl.store(p_rest + 2 * T + K, tl.sum(tl.sum(b_du, 1), 0))
    b_dx = mul(b_du, tl.trans(b_c1))
    b_dr += b_dx * b_g
    b_tanh = b_f - b_g
    b_df = once(b_dx * b_r * b_tanh * b_tanh)
    store_square(p_sums + T * T, mul(tl.trans(b_s), b_df), T, BT)
    tl.store(p_rest + T + o_t, tl.sum(b_df, 0), mask=o_t < T)
    b_da = once(mul(b_df, tl.trans(b_w2)) * silu_slope(b_a))
    store_square(p_sums, mul(tl.trans(b_in), b_da), T, BT)
    tl.store(p_rest + o_t, tl.sum(b_da, 0), mask=o_t < T)
    b_back = mul(b_da, tl.trans(b_w1))
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
    # The nearest quarter of a turn, and series of what is left: at most an eighth.
    quarter = (8 * turn + T) // (2 * T)
    v = (4 * turn - quarter * T).to(tl.float32) * (1.5707963267948966 / T)
    s = v * v
    b_sin = v * (1.0 + s * (-1.0 / 6.0 + s * (1.0 / 120.0 + s * (-1.0 / 5040.0 + s * (1.0 / 362880.0)))))
    b_cos = -1.0 / 720.0 + s * (1.0 / 40320.0 - s * (1.0 / 3628800.0))
    b_cos = 1.0 + s * (-0.5 + s * (1.0 / 24.0 + s * b_cos))
    odd = quarter % 2 == 1
    unit = 1.0 / tl.sqrt_rn(tl.full([1, 1], T, tl.float32))
    b_unit = tl.where(mask, unit, 0.0)
    b_real = tl.where(odd, b_sin, b_cos) * tl.where((quarter == 1) | (quarter == 2), -b_unit, b_unit)
    b_imag = tl.where(odd, b_cos, b_sin) * tl.where((quarter == 2) | (quarter == 3), b_unit, -b_unit)
    return once(b_real), once(b_imag)


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
def store_pair(p_sum, b_dre, b_dim, b_re, b_im, F: tl.constexpr, BF: tl.constexpr):
    """Gradients of a complex map's parameters from those of its results and from what it was given."""
    o_f = tl.arange(0, BF)
    t_re, t_im = tl.trans(b_re), tl.trans(b_im)
    store_square(p_sum, mul(t_re, b_dre) + mul(t_im, b_dim), F, BF)
    store_square(p_sum + F * F, mul(t_re, b_dim) - mul(t_im, b_dre), F, BF)
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
        b_re, b_im = mul(b_r, b_cos), mul(b_r, b_sin)
        b_real, b_imag, b_low, b_high = pair(p_maps, i_map, F, BF)
        b_cre = mul(b_re, b_real) - mul(b_im, b_imag) + b_low[None, :]
        b_cim = mul(b_re, b_imag) + mul(b_im, b_real) + b_high[None, :]
        p_here = p_kept + i_map * 4 * size + o_bin
        tl.store(p_here, b_re, mask=m_f)
        tl.store(p_here + size, b_im, mask=m_f)
        tl.store(p_here + 2 * size, b_cre, mask=m_f)
        tl.store(p_here + 3 * size, b_cim, mask=m_f)
        b_sre += b_cre * b_re - b_cim * b_im
        b_sim += b_cre * b_im + b_cim * b_re
    b_real, b_imag, b_low, b_high = pair(p_maps, 2, F, BF)
    b_count = both(T, F, BF)[None, :]
    b_jre = (mul(b_sre, b_real) - mul(b_sim, b_imag) + b_low[None, :]) * b_count
    b_jim = (mul(b_sre, b_imag) + mul(b_sim, b_real) + b_high[None, :]) * b_count
    b_out = mul(b_jre, tl.trans(b_cos)) + mul(b_jim, tl.trans(b_sin))
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
    b_djre, b_djim = once(mul(b_grad, b_cos) * b_count), once(mul(b_grad, b_sin) * b_count)
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
        store_pair(p_sums + 4 * (F * F + F), b_djre, b_djim, once(b_sre), once(b_sim), F, BF)
    b_real, b_imag, _, _ = pair(p_maps, 2, F, BF)
    b_real, b_imag = tl.trans(b_real), tl.trans(b_imag)
    b_dsre = mul(b_djre, b_real) + mul(b_djim, b_imag)
    b_dsim = mul(b_djim, b_real) - mul(b_djre, b_imag)
    p_here = p_kept + i_map * 4 * size
    b_re = tl.load(p_here, mask=m_f, other=0.0)
    b_im = tl.load(p_here + size, mask=m_f, other=0.0)
    b_dcre = once(b_dsre * b_re + b_dsim * b_im)
    b_dcim = once(b_dsim * b_re - b_dsre * b_im)
    store_pair(p_sums + i_map * 2 * (F * F + F), b_dcre, b_dcim, b_re, b_im, F, BF)
    b_cre = tl.load(p_here + 2 * size, mask=m_f, other=0.0)
    b_cim = tl.load(p_here + 3 * size, mask=m_f, other=0.0)
    b_real, b_imag, _, _ = pair(p_maps, i_map, F, BF)
    b_real, b_imag = tl.trans(b_real), tl.trans(b_imag)
    b_dre = b_dsre * b_cre + b_dsim * b_cim
    b_dre += mul(b_dcre, b_real) + mul(b_dcim, b_imag)
    b_dim = b_dsim * b_cre - b_dsre * b_cim
    b_dim += mul(b_dcim, b_real) - mul(b_dcre, b_imag)
    b_back = mul(b_dre, tl.trans(b_cos)) + mul(b_dim, tl.trans(b_sin))
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
            BT=_tile(places),
            BK=triton.next_power_of_2(taps),
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
            BT=_tile(places),
            BF=_tile(bins),
            **FILTER,
        )
    return d_streams, summed(sums[None])[0]
