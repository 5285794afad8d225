# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"
"""The backward of `short` as one kernel, where each head has a group of its own.

Letters as in `short`; BC is P + 2N rounded up: the columns of x, B and C that a head reads. A program takes one head of
every S-th tile. It leaves the gradients of the convolved columns where those of the raw ones go, and then walks along
the places, a thread over a few columns, and replaces them: what it reads again is still in the cache, and the gradients
of taps and bias are sums in registers until its end. One ordered sum over the programs follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.block.tile import sigmoid, tile_backward, wide
from mmm4rec_kernels.block.tiling import factor_places, places_of
from mmm4rec_kernels.launch import kind, precision, processors, tile
from mmm4rec_kernels.sums import sum_rows
from mmm4rec_kernels.tiles import store_sum

WARPS = 4
REGISTERS = 168
"""At most so many for a thread."""
PROGRAMS = 3
"""Programs for each multiprocessor: as many as run side by side, so that none is left to run alone."""
AHEAD = 10
"""Places that the walk loads together."""


@triton.jit
def keep(p_d, row_d, m_c, t, count, b_d):
    """Stores the gradient of the raw columns of a place, if there is one."""
    tl.store(p_d + t * row_d, b_d.to(p_d.dtype.element_ty), mask=m_c & (t >= 0) & (t < count))


@triton.jit
def past(b_0, b_g, b_1, b_2, b_3, d_1, d_2, d_3, sums, taps):
    """One place further in a sequence.

    From the raw columns of a place and the gradient of what they were convolved to, b the raw columns of the places
    before, d the gradients of theirs so far. The last d is whole then.
    """
    sum_0, sum_1, sum_2, sum_3, sum_bias = sums
    w_0, w_1, w_2, w_3, b_bias = taps
    b_y = b_bias + w_0 * b_0 + w_1 * b_1 + w_2 * b_2 + w_3 * b_3
    b_gate = sigmoid(b_y)
    b_g *= b_gate * (1.0 + b_y * (1.0 - b_gate))
    sums = (sum_0 + b_g * b_0, sum_1 + b_g * b_1, sum_2 + b_g * b_2, sum_3 + b_g * b_3, sum_bias + b_g)
    return w_0 * b_g, d_1 + w_1 * b_g, d_2 + w_2 * b_g, d_3 + w_3 * b_g, sums


@triton.jit
def walk(
    p_x,
    p_d,
    row_x,
    row_d,
    m_c,
    count,
    end,
    sums,
    taps,
    TAPS: tl.constexpr,
    BC: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Gradients of the convolved columns of a sequence become those of the raw ones; the sums for taps and bias."""
    b_1 = tl.zeros([BC], tl.float32)
    b_2 = tl.zeros([BC], tl.float32)
    b_3 = tl.zeros([BC], tl.float32)
    d_1 = tl.zeros([BC], tl.float32)
    d_2 = tl.zeros([BC], tl.float32)
    d_3 = tl.zeros([BC], tl.float32)
    behind = tl.cdiv(count, AHEAD) * AHEAD
    for first in range(0, behind, AHEAD):
        # Several places are loaded before the first store: a store would hold back the loads behind it.
        raw = ()
        grad = ()
        for k in tl.static_range(AHEAD):
            mask = m_c & (first + k < end)
            raw += (wide(tl.load(p_x + (first + k) * row_x, mask=mask, other=0.0)),)
            grad += (wide(tl.load(p_d + (first + k) * row_d, mask=mask, other=0.0)),)
        for k in tl.static_range(AHEAD):
            d_0, d_1, d_2, d_3, sums = past(raw[k], grad[k], b_1, b_2, b_3, d_1, d_2, d_3, sums, taps)
            keep(p_d, row_d, m_c, first + k - (TAPS - 1), count, d_3 if TAPS == 4 else d_2 if TAPS == 3 else d_1)
            d_3 = d_2
            d_2 = d_1
            d_1 = d_0
            b_3 = b_2
            b_2 = b_1
            b_1 = raw[k]
    keep(p_d, row_d, m_c, behind - 1, count, d_1)
    if TAPS > 2:
        keep(p_d, row_d, m_c, behind - 2, count, d_2)
    if TAPS > 3:
        keep(p_d, row_d, m_c, behind - 3, count, d_3)
    return sums


@triton.jit(do_not_specialize=["rows", "tiles"])
def joined_backward(
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
    p_steps,
    p_scale,
    p_products,
    p_grad,
    p_dz,
    p_dx,
    p_dc,
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
    X_AT: tl.constexpr,
    C_AT: tl.constexpr,
    MODE: tl.constexpr,
    LENGTH: tl.constexpr,
    SKIP_DT: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    AHEAD: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    E: tl.constexpr = H * P
    CHANNELS: tl.constexpr = E + 2 * H * N
    i_h = tl.program_id(0)
    i_split = tl.program_id(1)
    o_c = tl.arange(0, BC)
    m_c = o_c < P + 2 * N
    is_x = o_c < P
    is_C = o_c >= P + N
    o_channel = tl.where(is_x, i_h * P + o_c, E + i_h * N + (o_c - P) + tl.where(is_C, (H - 1) * N, 0))
    o_in_c = C_AT + i_h * N + (o_c - P - N)
    row_x = tl.where(is_C, ROW_C, ROW_X)
    row_d = tl.where(is_C, ROW_DC, ROW_DX)

    b_zero = tl.zeros([BC], tl.float32)
    sums = (b_zero, b_zero, b_zero, b_zero, b_zero)
    sum_norm = tl.zeros([BP], tl.float32)
    sum_D = tl.zeros([BL], tl.float32)
    sum_A = tl.zeros([BL], tl.float32)
    sum_dt = tl.zeros([BL], tl.float32)
    A = -tl.exp(tl.load(p_A_log + i_h).to(tl.float32))
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    length = LENGTH
    per_tile = BL // LENGTH
    for i_tile in range(i_split, tiles, tl.num_programs(1)):
        o_l = tl.arange(0, BL)
        base, m_out, m_in, o_first = places_of(
            i_tile, o_l, p_ends, None, rows, tiles, length, per_tile, magic, MODE, LENGTH
        )
        b_dnorm, b_dskip, b_dstep, b_step, b_da = tile_backward(
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
            p_dx,
            p_dc,
            rows,
            0,
            H,
            P,
            N,
            H,
            TAPS,
            ROW_Z,
            ROW_X,
            ROW_C,
            ROW_DZ,
            ROW_DX,
            ROW_DX,
            ROW_DC,
            X_AT,
            C_AT,
            X_AT + E,
            C_AT,
            LENGTH,
            SKIP_DT,
            BL,
            BP,
            BN,
            KIND,
            PRECISION,
        )
        sum_norm += b_dnorm
        sum_D += b_dskip
        o_row = tl.cast(base, tl.int64) + o_l
        b_raw = tl.load(p_dt + o_row * ROW_X + i_h, mask=m_in, other=0.0).to(tl.float32)
        b_dt = b_raw
        if p_factor is not None:
            o_factor = factor_places(i_tile, base, o_l, o_first, per_tile, magic, factor_batch, factor_row, MODE)
            b_factor = tl.load(p_factor + o_factor + i_h * factor_head, mask=m_in, other=0.0).to(tl.float32)
            b_dt *= b_factor
        b_ddt = tl.where(m_in, (b_dstep + b_da * A) * sigmoid(b_dt + dt_bias), 0.0)
        sum_A += tl.where(m_in, b_da * b_step, 0.0)
        sum_dt += b_ddt
        if p_factor is not None:
            tl.store(p_dfactor + o_row * H + i_h, (b_ddt * b_raw).to(p_dfactor.dtype.element_ty), mask=m_out)
            b_ddt *= b_factor
        tl.store(p_ddt + o_row * ROW_DX + i_h, b_ddt.to(p_ddt.dtype.element_ty), mask=m_out)

        # What the other threads stored is read in the walk.
        tl.debug_barrier()
        b_bias = tl.load(p_bias + o_channel, mask=m_c, other=0.0).to(tl.float32)
        p_taps = p_weight + o_channel
        w_0 = tl.load(p_taps + (TAPS - 1) * CHANNELS, mask=m_c, other=0.0).to(tl.float32)
        w_1 = tl.load(p_taps + (TAPS - 2) * CHANNELS, mask=m_c, other=0.0).to(tl.float32)
        w_2 = tl.load(p_taps + (TAPS - 3) * CHANNELS, mask=m_c & (TAPS > 2), other=0.0).to(tl.float32)
        w_3 = tl.load(p_taps + (TAPS - 4) * CHANNELS, mask=m_c & (TAPS > 3), other=0.0).to(tl.float32)
        taps = (w_0, w_1, w_2, w_3, b_bias)
        for i_s in range(i_tile * per_tile, tl.minimum((i_tile + 1) * per_tile, rows // length)):
            end = length
            if p_ends is not None:
                end = tl.load(p_ends + i_s).to(tl.int32)
            first = tl.cast(i_s, tl.int64) * length
            p_raw = tl.where(is_C, p_c + first * ROW_C + o_in_c, p_x + first * ROW_X + (X_AT + o_channel))
            p_d = tl.where(is_C, p_dc + first * ROW_DC + o_in_c, p_dx + first * ROW_DX + (X_AT + o_channel))
            sums = walk(p_raw, p_d, row_x, row_d, m_c, length, end, sums, taps, TAPS, BC, AHEAD)
    sum_0, sum_1, sum_2, sum_3, sum_bias = sums
    p_sums += i_split.to(tl.int64) * (CHANNELS * (TAPS + 1) + E + 3 * H)
    tl.store(p_sums + o_channel * TAPS + TAPS - 1, sum_0, mask=m_c)
    tl.store(p_sums + o_channel * TAPS + TAPS - 2, sum_1, mask=m_c)
    if TAPS > 2:
        tl.store(p_sums + o_channel * TAPS + TAPS - 3, sum_2, mask=m_c)
    if TAPS > 3:
        tl.store(p_sums + o_channel * TAPS + TAPS - 4, sum_3, mask=m_c)
    p_sums += CHANNELS * TAPS
    tl.store(p_sums + o_channel, sum_bias, mask=m_c)
    o_p = tl.arange(0, BP)
    tl.store(p_sums + CHANNELS + i_h * P + o_p, sum_norm, mask=o_p < P)
    p_sums += CHANNELS + E + i_h
    store_sum(p_sums, sum_D)
    store_sum(p_sums + H, sum_A * A)
    store_sum(p_sums + 2 * H, sum_dt)


def backward(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    factor: torch.Tensor | None,
    turned: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ends: torch.Tensor | None,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    where: dict[str, int],
    at: tuple[int, int],
    known: int,
    skip_dt: bool,
) -> torch.Tensor:
    """Writes the gradients of z, projected, C and factor; those of the parameters as from `short.backward`.

    Inputs are z, projected and C, parameters bias, A_log, D, dt_bias and norm, saved are steps, 1/rms, the norm's row
    products and the output's gradient.
    """
    z, projected, C = inputs
    d_z, d_projected, d_C, d_factor = targets
    bias, A_log, D, dt_bias, norm = parameters
    heads, width, (taps, channels) = A_log.shape[0], norm.shape[0], turned.shape
    states = (channels - width) // (2 * heads)
    splits = min(where["tiles"], max(1, processors(projected) * PROGRAMS // heads))
    sums = torch.empty(splits, channels * (taps + 1) + width + 3 * heads, device=projected.device)
    batch, row, head = (0, 0, 0) if factor is None else factor.stride()
    joined_backward[(heads, splits)](
        z,
        projected,
        C,
        projected[..., -heads:],
        factor,
        turned,
        bias,
        A_log,
        D,
        dt_bias,
        norm,
        ends,
        *saved,
        d_z,
        d_projected,
        d_C,
        d_projected[..., -heads:],
        d_factor,
        sums,
        **where,
        factor_batch=batch,
        factor_row=row,
        factor_head=head,
        H=heads,
        P=width // heads,
        N=states,
        TAPS=taps,
        ROW_Z=z.stride(1),
        ROW_X=projected.stride(1),
        ROW_C=C.stride(1),
        ROW_DZ=d_z.shape[-1],
        ROW_DX=d_projected.shape[-1],
        ROW_DC=d_C.shape[-1],
        X_AT=at[0],
        C_AT=at[1],
        LENGTH=known,
        SKIP_DT=skip_dt,
        BP=tile(width // heads),
        BN=tile(states),
        BC=triton.next_power_of_2(width // heads + 2 * states),
        AHEAD=AHEAD,
        KIND=kind(projected.dtype),
        PRECISION=precision(),
        num_warps=WARPS,
        maxnreg=REGISTERS,
        num_stages=1,
    )
    return sum_rows(sums)
