# Triton kernels carry no Python types, and their arguments are explained in `short`.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What a program does with one head of a tile of places, in pieces. Letters as in `short`."""

from __future__ import annotations

import triton
import triton.language as tl

from mmm4rec_kernels.tiles import INTERPRETED, LOG2E, dot, exp2, step_gradients, with_skip


@triton.jit
def sigmoid(v):
    """1 / (1 + e^-v) to a few units in the last place.

    Impure, so that no layout conversion is moved over it: in the layout of a matrix operand every warp would repeat
    the whole tile.
    """
    u = 1.0 + exp2(v * -LOG2E)
    if INTERPRETED:
        return 1.0 / u
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, is_pure=False, pack=1)


@triton.jit
def wide(b):
    """The tile as float32; two bfloat16 numbers of a word in one instruction each, where Triton takes two."""
    if INTERPRETED or b.dtype != tl.bfloat16:
        return b.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [b], dtype=tl.float32, is_pure=True, pack=2
        )


@triton.jit
def decays(p_high, plane, o_l, o_first, m_out, BL: tl.constexpr):
    """2^(sum over (s, t]) for s <= t of one sequence, else 0, from running sums in two parts."""
    o_t = o_l[:, None]
    o_s = o_l[None, :]
    b_high = tl.load(p_high + o_l, mask=m_out, other=0.0)
    b_low = tl.load(p_high + plane + o_l, mask=m_out, other=0.0)
    between = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    # A place behind the last row has no sum: what lies between it and another would be no decay but growth without end.
    within = m_out[:, None] & (o_t >= o_s) & (o_s >= o_first[:, None])
    return exp2(tl.where(within, between, float("-inf")))


@triton.jit
def taps_of(p_weight, o_c, m_c, C: tl.constexpr, TAPS: tl.constexpr, BACK: tl.constexpr):
    """Taps [columns] for the place BACK places before the present one."""
    return tl.load(p_weight + (TAPS - 1 - BACK) * C + o_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def place_before(p_in, o_l, o_first, m_in, o_c, m_c, ROW: tl.constexpr, BACK: tl.constexpr):
    """Raw columns [BL, columns] of the place BACK places before each."""
    mask = (m_in & (o_l - BACK >= o_first))[:, None] & m_c[None, :]
    return wide(tl.load(p_in + (o_l - BACK)[:, None] * ROW + o_c[None, :], mask=mask, other=0.0))


@triton.jit
def used(b, o_l, LENGTH: tl.constexpr):
    """The tile, zero in the rows that hold no place: with a known length the compiler leaves their arithmetic out."""
    if LENGTH > 0:
        return tl.where((o_l < o_l.shape[0] // LENGTH * LENGTH)[:, None], b, 0.0)
    else:
        return b


@triton.jit
def convolve(
    p_in,
    p_weight,
    p_bias,
    o_l,
    o_first,
    m_in,
    o_c,
    m_c,
    ROW: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The convolution and SiLU, [BL, columns]."""
    b_sum = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(TAPS):
        b_in = place_before(p_in, o_l, o_first, m_in, o_c, m_c, ROW, back)
        b_sum += b_in * taps_of(p_weight, o_c, m_c, C, TAPS, back)[None, :]
    return used(b_sum * sigmoid(b_sum), o_l, LENGTH)


@triton.jit
def tile_backward(
    i_h,
    base,
    o_l,
    m_out,
    m_in,
    o_first,
    p_z,
    p_x,
    p_c,
    p_weight,
    p_bias,
    p_D,
    p_norm,
    p_steps,
    p_scale,
    p_products,
    p_grad,
    p_dz,
    p_dx,
    p_dB,
    p_dC,
    rows,
    share,
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
    DB_AT: tl.constexpr,
    DC_AT: tl.constexpr,
    LENGTH: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of z and of the convolved columns of one head of a tile.

    Returned are what the tile adds to the gradients of the norm's weights [BP] and, place by place, of D, those of the
    step sizes, the step sizes, and the gradients of the one-step logarithms.
    """
    E: tl.constexpr = H * P
    CHANNELS: tl.constexpr = E + 2 * G * N
    SHARES: tl.constexpr = H // G
    i_g = i_h // SHARES
    o_p = tl.max_contiguous(tl.arange(0, BP), 4)
    o_n = tl.max_contiguous(tl.arange(0, BN), 4)
    m_p = o_p < P
    m_n = o_n < N
    at_x = i_h * P
    at_B = E + i_g * N
    at_C = at_B + G * N
    first = tl.cast(base, tl.int64)
    p_x += first * ROW_X + X_AT
    p_c += first * ROW_C + C_AT + (at_B - E)
    p_dx += first * ROW_DX + X_AT + at_x
    p_dB += (i_h % SHARES).to(tl.int64) * share + first * ROW_DB + DB_AT + i_g * N
    p_dC += (i_h % SHARES).to(tl.int64) * share + first * ROW_DC + DC_AT + i_g * N
    p_dz += first * ROW_DZ + at_x
    plane = tl.cast(rows, tl.int64) * H
    p_steps += tl.cast(i_h, tl.int64) * rows + first
    m_x = m_in[:, None] & m_p[None, :]
    m_x_out = m_out[:, None] & m_p[None, :]
    m_n_out = m_out[:, None] & m_n[None, :]

    b_B = convolve(
        p_x + at_B, p_weight + at_B, p_bias + at_B, o_l, o_first, m_in, o_n, m_n, ROW_X, CHANNELS, TAPS, LENGTH
    )
    b_C = convolve(p_c, p_weight + at_C, p_bias + at_C, o_l, o_first, m_in, o_n, m_n, ROW_C, CHANNELS, TAPS, LENGTH)
    if LENGTH > 0:
        # Early, on its way with the other columns; where masks take registers too there are none left to hold it.
        b_x = convolve(
            p_x + at_x, p_weight + at_x, p_bias + at_x, o_l, o_first, m_in, o_p, m_p, ROW_X, CHANNELS, TAPS, LENGTH
        )
    b_decay = decays(p_steps + plane, plane, o_l, o_first, m_out, BL)
    b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION) * b_decay
    b_step = tl.load(p_steps + o_l, mask=m_in, other=0.0)
    D = tl.load(p_D + i_h).to(tl.float32)
    if LENGTH == 0:
        b_x = convolve(
            p_x + at_x, p_weight + at_x, p_bias + at_x, o_l, o_first, m_in, o_p, m_p, ROW_X, CHANNELS, TAPS, LENGTH
        )
    b_through = with_skip(b_M, b_step, D, SKIP_DT, BL)
    b_y = dot(b_through, b_x, KIND, PRECISION)

    b_z = tl.load(p_z + first * ROW_Z + at_x + o_l[:, None] * ROW_Z + o_p[None, :], mask=m_x, other=0.0)
    b_z = wide(b_z)
    b_gate = sigmoid(b_z)
    b_grad = tl.load(p_grad + first * E + at_x + o_l[:, None] * E + o_p[None, :], mask=m_x, other=0.0)
    b_grad = wide(b_grad)
    b_scale = tl.load(p_scale + first + o_l, mask=m_in, other=0.0)[:, None]
    b_mean = tl.load(p_products + first + o_l, mask=m_in, other=0.0)[:, None]
    b_norm = tl.load(p_norm + at_x + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_normed = b_y * (b_z * b_gate) * b_scale
    b_dnorm = tl.sum(b_grad * b_normed, 0)
    b_dy = b_scale * (b_grad * b_norm[None, :] - b_normed * b_mean)
    b_dz = b_dy * b_y * (b_gate * (1.0 + b_z * (1.0 - b_gate)))
    b_dy = used(b_dy * (b_z * b_gate), o_l, LENGTH)
    b_dz = used(b_dz, o_l, LENGTH)
    tl.store(p_dz + o_l[:, None] * ROW_DZ + o_p[None, :], b_dz.to(p_dz.dtype.element_ty), mask=m_x_out)

    # All that is summed over the head dim is in this product: gradients of steps, decays and skip are sums of it.
    b_W = dot(b_dy, tl.trans(b_x), KIND, PRECISION)
    b_dx = dot(tl.trans(b_through), b_dy, KIND, PRECISION)
    tl.store(p_dx + o_l[:, None] * ROW_DX + o_p[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_x_out)
    b_ends, b_dstep, b_dskip = step_gradients(b_W, b_M, b_step, D, SKIP_DT, BL, KIND, PRECISION)
    b_da = tl.cumsum(b_ends, 0, reverse=True).to(tl.float32)
    b_W *= b_decay * b_step[None, :]
    b_dC = dot(b_W, b_B, KIND, PRECISION)
    tl.store(p_dC + o_l[:, None] * ROW_DC + o_n[None, :], b_dC.to(p_dC.dtype.element_ty), mask=m_n_out)
    b_dB = dot(tl.trans(b_W), b_C, KIND, PRECISION)
    tl.store(p_dB + o_l[:, None] * ROW_DB + o_n[None, :], b_dB.to(p_dB.dtype.element_ty), mask=m_n_out)
    return b_dnorm, b_dskip, b_dstep, b_step, b_da
