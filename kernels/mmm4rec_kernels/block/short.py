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

from mmm4rec_kernels.block.tile import convolve, decays, sigmoid, tile_backward, used, wide
from mmm4rec_kernels.block.tiling import (
    LENGTHS,
    PACKED,
    block_steps_backward,
    is_empty,
    known,
    places_of,
    prepare,
    strides_of,
    tiling,
)
from mmm4rec_kernels.launch import kind, precision, processors, tile
from mmm4rec_kernels.sums import sum_rows
from mmm4rec_kernels.tiles import dot, store_sum, with_skip

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
    base, m_out, m_in, o_first = places_of(i_tile, o_l, p_ends, p_places, rows, tiles, length, per_tile, magic, MODE)
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
        0,
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


def _flat(t: torch.Tensor) -> torch.Tensor:
    """[B, L, columns] whose places are a fixed distance apart, over all sequences."""
    return t if t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1) else t.contiguous()


def _layout(width: int, states: int, crossing: bool) -> tuple[int, int]:
    """Columns at which x and C start inside their tensors."""
    return (0, 0) if crossing else (width, 2 * width + states)


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
    where = tiling(projected, ends, packed, longest)
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
        LENGTH=known(where),
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
    where = tiling(projected, ends, packed, longest)
    tiles = where["tiles"]
    if tiles == 0:
        nothing = torch.zeros(channels * (taps + 1) + width + 3 * heads, device=projected.device)
        return d_projected, d_z_out, d_C_out, d_factor, nothing
    products, columns = new(rows), triton.next_power_of_2(width)
    block = max(1, 2048 // columns)
    row_products[(triton.cdiv(rows, block),)](grad, out, products, rows, E=width, BR=block, BE=columns, num_warps=4)
    length_known = known(where)
    if shares == 1 and length_known:
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
            length_known,
            skip_dt,
        )
        return d_projected, d_z_out, d_C_out, d_factor, flat
    if shares == 1:
        B_target, C_target, where_B, where_C, share = d_projected, d_C, B_at, C_at, 0
    else:
        partial = new(2, shares, rows, states)
        B_target, C_target, where_B, where_C, share = partial[0], partial[1], 0, 0, rows * states
    d_steps, sums = new(2, heads, rows), new(tiles, width + 3 * heads)
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
        **strides_of(factor),
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
