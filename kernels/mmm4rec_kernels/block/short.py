# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The block for short sequences, several of them in one tile of 64 places.

Letters: T places of all sequences, E width, H heads, P head dim, G groups, N state, C = E + 2GN channels, K taps; BL,
BP, BN are the places of a tile, and P, N rounded up, BH is H rounded up.

A program takes one head of one tile of neighbouring places, which holds several whole sequences: what lies between two
sequences is masked. Step sizes and the running sums of their decays, a few numbers a place, come from a small kernel of
their own. Forward is one kernel then: the last head of a tile to finish scales what all heads of the tile wrote, which
is still in the cache; the order of arrival changes nothing in the sums. Backward, a tile kernel recomputes convolution
and scan, and leaves the gradients of the convolved columns where the gradients of the raw columns go; the convolution's
own backward then walks along the places and replaces them. Gradients of parameters end in ordered sums: results repeat
bit for bit. With fewer groups than heads each head writes its own share of the gradients of B and C, added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.conv1d import fused as conv1d
from mmm4rec_kernels.launch import kind, precision, tile
from mmm4rec_kernels.sums import sum_rows
from mmm4rec_kernels.tiles import (
    INTERPRETED,
    LOG2E,
    dot,
    exp2,
    softplus,
    store_sum,
)

FORWARD_WARPS = 4
BACKWARD_WARPS = 4
"""Warps of a program. With 8 warps, with tiles of 32 places or with fewer registers it was slower on an H200."""
TILE = 64
"""Places of a tile."""
STEP_ROWS = 64

DENSE = tl.constexpr(0)
LENGTHS = tl.constexpr(1)
WINDOWS = tl.constexpr(2)


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
def search(p_ends, o_row, sequences, DEPTH: tl.constexpr):
    """First and last-plus-one place of the packed sequence of each place; a place behind all is one of its own."""
    low = o_row * 0
    high = low + sequences
    for _ in range(DEPTH):
        middle = (low + high + 1) // 2
        inside = tl.load(p_ends + middle).to(tl.int32) <= o_row
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle - 1)
    behind = low >= sequences
    o_first = tl.where(behind, o_row, tl.load(p_ends + low).to(tl.int32))
    o_stop = tl.where(behind, o_row, tl.load(p_ends + tl.minimum(low + 1, sequences)).to(tl.int32))
    return o_first, o_stop


@triton.jit
def tile_start(i_tile, length, per_tile, MODE: tl.constexpr):
    """First row of a tile."""
    if MODE == WINDOWS:
        return i_tile * per_tile
    else:
        return i_tile * (per_tile * length)


@triton.jit
def spans(i_tile, base, o_l, p_ends, p_places, rows, sequences, length, per_tile, magic, MODE: tl.constexpr):
    """For each place of a tile: is it written here, is it in a sequence, the place in the tile where that starts."""
    if MODE == WINDOWS:
        m_row = o_l < rows - base
        o_first = tl.load(p_places + base + o_l, mask=m_row, other=-1) - base
        o_stop = tl.load(p_places + rows + base + o_l, mask=m_row, other=-1) - base
        m_out = m_row & (o_first >= 0) & (o_first < per_tile)
    else:
        o_seq = (o_l * magic) >> 16
        o_first = o_seq * length
        o_stop = o_first + length
        m_out = (o_seq < per_tile) & (o_l < rows - base)
        if MODE == LENGTHS:
            o_stop = o_first + tl.load(p_ends + i_tile * per_tile + o_seq, mask=m_out, other=0).to(tl.int32)
    return m_out, m_out & (o_l < o_stop), o_first


@triton.jit
def block_steps(
    p_dt,
    p_factor,
    p_A_log,
    p_dt_bias,
    p_ends,
    p_places,
    p_steps,
    rows,
    sequences,
    length,
    per_tile,
    magic,
    factor_batch,
    factor_row,
    factor_head,
    ROW: tl.constexpr,
    H: tl.constexpr,
    MODE: tl.constexpr,
    DEPTH: tl.constexpr,
    BL: tl.constexpr,
    BH: tl.constexpr,
):
    """Step sizes, and running sums of base-2 logarithms of decays over the tile in two parts: [3, H, T]."""
    i_tile = tl.program_id(0)
    o_l = tl.arange(0, BL)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    base = tile_start(i_tile, length, per_tile, MODE)
    if MODE == WINDOWS:
        o_first, o_stop = search(p_ends, base + o_l, sequences, DEPTH)
        m_out = (o_first >= base) & (o_first < base + per_tile) & (o_l < rows - base)
        m_in = m_out & (base + o_l < o_stop)
        tl.store(p_places + base + o_l, o_first, mask=m_out)
        tl.store(p_places + rows + base + o_l, o_stop, mask=m_out)
    else:
        m_out, m_in, o_first = spans(
            i_tile, base, o_l, p_ends, p_places, rows, sequences, length, per_tile, magic, MODE
        )
    m_tile = m_in[:, None] & m_h[None, :]
    first = tl.cast(base, tl.int64)
    b_dt = tl.load(p_dt + (first + o_l)[:, None] * ROW + o_h[None, :], mask=m_tile, other=0.0).to(tl.float32)
    if p_factor is not None:
        if MODE <= LENGTHS:
            o_seq = (o_l * magic) >> 16
            o_factor = (i_tile * per_tile + o_seq).to(tl.int64) * factor_batch + (o_l - o_first) * factor_row
        else:
            o_factor = (first + o_l) * factor_row
        p_at = p_factor + o_factor[:, None] + o_h[None, :] * factor_head
        b_dt *= tl.load(p_at, mask=m_tile, other=0.0).to(tl.float32)
    b_dt += tl.load(p_dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_step = tl.where(m_tile, softplus(b_dt), 0.0)
    b_A = -tl.exp(tl.load(p_A_log + o_h, mask=m_h, other=0.0).to(tl.float32))
    b_total = tl.cumsum(b_step.to(tl.float64) * (b_A.to(tl.float64) * LOG2E)[None, :], 0)
    b_high = b_total.to(tl.float32)
    b_low = (b_total - b_high.to(tl.float64)).to(tl.float32)
    p_to = p_steps + o_h.to(tl.int64)[None, :] * rows + (first + o_l)[:, None]
    m_tile = m_out[:, None] & m_h[None, :]
    plane = tl.cast(rows, tl.int64) * H
    tl.store(p_to, b_step, mask=m_tile)
    tl.store(p_to + plane, b_high, mask=m_tile)
    tl.store(p_to + 2 * plane, b_low, mask=m_tile)


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
    return tl.load(p_in + (o_l - BACK)[:, None] * ROW + o_c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def convolve(
    p_in, p_weight, p_bias, o_l, o_first, m_in, o_c, m_c, ROW: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr
):
    """The convolution before SiLU, [BL, columns]."""
    b_sum = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(TAPS):
        b_in = place_before(p_in, o_l, o_first, m_in, o_c, m_c, ROW, back)
        b_sum += b_in * taps_of(p_weight, o_c, m_c, C, TAPS, back)[None, :]
    return b_sum


@triton.jit
def block_forward(
    p_z,
    p_x,
    p_c,
    p_weight,
    p_bias,
    p_D,
    p_norm,
    p_ends,
    p_places,
    p_steps,
    p_out,
    p_scale,
    p_squares,
    p_arrived,
    rows,
    sequences,
    length,
    per_tile,
    magic,
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
    MODE: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    E: tl.constexpr = H * P
    CHANNELS: tl.constexpr = E + 2 * G * N
    i_h = tl.program_id(0)
    i_tile = tl.program_id(1)
    o_l = tl.arange(0, BL)
    base = tile_start(i_tile, length, per_tile, MODE)
    m_out, m_in, o_first = spans(i_tile, base, o_l, p_ends, p_places, rows, sequences, length, per_tile, magic, MODE)
    first = tl.cast(base, tl.int64)
    p_z += first * ROW_Z
    p_x += first * ROW_X
    p_c += first * ROW_C
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    at_x = i_h * P
    at_B = E + (i_h // (H // G)) * N
    at_C = at_B + G * N

    plane = tl.cast(rows, tl.int64) * H
    p_steps += tl.cast(i_h, tl.int64) * rows + first
    p_B = p_x + X_AT + at_B
    p_C = p_c + C_AT + (at_B - E)
    b_B = convolve(p_B, p_weight + at_B, p_bias + at_B, o_l, o_first, m_in, o_n, m_n, ROW_X, CHANNELS, TAPS)
    b_C = convolve(p_C, p_weight + at_C, p_bias + at_C, o_l, o_first, m_in, o_n, m_n, ROW_C, CHANNELS, TAPS)
    b_B *= sigmoid(b_B)
    b_C *= sigmoid(b_C)
    b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION) * decays(p_steps + plane, plane, o_l, o_first, m_out, BL)
    p_xh = p_x + X_AT + at_x
    b_x = convolve(p_xh, p_weight + at_x, p_bias + at_x, o_l, o_first, m_in, o_p, m_p, ROW_X, CHANNELS, TAPS)
    b_x *= sigmoid(b_x)
    b_writes = b_x * tl.load(p_steps + o_l, mask=m_in, other=0.0)[:, None]
    D = tl.load(p_D + i_h).to(tl.float32)
    b_y = dot(b_M, b_writes, KIND, PRECISION)
    if SKIP_DT:
        b_y += D * b_writes
    else:
        b_y += D * b_x
    b_z = tl.load(p_z + at_x + o_l[:, None] * ROW_Z + o_p[None, :], mask=m_in[:, None] & m_p[None, :], other=0.0)
    b_z = b_z.to(tl.float32)
    b_g = b_y * (b_z * sigmoid(b_z))
    p_out += first * E
    p_scale += first
    p_squares += first * H
    tl.store(p_squares + o_l * H + i_h, tl.sum(b_g * b_g, 1), mask=m_out)
    m_tile = m_out[:, None] & m_p[None, :]
    o_tile = o_l[:, None] * E + o_p[None, :]
    tl.store(p_out + at_x + o_tile, b_g.to(p_out.dtype.element_ty), mask=m_tile)
    # The last head of a tile to arrive scales what all of them wrote, still in the cache.
    tl.debug_barrier()
    if tl.atomic_add(p_arrived + i_tile, 1, sem="acq_rel") == H - 1:
        o_h = tl.arange(0, BH)
        m_squares = m_out[:, None] & (o_h < H)[None, :]
        b_squares = tl.load(p_squares + o_l[:, None] * H + o_h[None, :], mask=m_squares, other=0.0)
        b_scale = tl.rsqrt(tl.sum(b_squares, 1) / E + eps)
        tl.store(p_scale + o_l, b_scale, mask=m_out)
        for h in range(H):
            b_norm = tl.load(p_norm + h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
            b_g = tl.load(p_out + h * P + o_tile, mask=m_tile, other=0.0).to(tl.float32)
            b_g = tl.where(m_in[:, None], b_g * b_scale[:, None] * b_norm[None, :], 0.0)
            tl.store(p_out + h * P + o_tile, b_g.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def row_products(p_a, p_b, p_sum, rows, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """Sum of a times b over each row of two contiguous [rows, E] tensors."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_e = tl.arange(0, BE)
    mask = (o_r < rows)[:, None] & (o_e < E)[None, :]
    o_at = o_r.to(tl.int64)[:, None] * E + o_e[None, :]
    b_a = tl.load(p_a + o_at, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + o_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_sum + o_r, tl.sum(b_a * b_b, 1) / E, mask=o_r < rows)


@triton.jit
def block_backward(
    p_z,
    p_x,
    p_c,
    p_weight,
    p_bias,
    p_D,
    p_norm,
    p_ends,
    p_places,
    p_steps,
    p_scale,
    p_products,
    p_grad,
    p_dz,
    p_dx,
    p_dB,
    p_dC,
    p_dsteps,
    p_sums,
    rows,
    sequences,
    length,
    per_tile,
    magic,
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
    MODE: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    E: tl.constexpr = H * P
    CHANNELS: tl.constexpr = E + 2 * G * N
    SHARES: tl.constexpr = H // G
    i_h = tl.program_id(0)
    i_tile = tl.program_id(1)
    i_g = i_h // SHARES
    o_l = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    at_x = i_h * P
    at_B = E + i_g * N
    at_C = at_B + G * N
    base = tile_start(i_tile, length, per_tile, MODE)
    m_out, m_in, o_first = spans(i_tile, base, o_l, p_ends, p_places, rows, sequences, length, per_tile, magic, MODE)
    first = tl.cast(base, tl.int64)
    p_x += first * ROW_X + X_AT
    p_c += first * ROW_C + C_AT + (at_B - E)
    p_dx += first * ROW_DX + X_AT + at_x
    p_dB += (i_h % SHARES).to(tl.int64) * share + first * ROW_DB + DB_AT + i_g * N
    p_dC += (i_h % SHARES).to(tl.int64) * share + first * ROW_DC + DC_AT + i_g * N
    p_dz += first * ROW_DZ + at_x
    plane = tl.cast(rows, tl.int64) * H
    p_steps += tl.cast(i_h, tl.int64) * rows + first
    p_dsteps += tl.cast(i_h, tl.int64) * rows + first
    m_x = m_in[:, None] & m_p[None, :]
    m_x_out = m_out[:, None] & m_p[None, :]
    m_n_out = m_out[:, None] & m_n[None, :]

    b_B = convolve(p_x + at_B, p_weight + at_B, p_bias + at_B, o_l, o_first, m_in, o_n, m_n, ROW_X, CHANNELS, TAPS)
    b_C = convolve(p_c, p_weight + at_C, p_bias + at_C, o_l, o_first, m_in, o_n, m_n, ROW_C, CHANNELS, TAPS)
    b_B *= sigmoid(b_B)
    b_C *= sigmoid(b_C)
    b_decay = decays(p_steps + plane, plane, o_l, o_first, m_out, BL)
    b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION) * b_decay
    b_x = convolve(p_x + at_x, p_weight + at_x, p_bias + at_x, o_l, o_first, m_in, o_p, m_p, ROW_X, CHANNELS, TAPS)
    b_x *= sigmoid(b_x)
    b_step = tl.load(p_steps + o_l, mask=m_in, other=0.0)[:, None]
    b_writes = b_x * b_step
    b_skipped = b_writes if SKIP_DT else b_x
    D = tl.load(p_D + i_h).to(tl.float32)
    b_y = dot(b_M, b_writes, KIND, PRECISION) + D * b_skipped

    b_z = tl.load(p_z + first * ROW_Z + at_x + o_l[:, None] * ROW_Z + o_p[None, :], mask=m_x, other=0.0)
    b_z = b_z.to(tl.float32)
    b_gate = sigmoid(b_z)
    b_grad = tl.load(p_grad + first * E + at_x + o_l[:, None] * E + o_p[None, :], mask=m_x, other=0.0)
    b_grad = b_grad.to(tl.float32)
    b_scale = tl.load(p_scale + first + o_l, mask=m_in, other=0.0)[:, None]
    b_mean = tl.load(p_products + first + o_l, mask=m_in, other=0.0)[:, None]
    b_norm = tl.load(p_norm + at_x + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_normed = b_y * (b_z * b_gate) * b_scale
    p_sums += i_tile.to(tl.int64) * (E + H)
    tl.store(p_sums + at_x + o_p, tl.sum(b_grad * b_normed, 0), mask=m_p)
    b_dy = b_scale * (b_grad * b_norm[None, :] - b_normed * b_mean)
    b_dz = b_dy * b_y * (b_gate * (1.0 + b_z * (1.0 - b_gate)))
    b_dy *= b_z * b_gate
    tl.store(p_dz + o_l[:, None] * ROW_DZ + o_p[None, :], b_dz.to(p_dz.dtype.element_ty), mask=m_x_out)
    store_sum(p_sums + E + i_h, tl.sum(b_dy * b_skipped, 1))

    b_W = dot(b_dy, tl.trans(b_writes), KIND, PRECISION)
    b_between = (b_W * b_M).to(tl.float64)
    b_ends = tl.sum(b_between, 1) - tl.sum(b_between, 0)
    tl.store(p_dsteps + plane + o_l, tl.cumsum(b_ends, 0, reverse=True).to(tl.float32), mask=m_out)
    b_dscores = b_W * b_decay
    b_dC = dot(b_dscores, b_B, KIND, PRECISION)
    tl.store(p_dC + o_l[:, None] * ROW_DC + o_n[None, :], b_dC.to(p_dC.dtype.element_ty), mask=m_n_out)
    b_dB = dot(tl.trans(b_dscores), b_C, KIND, PRECISION)
    tl.store(p_dB + o_l[:, None] * ROW_DB + o_n[None, :], b_dB.to(p_dB.dtype.element_ty), mask=m_n_out)
    b_dwrites = dot(tl.trans(b_M), b_dy, KIND, PRECISION)
    if SKIP_DT:
        b_dwrites += D * b_dy
        b_dx = b_dwrites * b_step
    else:
        b_dx = b_dwrites * b_step + D * b_dy
    tl.store(p_dsteps + o_l, tl.sum(b_dwrites * b_x, 1), mask=m_out)
    tl.store(p_dx + o_l[:, None] * ROW_DX + o_p[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_x_out)


@triton.jit
def block_steps_backward(
    p_dt,
    p_factor,
    p_A_log,
    p_dt_bias,
    p_steps,
    p_dsteps,
    p_ddt,
    p_dfactor,
    p_sums,
    rows,
    length,
    factor_batch,
    factor_row,
    factor_head,
    ROW: tl.constexpr,
    ROW_D: tl.constexpr,
    H: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    """Gradients of dt and the factor, and the sums of those of A_log and dt_bias: [programs, 2, H]."""
    o_row = tl.program_id(0) * BR + tl.arange(0, BR)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    mask = (o_row < rows)[:, None] & m_h[None, :]
    o_at = o_h.to(tl.int64)[None, :] * rows + o_row[:, None]
    b_step = tl.load(p_steps + o_at, mask=mask, other=0.0)
    inside = mask & (b_step > 0.0)
    o_wide = o_row.to(tl.int64)[:, None]
    b_raw = tl.load(p_dt + o_wide * ROW + o_h[None, :], mask=inside, other=0.0).to(tl.float32)
    b_dt = b_raw
    if p_factor is not None:
        o_factor = (o_row // length).to(tl.int64) * factor_batch + (o_row % length) * factor_row
        b_factor = tl.load(p_factor + o_factor[:, None] + o_h[None, :] * factor_head, mask=inside, other=0.0)
        b_factor = b_factor.to(tl.float32)
        b_dt *= b_factor
    b_dt += tl.load(p_dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    A = -tl.exp(tl.load(p_A_log + o_h, mask=m_h, other=0.0).to(tl.float32))[None, :]
    b_da = tl.load(p_dsteps + tl.cast(rows, tl.int64) * H + o_at, mask=inside, other=0.0)
    b_ddt = tl.load(p_dsteps + o_at, mask=inside, other=0.0) + b_da * A
    b_ddt = tl.where(inside, b_ddt * sigmoid(b_dt), 0.0)
    p_sums += tl.program_id(0) * (2 * H) + o_h
    tl.store(p_sums, tl.sum(b_da * b_step * A, 0), mask=m_h)
    tl.store(p_sums + H, tl.sum(b_ddt, 0), mask=m_h)
    if p_factor is not None:
        p_to = p_dfactor + o_wide * H + o_h[None, :]
        tl.store(p_to, (b_ddt * b_raw).to(p_dfactor.dtype.element_ty), mask=mask)
        b_ddt *= b_factor
    tl.store(p_ddt + o_wide * ROW_D + o_h[None, :], b_ddt.to(p_ddt.dtype.element_ty), mask=mask)


def _flat(t: torch.Tensor) -> torch.Tensor:
    """[B, L, columns] whose places are a fixed distance apart, over all sequences."""
    return t if t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1) else t.contiguous()


def _tiling(
    projected: torch.Tensor, ends: torch.Tensor | None, packed: bool, longest: int
) -> tuple[int, dict[str, int]]:
    """Tiles, and the launch parameters that say where sequences lie."""
    batch, length = projected.shape[:2]
    rows = batch * length
    if packed and ends is not None:
        sequences = ends.numel() - 1
        window = TILE - longest + 1
        tiles = triton.cdiv(rows, window)
        where = {"rows": rows, "sequences": sequences, "length": longest, "per_tile": window}
        mode = 2
    else:
        per_tile = TILE // length
        tiles = triton.cdiv(batch, per_tile)
        where = {"rows": rows, "sequences": batch, "length": length, "per_tile": per_tile}
        mode = 0 if ends is None else 1
    return tiles, where | {"magic": 65536 // where["length"] + 1, "MODE": mode}


def _layout(width: int, states: int, crossing: bool) -> tuple[int, int]:
    """Columns at which x and C start inside their tensors."""
    return (0, 0) if crossing else (width, 2 * width + states)


def _strides(factor: torch.Tensor | None) -> dict[str, int]:
    batch, row, head = (0, 0, 0) if factor is None else factor.stride()
    return {"factor_batch": batch, "factor_row": row, "factor_head": head}


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised output [B, L, E] and what backward needs.

    That is 1/rms [B, L], steps [3, H, T], where the packed sequence of each place lies [2, T], and taps [K, C].

    Places behind the last offset belong to no sequence: the result is 0 there, and so are their gradients.
    """
    batch, length = projected.shape[:2]
    heads, width = A_log.shape[0], norm.shape[0]
    states = (weight.shape[0] - width) // 2
    x_at, C_at = _layout(width, states, z is not None)
    projected = _flat(projected)
    z = projected if z is None else _flat(z)
    C = projected if C is None else _flat(C)
    tiles, where = _tiling(projected, ends, packed, longest)
    rows = batch * length

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=projected.device)

    out, scale = new(batch, length, width, dtype=projected.dtype), new(batch, length)
    taps = weight.t().contiguous()
    steps, squares = new(3, heads, rows), new(rows, heads)
    places = new(*(2, rows) if where["MODE"] == 2 else (0,), dtype=torch.int32)
    if tiles == 0:
        return out, scale, steps, places, taps
    block_steps[(tiles,)](
        projected[..., -heads:],
        factor,
        A_log,
        dt_bias,
        ends,
        places,
        steps,
        **where,
        **_strides(factor),
        ROW=projected.stride(1),
        H=heads,
        DEPTH=where["sequences"].bit_length() if packed else 0,
        BL=TILE,
        BH=triton.next_power_of_2(heads),
        num_warps=2,
    )
    block_forward[(heads, tiles)](
        z,
        projected,
        C,
        taps,
        bias,
        D,
        norm,
        ends,
        places,
        steps,
        out,
        scale,
        squares,
        torch.zeros(tiles, dtype=torch.int32, device=projected.device),
        **where,
        eps=eps,
        H=heads,
        P=width // heads,
        N=states // groups,
        G=groups,
        TAPS=weight.shape[1],
        ROW_Z=z.stride(1),
        ROW_X=projected.stride(1),
        ROW_C=C.stride(1),
        X_AT=x_at,
        C_AT=C_at,
        SKIP_DT=skip_dt,
        BL=TILE,
        BP=tile(width // heads),
        BN=tile(states // groups),
        BH=triton.next_power_of_2(heads),
        KIND=kind(projected.dtype),
        PRECISION=precision(),
        num_warps=FORWARD_WARPS,
        num_stages=1,
    )
    return out, scale, steps, places, taps


def backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    steps: torch.Tensor,
    places: torch.Tensor,
    turned: torch.Tensor,
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

    The parameters' order is taps [C, K], bias [C], norm [E], D [H], A_log [H], dt_bias [H], all float32.
    """
    batch, length = projected.shape[:2]
    rows = batch * length
    heads, width, (channels, taps) = A_log.shape[0], norm.shape[0], weight.shape
    states = (channels - width) // 2
    shares = heads // groups
    x_at, C_at = _layout(width, states, z is not None)
    B_at = x_at + width
    projected = _flat(projected)
    z_in = projected if z is None else _flat(z)
    C_in = projected if C is None else _flat(C)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=projected.device)

    d_projected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    d_z = d_projected if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    d_C = d_projected if C is None else torch.empty_like(C, memory_format=torch.contiguous_format)
    d_factor = new(0) if factor is None else new(batch, length, heads, dtype=factor.dtype)
    d_z_out, d_C_out = new(0) if z is None else d_z, new(0) if C is None else d_C
    tiles, where = _tiling(projected, ends, packed, longest)
    if tiles == 0:
        nothing = torch.zeros(channels * (taps + 1) + width + 3 * heads, device=projected.device)
        return d_projected, d_z_out, d_C_out, d_factor, nothing
    if shares == 1:
        B_target, C_target, where_B, where_C, share = d_projected, d_C, B_at, C_at, 0
    else:
        partial = new(2, shares, rows, states)
        B_target, C_target, where_B, where_C, share = partial[0], partial[1], 0, 0, rows * states
    products, d_steps, sums = new(rows), new(2, heads, rows), new(tiles, width + heads)
    columns = triton.next_power_of_2(width)
    block = max(1, 2048 // columns)
    row_products[(triton.cdiv(rows, block),)](grad, out, products, rows, E=width, BR=block, BE=columns, num_warps=4)
    block_backward[(heads, tiles)](
        z_in,
        projected,
        C_in,
        turned,
        bias,
        D,
        norm,
        ends,
        places,
        steps,
        scale,
        products,
        grad,
        d_z,
        d_projected,
        B_target,
        C_target,
        d_steps,
        sums,
        **where,
        share=share,
        H=heads,
        P=width // heads,
        N=states // groups,
        G=groups,
        TAPS=taps,
        ROW_Z=z_in.stride(1),
        ROW_X=projected.stride(1),
        ROW_C=C_in.stride(1),
        ROW_DZ=d_z.shape[-1],
        ROW_DX=d_projected.shape[-1],
        ROW_DB=B_target.shape[-1],
        ROW_DC=C_target.shape[-1],
        X_AT=x_at,
        C_AT=C_at,
        DB_AT=where_B,
        DC_AT=where_C,
        SKIP_DT=skip_dt,
        BL=TILE,
        BP=tile(width // heads),
        BN=tile(states // groups),
        KIND=kind(projected.dtype),
        PRECISION=precision(),
        num_warps=BACKWARD_WARPS,
        num_stages=1,
    )
    blocks = triton.cdiv(rows, STEP_ROWS)
    step_sums = new(blocks, 2 * heads)
    block_steps_backward[(blocks,)](
        projected[..., -heads:],
        factor,
        A_log,
        dt_bias,
        steps,
        d_steps,
        d_projected[..., -heads:],
        d_factor,
        step_sums,
        rows,
        length,
        **_strides(factor),
        ROW=projected.stride(1),
        ROW_D=d_projected.shape[-1],
        H=heads,
        BR=STEP_ROWS,
        BH=triton.next_power_of_2(heads),
        num_warps=2,
    )
    if shares > 1:
        d_projected[..., B_at : B_at + states] = partial[0].sum(0).view(batch, length, states)
        d_C[..., C_at : C_at + states] = partial[1].sum(0).view(batch, length, states)
    # The gradients of the convolved columns lie where those of the raw ones go; each is read before it is replaced.
    flat = new(channels * (taps + 1) + width + 3 * heads)
    cuts = ((x_at, 0, channels),) if C is None else ((0, 0, width + states), (0, width + states, channels))
    for (at, start, end), source, target in zip(cuts, (projected, C_in), (d_projected, d_C), strict=False):
        raw, grads = (t[..., at : at + end - start] for t in (source, target))
        partial = conv1d.backward_sums(
            grads, raw, weight[start:end], bias[start:end], ends, packed, longest, True, grads
        )
        if C is None:
            sum_rows(partial, flat)
        else:
            sum_rows(partial[:, : (end - start) * taps], flat[start * taps :])
            sum_rows(partial[:, (end - start) * taps :], flat[channels * taps + start :])
    rest = flat[channels * (taps + 1) :]
    sum_rows(sums, rest)
    sum_rows(step_sums, rest[width + heads :])
    return d_projected, d_z_out, d_C_out, d_factor, flat
