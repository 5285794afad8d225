# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The scan as one Triton kernel each way.

Letters: B sequences, L places, H heads, P head dim, G groups, N state, K tiles of a sequence; BL, BP, BN are places
of a tile, and P, N rounded up. A program takes one head of one sequence. What fits one tile is one quadratic product
in registers; longer sequences go tile by tile with the state in registers, so time and memory grow linearly. Forward
keeps the state at the start of each tile, backward walks the tiles in reverse. With fewer groups than heads each head
writes its own share of the gradients of B and C; shares and the gradients of A, D and dt_bias are added in one
ordered sum: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.launch import align, kind, precision, tile
from mmm4rec_kernels.ssd.ops import LONG_TILE, ONE_TILE, tile_count
from mmm4rec_kernels.tiles import (
    LENGTHS,
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

FORWARD_WARPS = {16: 1, 32: 1, 64: 4}
BACKWARD_WARPS = {16: 1, 32: 2, 64: 4}
LONG_FORWARD_WARPS = 4
LONG_BACKWARD_WARPS = 4
"""Warps of a program, by the places of its tile: measured on an H200, one fixed choice, no tuning at the first call."""


@triton.jit
def raw_steps(p_dt, p_bias, o_t, m_t, dt_row, i_h):
    """Step sizes of a tile before softplus."""
    b_dt = tl.load(p_dt + o_t * dt_row, mask=m_t, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_dt += tl.load(p_bias + i_h).to(tl.float32)
    return b_dt


@triton.jit
def final_steps(b_dt, m_t, low, high, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr):
    """Step sizes of a tile, 0 outside the sequence."""
    b_step = b_dt
    if SOFTPLUS:
        b_step = softplus(b_dt)
    if LIMIT:
        b_step = tl.minimum(tl.maximum(b_step, low), high)
    return tl.where(m_t, b_step, 0.0)


@triton.jit
def last_of(b_total, BL: tl.constexpr):
    """The last of the running sums."""
    return tl.sum(tl.where(tl.arange(0, BL) == BL - 1, b_total, 0.0), 0)


@triton.jit
def scan_forward(
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_initial,
    p_ends,
    p_y,
    p_states,
    p_final,
    length,
    tiles,
    low,
    high,
    x_batch,
    B_batch,
    C_batch,
    dt_batch,
    dt_row,
    dt_head,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    SHARES: tl.constexpr,
    ROW_X: tl.constexpr,
    HEAD_X: tl.constexpr,
    ROW_B: tl.constexpr,
    GROUP_B: tl.constexpr,
    ROW_C: tl.constexpr,
    GROUP_C: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    SKIP_DT: tl.constexpr,
    D_WIDE: tl.constexpr,
    STATEFUL: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h = tl.program_id(0)
    i_s = tl.program_id(1)
    i_g = i_h // SHARES
    first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS) + i_h * HEAD_X
    p_B += sequence_start(first, i_s, B_batch, ROW_B, ALIGN, ENDS) + i_g * GROUP_B
    p_C += sequence_start(first, i_s, C_batch, ROW_C, ALIGN, ENDS) + i_g * GROUP_C
    if ENDS == PACKED:
        row = first
        p_dt += first * dt_row + i_h * dt_head
    else:
        row = tl.cast(i_s, tl.int64) * length
        p_dt += tl.cast(i_s, tl.int64) * dt_batch + i_h * dt_head
    p_y += row * (H * P) + i_h * P
    A = tl.load(p_A + i_h).to(tl.float64) * LOG2E

    o_l = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    o_state = o_p[:, None] * N + o_n[None, :]
    m_state = m_p[:, None] & m_n[None, :]
    at_state = (tl.cast(i_s, tl.int64) * H + i_h) * (P * N)
    if STATEFUL:
        b_state = tl.zeros([BP, BN], tl.float32)
        if p_initial is not None:
            b_state += tl.load(p_initial + at_state + o_state, mask=m_state, other=0.0).to(tl.float32)

    for i_t in range(tiles):
        o_t = i_t * BL + o_l
        m_t = o_t < count
        b_step = final_steps(raw_steps(p_dt, p_bias, o_t, m_t, dt_row, i_h), m_t, low, high, SOFTPLUS, LIMIT)
        b_total = tl.cumsum(b_step.to(tl.float64) * A, 0)
        m_tx = m_t[:, None] & m_p[None, :]
        m_tn = m_t[:, None] & m_n[None, :]
        b_B = tl.load(p_B + o_t[:, None] * ROW_B + o_n[None, :], mask=m_tn, other=0.0)
        b_C = tl.load(p_C + o_t[:, None] * ROW_C + o_n[None, :], mask=m_tn, other=0.0)
        b_x = tl.load(p_x + o_t[:, None] * ROW_X + o_p[None, :], mask=m_tx, other=0.0).to(tl.float32)
        b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION) * decay_matrix(b_total, BL)
        b_writes = b_x * b_step[:, None]
        b_y = dot(b_M, b_writes, KIND, PRECISION)
        if STATEFUL:
            p_state = p_states + (at_state * tiles + tl.cast(i_t, tl.int64) * (P * N))
            tl.store(p_state + o_state, b_state, mask=m_state)
            total = last_of(b_total, BL)
            b_since = tl.exp2(b_total.to(tl.float32))
            b_until = tl.exp2((total - b_total).to(tl.float32))
            b_y += dot(b_C, tl.trans(b_state), KIND, PRECISION) * b_since[:, None]
            b_state = b_state * tl.exp2(total.to(tl.float32)) + dot(
                tl.trans(b_writes * b_until[:, None]), b_B, KIND, PRECISION
            )
        if p_D is not None:
            if D_WIDE:
                b_D = tl.load(p_D + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)[None, :]
            else:
                b_D = tl.load(p_D + i_h).to(tl.float32)
            if SKIP_DT:
                b_y += b_D * b_writes
            else:
                b_y += b_D * b_x
        if ENDS == LENGTHS:
            b_y = tl.where(m_t[:, None], b_y, 0.0)
        m_y = (o_t < written)[:, None] & m_p[None, :]
        tl.store(p_y + o_t[:, None] * (H * P) + o_p[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)
    if p_final is not None:
        tl.store(p_final + at_state + o_state, b_state, mask=m_state)


@triton.jit
def scan_backward(
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_ends,
    p_states,
    p_dfinal,
    p_grad,
    p_dx,
    p_ddt,
    p_dB,
    p_dC,
    p_dinitial,
    p_sums,
    p_dD,
    length,
    tiles,
    low,
    high,
    x_batch,
    B_batch,
    C_batch,
    dt_batch,
    dt_row,
    dt_head,
    share,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    SHARES: tl.constexpr,
    ROW_X: tl.constexpr,
    HEAD_X: tl.constexpr,
    ROW_B: tl.constexpr,
    GROUP_B: tl.constexpr,
    ROW_C: tl.constexpr,
    GROUP_C: tl.constexpr,
    ROW_DX: tl.constexpr,
    ROW_DB: tl.constexpr,
    ROW_DC: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    SKIP_DT: tl.constexpr,
    D_WIDE: tl.constexpr,
    STATEFUL: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h = tl.program_id(0)
    i_s = tl.program_id(1)
    i_g = i_h // SHARES
    first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS) + i_h * HEAD_X
    p_B += sequence_start(first, i_s, B_batch, ROW_B, ALIGN, ENDS) + i_g * GROUP_B
    p_C += sequence_start(first, i_s, C_batch, ROW_C, ALIGN, ENDS) + i_g * GROUP_C
    if ENDS == PACKED:
        row = first
        p_dt += first * dt_row + i_h * dt_head
    else:
        row = tl.cast(i_s, tl.int64) * length
        p_dt += tl.cast(i_s, tl.int64) * dt_batch + i_h * dt_head
    p_grad += row * (H * P) + i_h * P
    p_dx += row * ROW_DX + i_h * P
    p_dB += (i_h % SHARES).to(tl.int64) * share + row * ROW_DB + i_g * N
    p_dC += (i_h % SHARES).to(tl.int64) * share + row * ROW_DC + i_g * N
    p_ddt += row * H + i_h
    A = tl.load(p_A + i_h).to(tl.float32)

    o_l = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    o_state = o_p[:, None] * N + o_n[None, :]
    m_state = m_p[:, None] & m_n[None, :]
    at_state = (tl.cast(i_s, tl.int64) * H + i_h) * (P * N)
    if STATEFUL:
        b_dstate = tl.zeros([BP, BN], tl.float32)
        if p_dfinal is not None:
            b_dstate += tl.load(p_dfinal + at_state + o_state, mask=m_state, other=0.0)
    b_dA = tl.zeros([BL], tl.float32)
    b_dbias = tl.zeros([BL], tl.float32)
    b_dD = tl.zeros([BP], tl.float32)
    b_D = tl.zeros([1, BP], tl.float32)
    if p_D is not None:
        if D_WIDE:
            b_D += tl.load(p_D + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)[None, :]
        else:
            b_D += tl.load(p_D + i_h).to(tl.float32)

    for back in range(tiles):
        i_t = tiles - 1 - back
        o_t = i_t * BL + o_l
        m_t = o_t < count
        m_written = o_t < written
        b_dt = raw_steps(p_dt, p_bias, o_t, m_t, dt_row, i_h)
        b_step = final_steps(b_dt, m_t, low, high, SOFTPLUS, LIMIT)
        b_total = tl.cumsum(b_step.to(tl.float64) * (A.to(tl.float64) * LOG2E), 0)
        m_tx = m_t[:, None] & m_p[None, :]
        m_tn = m_t[:, None] & m_n[None, :]
        b_B = tl.load(p_B + o_t[:, None] * ROW_B + o_n[None, :], mask=m_tn, other=0.0)
        b_C = tl.load(p_C + o_t[:, None] * ROW_C + o_n[None, :], mask=m_tn, other=0.0)
        b_x = tl.load(p_x + o_t[:, None] * ROW_X + o_p[None, :], mask=m_tx, other=0.0).to(tl.float32)
        b_dy = tl.load(p_grad + o_t[:, None] * (H * P) + o_p[None, :], mask=m_tx, other=0.0)
        b_decay = decay_matrix(b_total, BL)
        b_M = dot(b_C, tl.trans(b_B), KIND, PRECISION) * b_decay
        b_writes = b_x * b_step[:, None]
        b_W = dot(b_dy, tl.trans(b_writes), KIND, PRECISION)
        b_ends = decay_gradient(b_W * b_M)
        b_dscores = b_W * b_decay
        b_dC = dot(b_dscores, b_B, KIND, PRECISION)
        b_dB = dot(tl.trans(b_dscores), b_C, KIND, PRECISION)
        b_dwrites = dot(tl.trans(b_M), b_dy, KIND, PRECISION)
        b_dy = b_dy.to(tl.float32)
        if STATEFUL:
            total = last_of(b_total, BL)
            through = tl.exp2(total.to(tl.float32))
            b_since = tl.exp2(b_total.to(tl.float32))[:, None]
            b_until = tl.exp2((total - b_total).to(tl.float32))[:, None]
            p_state = p_states + (at_state * tiles + tl.cast(i_t, tl.int64) * (P * N))
            b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
            b_dC_state = dot(b_dy, b_state, KIND, PRECISION) * b_since
            b_dB_state = dot(b_writes, b_dstate, KIND, PRECISION) * b_until
            b_dC += b_dC_state
            b_dB += b_dB_state
            b_dwrites += dot(b_B, tl.trans(b_dstate), KIND, PRECISION) * b_until
            b_read = tl.sum(b_dC_state * b_C.to(tl.float32), 1).to(tl.float64)
            b_wrote = tl.sum(b_dB_state * b_B.to(tl.float32), 1).to(tl.float64)
            b_ends += b_read - b_wrote
            passed = tl.sum(tl.sum(b_dstate * b_state, 1), 0) * through
            offset = tl.sum(b_wrote, 0) + passed.to(tl.float64)
            b_dstate = b_dstate * through + dot(tl.trans(b_dy * b_since), b_C, KIND, PRECISION)
        b_da = tl.sum(b_ends, 0) - tl.cumsum(b_ends, 0) + b_ends
        if STATEFUL:
            b_da += offset
        b_da = tl.where(m_t, b_da.to(tl.float32), 0.0)
        if SKIP_DT:
            b_dD += tl.sum(b_dy * b_writes, 0)
            b_dwrites += b_D * b_dy
            b_dx = b_dwrites * b_step[:, None]
        else:
            b_dD += tl.sum(b_dy * b_x, 0)
            b_dx = b_dwrites * b_step[:, None] + b_D * b_dy
        b_dA += b_da * b_step
        b_dstep = tl.sum(b_dwrites * b_x, 1) + b_da * A
        if LIMIT:
            b_free = b_dt
            if SOFTPLUS:
                b_free = softplus(b_dt)
            b_dstep = tl.where((b_free >= low) & (b_free <= high), b_dstep, 0.0)
        if SOFTPLUS:
            b_dstep *= sigmoid(b_dt)
        b_dstep = tl.where(m_t, b_dstep, 0.0)
        b_dbias += b_dstep
        tl.store(p_ddt + o_t * H, b_dstep.to(p_ddt.dtype.element_ty), mask=m_written)
        m_n_out = m_written[:, None] & m_n[None, :]
        m_p_out = m_written[:, None] & m_p[None, :]
        tl.store(p_dx + o_t[:, None] * ROW_DX + o_p[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_p_out)
        tl.store(p_dB + o_t[:, None] * ROW_DB + o_n[None, :], b_dB.to(p_dB.dtype.element_ty), mask=m_n_out)
        tl.store(p_dC + o_t[:, None] * ROW_DC + o_n[None, :], b_dC.to(p_dC.dtype.element_ty), mask=m_n_out)
    if p_dinitial is not None:
        tl.store(p_dinitial + at_state + o_state, b_dstate, mask=m_state)
    p_sums += (tl.cast(i_s, tl.int64) * 3) * H + i_h
    tl.store(p_sums, tl.sum(b_dA, 0))
    tl.store(p_sums + H, tl.sum(b_dbias, 0))
    if D_WIDE:
        tl.store(p_dD + (tl.cast(i_s, tl.int64) * H + i_h) * P + o_p, b_dD, mask=m_p)
    else:
        tl.store(p_sums + 2 * H, tl.sum(b_dD, 0))


def _sizes(
    x: torch.Tensor, B: torch.Tensor, ends: torch.Tensor | None, packed: bool, longest: int
) -> tuple[int, int, int, int, int]:
    """Sequences, places of a tile, tiles, and P and N rounded up."""
    sequences = ends.numel() - 1 if packed and ends is not None else x.shape[0]
    places = tile(longest) if longest <= ONE_TILE else LONG_TILE
    return sequences, places, tile_count(longest), tile(x.shape[3]), tile(B.shape[3])


def _strides(
    x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[tuple[int, ...], dict[str, int]]:
    unit = align(*(t.stride(i) for t in (x, B, C) for i in (0, 1, 2)))
    batch = (x.stride(0) // unit, B.stride(0) // unit, C.stride(0) // unit, *dt.stride())
    return batch, {
        "ROW_X": x.stride(1),
        "HEAD_X": x.stride(2),
        "ROW_B": B.stride(1),
        "GROUP_B": B.stride(2),
        "ROW_C": C.stride(1),
        "GROUP_C": C.stride(2),
        "ALIGN": unit,
    }


def forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    softplus_on: bool,
    limit: tuple[float, float] | None,
    skip_dt: bool,
    want_final: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Y [B, L, H, P], the states at the tiles' starts [B, H, K, P, N], the last states; empty where not needed."""
    batch, length, heads, width = x.shape
    groups, state = B.shape[2:]
    sequences, BL, tiles, BP, BN = _sizes(x, B, ends, packed, longest)
    y = torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device)
    stateful = tiles > 1 or initial is not None or want_final
    states = torch.empty(
        (sequences, heads, tiles, width, state) if stateful else (0,), dtype=torch.float32, device=x.device
    )
    final = torch.empty((sequences, heads, width, state) if want_final else (0,), dtype=torch.float32, device=x.device)
    if sequences == 0:
        return y, states, final
    strides, layout = _strides(x, dt, B, C)
    scan_forward[(heads, sequences)](
        x,
        dt,
        A,
        B,
        C,
        D,
        bias,
        None if initial is None else initial.contiguous(),
        ends,
        y,
        states,
        final if want_final else None,
        length,
        tiles,
        *((0.0, 0.0) if limit is None else limit),
        *strides,
        H=heads,
        P=width,
        N=state,
        SHARES=heads // groups,
        **layout,
        ENDS=0 if ends is None else 2 if packed else 1,
        SOFTPLUS=softplus_on,
        LIMIT=limit is not None,
        SKIP_DT=skip_dt,
        D_WIDE=D is not None and D.dim() == 2,
        STATEFUL=stateful,
        BL=BL,
        BP=BP,
        BN=BN,
        KIND=kind(x.dtype),
        PRECISION=precision(),
        num_warps=LONG_FORWARD_WARPS if stateful else FORWARD_WARPS[BL],
        num_stages=1,
    )
    return y, states, final


def backward(
    grad: torch.Tensor,
    grad_final: torch.Tensor | None,
    states: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    softplus_on: bool,
    limit: tuple[float, float] | None,
    skip_dt: bool,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, B, C, the initial states, of A, bias, D [3, H] and of D [H, P]; empty where there is none.

    `into` receives the gradients of x, B and C: [B, L, E], [B, L, GN] and [B, L, GN] with contiguous columns.
    """
    batch, length, heads, width = x.shape
    groups, state = B.shape[2:]
    shares = heads // groups
    sequences, BL, tiles, BP, BN = _sizes(x, B, ends, packed, longest)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    wide = D is not None and D.dim() == 2
    if into is None:
        d_x = new(batch, length, heads * width, dtype=x.dtype)
        d_B, d_C = (new(batch, length, groups * state, dtype=x.dtype) for _ in range(2))
    else:
        d_x, d_B, d_C = into
    if shares > 1:
        B_target, C_target = (new(shares, batch, length, groups * state) for _ in range(2))
    else:
        B_target, C_target = d_B, d_C
    d_dt = new(batch, length, heads, dtype=dt.dtype)
    d_initial = new(0) if initial is None else new(*initial.shape)
    sums = new(sequences, 3, heads) if sequences else torch.zeros(1, 3, heads, device=x.device)
    d_D = new(sequences if wide else 0, heads, width)
    if sequences:
        strides, layout = _strides(x, dt, B, C)
        scan_backward[(heads, sequences)](
            x,
            dt,
            A,
            B,
            C,
            D,
            bias,
            ends,
            states,
            None if grad_final is None else grad_final.contiguous(),
            grad.contiguous(),
            d_x,
            d_dt,
            B_target,
            C_target,
            None if initial is None else d_initial,
            sums,
            d_D,
            length,
            tiles,
            *((0.0, 0.0) if limit is None else limit),
            *strides,
            batch * length * groups * state,
            H=heads,
            P=width,
            N=state,
            SHARES=shares,
            **layout,
            ROW_DX=d_x.stride(1),
            ROW_DB=B_target.stride(-2),
            ROW_DC=C_target.stride(-2),
            ENDS=0 if ends is None else 2 if packed else 1,
            SOFTPLUS=softplus_on,
            LIMIT=limit is not None,
            SKIP_DT=skip_dt,
            D_WIDE=wide,
            STATEFUL=states.numel() > 0,
            BL=BL,
            BP=BP,
            BN=BN,
            KIND=kind(x.dtype),
            PRECISION=precision(),
            num_warps=LONG_BACKWARD_WARPS if states.numel() else BACKWARD_WARPS[BL],
            num_stages=1,
        )
    if shares > 1:
        d_B.copy_(B_target.sum(0))
        d_C.copy_(C_target.sum(0))
    return d_x, d_dt, d_B, d_C, d_initial, sums.sum(0), d_D.sum(0) if wide else new(0)
