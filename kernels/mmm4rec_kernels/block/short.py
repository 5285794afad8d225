# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The block for short sequences, several of them in one tile of 32 places.

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

from mmm4rec_kernels.block import ops
from mmm4rec_kernels.block.ops import SEGMENT, TILE, planned_tiles
from mmm4rec_kernels.launch import kind, precision, processors, tile
from mmm4rec_kernels.sums import sum_rows
from mmm4rec_kernels.tiles import (
    INTERPRETED,
    LOG2E,
    dot,
    exp2,
    softplus,
    step_gradients,
    store_sum,
    with_skip,
)

FORWARD_WARPS = 4
BACKWARD_WARPS = 4
"""Warps of a program."""
FORWARD_REGISTERS = 80
BACKWARD_REGISTERS = 168
"""At most so many for a thread, that more programs run side by side: the kernels wait for what they load and multiply,
not for memory's width. Measured on an H100; with fewer they spill."""
COLUMNS = 512
COLUMN_WARPS = 4
COLUMN_PROGRAMS = 4
"""Of the convolution's backward: columns and warps of a program, and programs for each multiprocessor."""

DENSE = tl.constexpr(0)
LENGTHS = tl.constexpr(1)
PACKED = tl.constexpr(2)


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
def plan_tiles(
    p_ends,
    p_plan,
    p_arrived,
    i_segment,
    rows,
    sequences,
    tiles,
    DEPTH: tl.constexpr,
    BL: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    BT: tl.constexpr,
):
    """First and last-plus-one row of the tiles whose sequences start in one segment of rows; tiles left over are empty.

    A tile takes whole sequences for as long as they fit.
    """
    o_at = tl.arange(0, SEGMENT)
    o_tile = tl.arange(0, BT)
    o_side = tl.arange(0, 2)
    start = i_segment * SEGMENT
    # A tile ends where the first sequence starts that reaches behind it.
    b_end, _ = search(p_ends, tl.minimum(start + o_at + BL, rows), sequences, DEPTH)
    o_before = tl.minimum(start + o_side * SEGMENT, rows) - 1
    _, b_side = search(p_ends, o_before, sequences, DEPTH)
    b_side = tl.where(o_before < 0, 0, tl.maximum(b_side, o_before + 1))
    at = tl.min(b_side, 0)
    stop = tl.max(b_side, 0)
    b_from = tl.zeros([BT], tl.int32)
    b_to = tl.zeros([BT], tl.int32)
    i_tile = 0
    while at < stop:
        end = tl.minimum(tl.max(tl.where(start + o_at == at, b_end, 0), 0), stop)
        b_from = tl.where(o_tile == i_tile, at, b_from)
        b_to = tl.where(o_tile == i_tile, end, b_to)
        # Where max_length says too little, no tile holds the sequence: leave it out rather than stay here for ever.
        at = tl.where(end > at, end, stop)
        i_tile += 1
    o_tile += i_segment * TILES
    m_tile = o_tile < (i_segment + 1) * TILES
    tl.store(p_plan + o_tile, b_from, mask=m_tile)
    tl.store(p_plan + tiles + o_tile, b_to, mask=m_tile)
    tl.store(p_arrived + o_tile, tl.zeros([BT], tl.int32), mask=m_tile)


@triton.jit
def is_empty(i_tile, p_places, rows, tiles):
    """Whether a tile of the plan holds no sequence."""
    return tl.load(p_places + rows + i_tile) >= tl.load(p_places + rows + tiles + i_tile)


@triton.jit
def places_of(
    i_tile,
    o_l,
    p_ends,
    p_places,
    rows,
    tiles,
    length,
    per_tile,
    magic,
    MODE: tl.constexpr,
    LENGTH: tl.constexpr = 0,
):
    """First row of a tile, and for each place: is it written here, is it in a sequence, the place where that starts."""
    if MODE == PACKED:
        base = tl.load(p_places + rows + i_tile)
        m_out = o_l < tl.load(p_places + rows + tiles + i_tile) - base
        o_first = tl.load(p_places + base + o_l, mask=m_out, other=-1)
        m_in = o_first >= 0
        o_first = tl.where(m_in, o_first - base, o_l)
    elif o_l.shape[0] // 2 < LENGTH:
        base = i_tile * LENGTH
        m_out = o_l < LENGTH
        o_first = o_l * 0
        m_in = m_out
        if MODE == LENGTHS:
            m_in = m_out & (o_l < tl.load(p_ends + i_tile).to(tl.int32))
    else:
        if LENGTH > 0:
            length = LENGTH
            per_tile = o_l.shape[0] // LENGTH
            magic = 65536 // LENGTH + 1
        base = i_tile * (per_tile * length)
        o_seq = (o_l * magic) >> 16
        m_out = (o_seq < per_tile) & (o_l < rows - base)
        o_first = o_seq * length
        o_stop = o_first + length
        if MODE == LENGTHS:
            o_stop = o_first + tl.load(p_ends + i_tile * per_tile + o_seq, mask=m_out, other=0).to(tl.int32)
        m_in = m_out & (o_l < o_stop)
    return base, m_out, m_in, o_first


@triton.jit
def factor_places(i_tile, base, o_l, o_first, per_tile, magic, factor_batch, factor_row, MODE: tl.constexpr):
    """Where the time factor of each place lies."""
    if MODE == PACKED:
        return (tl.cast(base, tl.int64) + o_l) * factor_row
    else:
        return (i_tile * per_tile + ((o_l * magic) >> 16)).to(tl.int64) * factor_batch + (o_l - o_first) * factor_row


@triton.jit(do_not_specialize=["rows", "sequences", "tiles", "factor_batch"])
def block_steps(
    p_dt,
    p_factor,
    p_A_log,
    p_dt_bias,
    p_ends,
    p_places,
    p_steps,
    p_arrived,
    rows,
    sequences,
    tiles,
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
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    BT: tl.constexpr,
):
    """Step sizes, and running sums of base-2 logarithms of decays in two parts: [3, H, T].

    The sums run over neighbouring places, at least from the start of each sequence on. Packed, a program takes the
    sequences that start in a window of `per_tile` rows, and some programs more plan the tiles.
    """
    i_tile = tl.program_id(0)
    if MODE == PACKED:
        i_segment = i_tile - tl.cdiv(rows, per_tile)
        if i_segment >= 0:
            p_plan = p_places + rows
            plan_tiles(p_ends, p_plan, p_arrived, i_segment, rows, sequences, tiles, DEPTH, TILE, SEGMENT, TILES, BT)
            return
    o_l = tl.arange(0, BL)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    if MODE == PACKED:
        base = i_tile * per_tile
        o_first, o_stop = search(p_ends, base + o_l, sequences, DEPTH)
        m_out = (o_first >= base) & (o_first < base + per_tile) & (o_l < rows - base)
        m_in = m_out & (base + o_l < o_stop)
        tl.store(p_places + base + o_l, tl.where(m_in, o_first, -1), mask=m_out)
    else:
        tl.store(p_arrived + i_tile, 0)
        base, m_out, m_in, o_first = places_of(
            i_tile, o_l, p_ends, p_places, rows, tiles, length, per_tile, magic, MODE
        )
    m_tile = m_in[:, None] & m_h[None, :]
    first = tl.cast(base, tl.int64)
    b_dt = tl.load(p_dt + (first + o_l)[:, None] * ROW + o_h[None, :], mask=m_tile, other=0.0).to(tl.float32)
    if p_factor is not None:
        o_factor = factor_places(i_tile, base, o_l, o_first, per_tile, magic, factor_batch, factor_row, MODE)
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


@triton.jit(do_not_specialize=["rows", "tiles"])
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
    tiles,
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
    LENGTH: tl.constexpr,
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
    base, m_out, m_in, o_first = places_of(
        i_tile, o_l, p_ends, p_places, rows, tiles, length, per_tile, magic, MODE, LENGTH
    )
    if MODE == PACKED:
        if is_empty(i_tile, p_places, rows, tiles):
            return
    first = tl.cast(base, tl.int64)
    p_z += first * ROW_Z
    p_x += first * ROW_X
    p_c += first * ROW_C
    o_p = tl.max_contiguous(tl.arange(0, BP), 4)
    o_n = tl.max_contiguous(tl.arange(0, BN), 4)
    m_p = o_p < P
    m_n = o_n < N
    at_x = i_h * P
    at_B = E + (i_h // (H // G)) * N
    at_C = at_B + G * N

    plane = tl.cast(rows, tl.int64) * H
    p_steps += tl.cast(i_h, tl.int64) * rows + first
    p_B = p_x + X_AT + at_B
    p_C = p_c + C_AT + (at_B - E)
    b_B = convolve(p_B, p_weight + at_B, p_bias + at_B, o_l, o_first, m_in, o_n, m_n, ROW_X, CHANNELS, TAPS, LENGTH)
    b_C = convolve(p_C, p_weight + at_C, p_bias + at_C, o_l, o_first, m_in, o_n, m_n, ROW_C, CHANNELS, TAPS, LENGTH)
    p_xh = p_x + X_AT + at_x
    b_x = convolve(p_xh, p_weight + at_x, p_bias + at_x, o_l, o_first, m_in, o_p, m_p, ROW_X, CHANNELS, TAPS, LENGTH)
    b_step = tl.load(p_steps + o_l, mask=m_in, other=0.0)
    D = tl.load(p_D + i_h).to(tl.float32)
    b_decay = decays(p_steps + plane, plane, o_l, o_first, m_out, BL)
    b_M = with_skip(dot(b_C, tl.trans(b_B), KIND, PRECISION) * b_decay, b_step, D, SKIP_DT, BL)
    b_y = dot(b_M, b_x, KIND, PRECISION)
    b_z = tl.load(p_z + at_x + o_l[:, None] * ROW_Z + o_p[None, :], mask=m_in[:, None] & m_p[None, :], other=0.0)
    b_z = wide(b_z)
    b_g = used(b_y * (b_z * sigmoid(b_z)), o_l, LENGTH)
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
        for h in tl.range(0, H, loop_unroll_factor=4):
            b_norm = tl.load(p_norm + h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
            b_g = wide(tl.load(p_out + h * P + o_tile, mask=m_tile, other=0.0))
            b_g = tl.where(m_in[:, None], b_g * b_scale[:, None] * b_norm[None, :], 0.0)
            tl.store(p_out + h * P + o_tile, b_g.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows"])
def row_products(p_a, p_b, p_sum, rows, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """Sum of a times b over each row of two contiguous [rows, E] tensors."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_e = tl.arange(0, BE)
    mask = (o_r < rows)[:, None] & (o_e < E)[None, :]
    o_at = o_r.to(tl.int64)[:, None] * E + o_e[None, :]
    b_a = wide(tl.load(p_a + o_at, mask=mask, other=0.0))
    b_b = wide(tl.load(p_b + o_at, mask=mask, other=0.0))
    tl.store(p_sum + o_r, tl.sum(b_a * b_b, 1) / E, mask=o_r < rows)


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


@triton.jit(do_not_specialize=["rows", "tiles"])
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
    tiles,
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
    LENGTH: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    E: tl.constexpr = H * P
    i_h = tl.program_id(0)
    i_tile = tl.program_id(1)
    o_l = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    base, m_out, m_in, o_first = places_of(
        i_tile, o_l, p_ends, p_places, rows, tiles, length, per_tile, magic, MODE, LENGTH
    )
    p_sums += i_tile.to(tl.int64) * (E + 3 * H)
    p_norms = p_sums + i_h * P + o_p
    if MODE == PACKED:
        if is_empty(i_tile, p_places, rows, tiles):
            tl.store(p_norms, tl.zeros([BP], tl.float32), mask=o_p < P)
            tl.store(p_sums + E + i_h, 0.0)
            return
    b_dnorm, b_dskip, b_dstep, _, b_da = tile_backward(
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
        H,
        P,
        N,
        G,
        TAPS,
        ROW_Z,
        ROW_X,
        ROW_C,
        ROW_DZ,
        ROW_DX,
        ROW_DB,
        ROW_DC,
        X_AT,
        C_AT,
        DB_AT,
        DC_AT,
        LENGTH,
        SKIP_DT,
        BL,
        BP,
        BN,
        KIND,
        PRECISION,
    )
    tl.store(p_norms, b_dnorm, mask=o_p < P)
    store_sum(p_sums + E + i_h, b_dskip)
    p_dsteps += tl.cast(i_h, tl.int64) * rows + base
    tl.store(p_dsteps + o_l, b_dstep, mask=m_out)
    tl.store(p_dsteps + tl.cast(rows, tl.int64) * H + o_l, b_da, mask=m_out)


@triton.jit
def row_at(p, t, o_c, m_c, inside, ROW: tl.constexpr):
    """Columns of one row, zero if that is not inside."""
    return wide(tl.load(p + t * ROW + o_c, mask=m_c & inside, other=0.0))


@triton.jit(do_not_specialize=["rows", "tiles"])
def columns_backward(
    p_in,
    p_weight,
    p_bias,
    p_ends,
    p_places,
    p_d,
    p_sums,
    rows,
    tiles,
    length,
    per_tile,
    magic,
    at,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    ROW: tl.constexpr,
    ROW_D: tl.constexpr,
    MODE: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
):
    """The convolution backward along the rows of every S-th tile: gradients of convolved columns become those of raw.

    Shares of the gradients of taps [C, K] and bias [C] go to sums, one behind the other [S, CK + C].
    """
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    p_weight += at + o_c
    b_bias = tl.load(p_bias + at + o_c, mask=m_c, other=0.0).to(tl.float32)
    w_0 = tl.load(p_weight + (TAPS - 1) * CHANNELS, mask=m_c, other=0.0).to(tl.float32)
    w_1 = tl.load(p_weight + (TAPS - 2) * CHANNELS, mask=m_c, other=0.0).to(tl.float32)
    w_2 = tl.load(p_weight + (TAPS - 3) * CHANNELS, mask=m_c & (TAPS > 2), other=0.0).to(tl.float32)
    w_3 = tl.load(p_weight + (TAPS - 4) * CHANNELS, mask=m_c & (TAPS > 3), other=0.0).to(tl.float32)
    sum_0 = tl.zeros([BC], tl.float32)
    sum_1 = tl.zeros([BC], tl.float32)
    sum_2 = tl.zeros([BC], tl.float32)
    sum_3 = tl.zeros([BC], tl.float32)
    sum_bias = tl.zeros([BC], tl.float32)
    for i_tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        if MODE == PACKED:
            base = tl.load(p_places + rows + i_tile)
            count = tl.load(p_places + rows + tiles + i_tile) - base
        else:
            base = i_tile * (per_tile * length)
            count = tl.minimum(per_tile * length, rows - base)
        p_x = p_in + tl.cast(base, tl.int64) * ROW
        p_g = p_d + tl.cast(base, tl.int64) * ROW_D
        b_1 = tl.zeros([BC], tl.float32)
        b_2 = tl.zeros([BC], tl.float32)
        b_3 = tl.zeros([BC], tl.float32)
        d_1 = tl.zeros([BC], tl.float32)
        d_2 = tl.zeros([BC], tl.float32)
        d_3 = tl.zeros([BC], tl.float32)
        # Three rows more, so that the last gradients leave; they are whole when TAPS - 1 rows behind them were seen.
        for t in tl.range(0, tl.where(count > 0, count + TAPS - 1, 0), loop_unroll_factor=4):
            if MODE == PACKED:
                first = tl.load(p_places + base + t, mask=t < count, other=-1)
                inside = first >= 0
                back = base + t - first
            else:
                back = t % length
                inside = t < count
                if MODE == LENGTHS:
                    end = tl.load(p_ends + i_tile * per_tile + t // length, mask=inside, other=0).to(tl.int32)
                    inside = back < end
            b_0 = row_at(p_x, t, o_c, m_c, inside, ROW)
            b_1 = tl.where(back >= 1, b_1, 0.0)
            b_2 = tl.where(back >= 2, b_2, 0.0)
            b_3 = tl.where(back >= 3, b_3, 0.0)
            b_y = b_bias + w_0 * b_0 + w_1 * b_1 + w_2 * b_2 + w_3 * b_3
            b_gate = sigmoid(b_y)
            b_g = row_at(p_g, t, o_c, m_c, inside, ROW_D) * (b_gate * (1.0 + b_y * (1.0 - b_gate)))
            sum_bias += b_g
            sum_0 += b_g * b_0
            sum_1 += b_g * b_1
            sum_2 += b_g * b_2
            sum_3 += b_g * b_3
            d_1 += w_1 * tl.where(back >= 1, b_g, 0.0)
            d_2 += w_2 * tl.where(back >= 2, b_g, 0.0)
            d_3 += w_3 * tl.where(back >= 3, b_g, 0.0)
            b_d = d_3 if TAPS == 4 else d_2 if TAPS == 3 else d_1
            t_d = t - (TAPS - 1)
            tl.store(p_g + t_d * ROW_D + o_c, b_d.to(p_d.dtype.element_ty), mask=m_c & (t_d >= 0))
            d_3 = d_2
            d_2 = d_1
            d_1 = w_0 * b_g
            b_3 = b_2
            b_2 = b_1
            b_1 = b_0
    p_sums += tl.program_id(1).to(tl.int64) * (CHANNELS * (TAPS + 1))
    p_taps = p_sums + (at + o_c) * TAPS + TAPS
    tl.store(p_taps - 1, sum_0, mask=m_c)
    tl.store(p_taps - 2, sum_1, mask=m_c)
    if TAPS > 2:
        tl.store(p_taps - 3, sum_2, mask=m_c)
    if TAPS > 3:
        tl.store(p_taps - 4, sum_3, mask=m_c)
    tl.store(p_sums + CHANNELS * TAPS + at + o_c, sum_bias, mask=m_c)


@triton.jit(do_not_specialize=["rows", "tiles", "factor_batch"])
def block_steps_backward(
    p_dt,
    p_factor,
    p_A_log,
    p_dt_bias,
    p_ends,
    p_places,
    p_steps,
    p_dsteps,
    p_ddt,
    p_dfactor,
    p_sums,
    rows,
    tiles,
    length,
    per_tile,
    magic,
    factor_batch,
    factor_row,
    factor_head,
    ROW: tl.constexpr,
    ROW_D: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    H: tl.constexpr,
    MODE: tl.constexpr,
    BL: tl.constexpr,
    BH: tl.constexpr,
):
    """Gradients of dt and the factor, and the sums over a tile of those of A_log [H] and dt_bias [H]."""
    i_tile = tl.program_id(0)
    o_l = tl.arange(0, BL)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    base, m_out, m_in, o_first = places_of(i_tile, o_l, p_ends, p_places, rows, tiles, length, per_tile, magic, MODE)
    o_row = tl.cast(base, tl.int64) + o_l
    mask = m_out[:, None] & m_h[None, :]
    inside = m_in[:, None] & m_h[None, :]
    o_at = o_h.to(tl.int64)[None, :] * rows + o_row[:, None]
    b_step = tl.load(p_steps + o_at, mask=inside, other=0.0)
    b_raw = tl.load(p_dt + o_row[:, None] * ROW + o_h[None, :], mask=inside, other=0.0).to(tl.float32)
    b_dt = b_raw
    if p_factor is not None:
        o_factor = factor_places(i_tile, base, o_l, o_first, per_tile, magic, factor_batch, factor_row, MODE)
        b_factor = tl.load(p_factor + o_factor[:, None] + o_h[None, :] * factor_head, mask=inside, other=0.0)
        b_factor = b_factor.to(tl.float32)
        b_dt *= b_factor
    b_dt += tl.load(p_dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    A = -tl.exp(tl.load(p_A_log + o_h, mask=m_h, other=0.0).to(tl.float32))[None, :]
    b_da = tl.load(p_dsteps + tl.cast(rows, tl.int64) * H + o_at, mask=inside, other=0.0)
    b_ddt = tl.load(p_dsteps + o_at, mask=inside, other=0.0) + b_da * A
    b_ddt = tl.where(inside, b_ddt * sigmoid(b_dt), 0.0)
    p_sums += i_tile.to(tl.int64) * ROW_SUMS + o_h
    tl.store(p_sums, tl.sum(b_da * b_step * A, 0), mask=m_h)
    tl.store(p_sums + H, tl.sum(b_ddt, 0), mask=m_h)
    if p_factor is not None:
        p_to = p_dfactor + o_row[:, None] * H + o_h[None, :]
        tl.store(p_to, (b_ddt * b_raw).to(p_dfactor.dtype.element_ty), mask=mask)
        b_ddt *= b_factor
    tl.store(p_ddt + o_row[:, None] * ROW_D + o_h[None, :], b_ddt.to(p_ddt.dtype.element_ty), mask=mask)


def _flat(t: torch.Tensor) -> torch.Tensor:
    """[B, L, columns] whose places are a fixed distance apart, over all sequences."""
    return t if t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1) else t.contiguous()


def _tiling(projected: torch.Tensor, ends: torch.Tensor | None, packed: bool, longest: int) -> dict[str, int]:
    """The launch parameters that say where sequences lie, and the places of a tile."""
    batch, length = projected.shape[:2]
    where = {"rows": batch * length, "length": longest, "magic": 65536 // longest + 1, "BL": TILE}
    if packed:
        tiles = planned_tiles(batch * length, longest)
        return where | {"tiles": tiles, "per_tile": 0, "MODE": 2}
    per_tile = TILE // longest
    return where | {"tiles": triton.cdiv(batch, per_tile), "per_tile": per_tile, "MODE": 0 if ends is None else 1}


def _known(where: dict[str, int]) -> int:
    """Places of a sequence if kernels are compiled for them, which spares masks and idle rows; else 0."""
    return where["length"] if where["per_tile"] and where["length"] > ops.SHORT else 0


def _layout(width: int, states: int, crossing: bool) -> tuple[int, int]:
    """Columns at which x and C start inside their tensors."""
    return (0, 0) if crossing else (width, 2 * width + states)


def _strides(factor: torch.Tensor | None) -> dict[str, int]:
    batch, row, head = (0, 0, 0) if factor is None else factor.stride()
    return {"factor_batch": batch, "factor_row": row, "factor_head": head}


def prepare(
    projected: torch.Tensor,
    factor: torch.Tensor | None,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps [3, H, T], where packed sequences and tiles lie, and a zero for each tile.

    Of packed sequences that is, one behind the other, for each place the first of its sequence, and the first and
    last-plus-one place of each tile.
    """
    where = _tiling(projected, ends, packed, longest)
    heads, batch, rows, tiles = A_log.shape[0], projected.shape[0], where["rows"], where["tiles"]
    steps = torch.empty(3, heads, rows, dtype=torch.float32, device=projected.device)
    places, arrived = (
        torch.empty(count, dtype=torch.int32, device=projected.device)
        for count in (rows + 2 * tiles if packed else 0, tiles)
    )
    programs, windows = tiles, where
    plan = {"sequences": batch, "DEPTH": 0, "SEGMENT": 1, "TILES": 1}
    if packed and ends is not None:
        sequences, size = ends.numel() - 1, 2 * tile(longest)
        segments = triton.cdiv(rows, SEGMENT)
        programs = triton.cdiv(rows, size - longest + 1) + segments
        windows = where | {"per_tile": size - longest + 1, "BL": size}
        plan = {
            "sequences": sequences,
            "DEPTH": max(12, sequences.bit_length()),
            "SEGMENT": SEGMENT,
            "TILES": tiles // segments,
        }
    block_steps[(programs,)](
        projected[..., -heads:],
        factor,
        A_log,
        dt_bias,
        ends,
        places,
        steps,
        arrived,
        **windows,
        **plan,
        **_strides(factor),
        ROW=projected.stride(1),
        H=heads,
        TILE=TILE,
        BT=triton.next_power_of_2(plan["TILES"]),
        BH=triton.next_power_of_2(heads),
        num_warps=2,
    )
    return steps, places, arrived


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

    That is 1/rms [B, L], steps [3, H, T], of packed sequences the first row for each place and the plan, taps [K, C].

    Places behind the last offset belong to no sequence: the result is 0 there, and so are their gradients.
    """
    batch, length = projected.shape[:2]
    heads, width = A_log.shape[0], norm.shape[0]
    states = (weight.shape[0] - width) // 2
    x_at, C_at = _layout(width, states, z is not None)
    projected = _flat(projected)
    z = projected if z is None else _flat(z)
    C = projected if C is None else _flat(C)
    where = _tiling(projected, ends, packed, longest)
    rows, tiles = batch * length, where["tiles"]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=projected.device)

    out, scale = new(batch, length, width, dtype=projected.dtype), new(batch, length)
    taps = weight.t().contiguous()
    if rows == 0:
        return out, scale, new(3, heads, 0), new(0, dtype=torch.int32), taps
    steps, places, arrived = prepare(projected, factor, A_log, dt_bias, ends, packed, longest)
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
        new(rows, heads),
        arrived,
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
        LENGTH=_known(where),
        SKIP_DT=skip_dt,
        BP=tile(width // heads),
        BN=tile(states // groups),
        BH=triton.next_power_of_2(heads),
        KIND=kind(projected.dtype),
        PRECISION=precision(),
        num_warps=FORWARD_WARPS,
        maxnreg=FORWARD_REGISTERS,
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
    where = _tiling(projected, ends, packed, longest)
    tiles = where["tiles"]
    if tiles == 0:
        nothing = torch.zeros(channels * (taps + 1) + width + 3 * heads, device=projected.device)
        return d_projected, d_z_out, d_C_out, d_factor, nothing
    if shares == 1:
        B_target, C_target, where_B, where_C, share = d_projected, d_C, B_at, C_at, 0
    else:
        partial = new(2, shares, rows, states)
        B_target, C_target, where_B, where_C, share = partial[0], partial[1], 0, 0, rows * states
    products, d_steps, sums = new(rows), new(2, heads, rows), new(tiles, width + 3 * heads)
    columns = triton.next_power_of_2(width)
    block = max(1, 2048 // columns)
    row_products[(triton.cdiv(rows, block),)](grad, out, products, rows, E=width, BR=block, BE=columns, num_warps=4)
    if shares == 1 and _known(where):
        from mmm4rec_kernels.block import joined

        flat = joined.backward(
            (z_in, projected, C_in),
            factor,
            turned,
            (bias, A_log, D, dt_bias, norm),
            ends,
            (steps, scale, products, grad),
            (d_z, d_projected, d_C, d_factor),
            where,
            (x_at, C_at),
            _known(where),
            skip_dt,
        )
        return d_projected, d_z_out, d_C_out, d_factor, flat
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
        LENGTH=_known(where),
        SKIP_DT=skip_dt,
        BP=tile(width // heads),
        BN=tile(states // groups),
        KIND=kind(projected.dtype),
        PRECISION=precision(),
        num_warps=BACKWARD_WARPS,
        maxnreg=BACKWARD_REGISTERS,
        num_stages=1,
    )
    block_steps_backward[(tiles,)](
        projected[..., -heads:],
        factor,
        A_log,
        dt_bias,
        ends,
        places,
        steps,
        d_steps,
        d_projected[..., -heads:],
        d_factor,
        sums[:, width + heads :],
        **where,
        **_strides(factor),
        ROW=projected.stride(1),
        ROW_D=d_projected.shape[-1],
        ROW_SUMS=sums.shape[1],
        H=heads,
        BH=triton.next_power_of_2(heads),
        num_warps=2,
    )
    if shares > 1:
        d_projected[..., B_at : B_at + states] = partial[0].sum(0).view(batch, length, states)
        d_C[..., C_at : C_at + states] = partial[1].sum(0).view(batch, length, states)
    # The gradients of the convolved columns lie where those of the raw ones go; each is read before it is replaced.
    cuts = ((x_at, 0, channels),) if C is None else ((0, 0, width + states), (0, width + states, channels))
    columns = min(COLUMNS, triton.next_power_of_2(channels))
    splits = min(tiles, max(1, processors(projected) * COLUMN_PROGRAMS * columns // channels))
    partial = new(splits, channels * (taps + 1))
    for (at, start, end), source, target in zip(cuts, (projected, C_in), (d_projected, d_C), strict=False):
        columns_backward[(triton.cdiv(end - start, columns), splits)](
            source[..., at:],
            turned,
            bias,
            ends,
            places,
            target[..., at:],
            partial,
            **where,
            at=start,
            C=end - start,
            CHANNELS=channels,
            TAPS=taps,
            ROW=source.stride(1),
            ROW_D=target.shape[-1],
            BC=columns,
            num_warps=COLUMN_WARPS,
        )
    flat = new(channels * (taps + 1) + width + 3 * heads)
    sum_rows(partial, flat)
    sum_rows(sums, flat[channels * (taps + 1) :])
    return d_projected, d_z_out, d_C_out, d_factor, flat
