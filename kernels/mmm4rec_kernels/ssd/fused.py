# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The scan in Triton: one kernel each way for what fits a tile, segments of chunks side by side for what is longer.

Letters: B sequences, L places, H heads, P head dim, G groups, N state, K chunks of a sequence; BL, BP, BN are places
of a chunk, and P, N rounded up. A program takes one head of one chunk, which is one quadratic product in registers; of
longer sequences (`segments`) it walks over the chunks with the state in registers. Where there are too few sequences to
fill a GPU, each is cut into segments, and what arrives at a segment is found before. Time and memory grow linearly.
With fewer groups than heads each head writes its own share of the gradients of B and C; shares and the gradients of A,
D and dt_bias are added in one ordered sum: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.backend import interpreting
from mmm4rec_kernels.launch import align, kind, precision, tile, warp_group_products
from mmm4rec_kernels.ssd.chunk import chunk_gradients, chunk_result, dt_start, final_steps, raw_steps, row_start
from mmm4rec_kernels.ssd.ops import ONE_TILE, chunk_places, chunks
from mmm4rec_kernels.ssd.segments import segment_backward, segment_forward, segment_writes, walk
from mmm4rec_kernels.sums import sum_rows
from mmm4rec_kernels.tiles import LOG2E, sequence_bounds, sequence_start, store_sum

FORWARD_WARPS = {16: 1, 32: 1, 64: 4}
BACKWARD_WARPS = {16: 1, 32: 1, 64: 4}
"""Warps of a program, by the places of its chunk: measured on an H100, one fixed choice, no tuning at a first call.
Backward, three TF32 products in place of one need twice the registers, and two warps up to 32 places."""
SEGMENT_WARPS = 4
PROGRAMS = 512
"""Sequences are cut into segments until there are about so many programs."""
WALK = 256
"""Numbers of a state that a program carries over the segments."""


@triton.jit(do_not_specialize=["length", "x_batch", "B_batch", "C_batch", "dt_batch", "factor_batch"])
def scan_forward(
    p_x,
    p_dt,
    p_factor,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_ends,
    p_y,
    length,
    low,
    high,
    x_batch,
    B_batch,
    C_batch,
    dt_batch,
    dt_row,
    dt_head,
    factor_batch,
    factor_row,
    factor_head,
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
    TURN: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Results of a scan that is one chunk and has no states."""
    i_h = tl.program_id(0) % H
    i_s = tl.program_id(0) // H
    first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
    if written == 0:
        return
    i_g = i_h // SHARES
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS) + i_h * HEAD_X
    p_B += sequence_start(first, i_s, B_batch, ROW_B, ALIGN, ENDS) + i_g * GROUP_B
    p_C += sequence_start(first, i_s, C_batch, ROW_C, ALIGN, ENDS) + i_g * GROUP_C
    p_dt = dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, dt_head, ENDS)
    if p_factor is not None:
        p_factor = dt_start(p_factor, first, i_s, i_h, factor_batch, factor_row, factor_head, ENDS)
    p_y += row_start(first, i_s, length, ENDS) * (H * P) + i_h * P

    o_t = tl.arange(0, BL)
    o_p = tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_t = o_t < count
    m_p = o_p < P
    m_n = o_n < N
    m_tx = m_t[:, None] & m_p[None, :]
    m_tn = m_t[:, None] & m_n[None, :]
    A = tl.load(p_A + i_h).to(tl.float64) * LOG2E
    b_dt, _, _ = raw_steps(p_dt, p_factor, p_bias, o_t, m_t, dt_row, factor_row, i_h)
    b_step = final_steps(b_dt, m_t, low, high, SOFTPLUS, LIMIT)
    b_total = tl.cumsum(b_step.to(tl.float64) * A, 0)
    b_B = tl.load(p_B + o_t[:, None] * ROW_B + o_n[None, :], mask=m_tn, other=0.0)
    b_C = tl.load(p_C + o_t[:, None] * ROW_C + o_n[None, :], mask=m_tn, other=0.0)
    b_x = tl.load(p_x + o_t[:, None] * ROW_X + o_p[None, :], mask=m_tx, other=0.0)
    b_y = chunk_result(
        b_x,
        b_B,
        b_C,
        b_step,
        b_total,
        0.0,
        p_D,
        i_h,
        o_p,
        m_t,
        False,
        ENDS,
        SKIP_DT,
        D_WIDE,
        TURN,
        P,
        BL,
        BP,
        KIND,
        PRECISION,
    )
    m_y = (o_t < written)[:, None] & m_p[None, :]
    tl.store(p_y + o_t[:, None] * (H * P) + o_p[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["length", "x_batch", "B_batch", "C_batch", "dt_batch", "factor_batch"])
def scan_backward(
    p_x,
    p_dt,
    p_factor,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_ends,
    p_grad,
    p_dx,
    p_ddt,
    p_dfactor,
    p_dB,
    p_dC,
    p_sums,
    p_dD,
    length,
    low,
    high,
    x_batch,
    B_batch,
    C_batch,
    dt_batch,
    dt_row,
    dt_head,
    factor_batch,
    factor_row,
    factor_head,
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
    ROW_DDT: tl.constexpr,
    ROW_DB: tl.constexpr,
    ROW_DC: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    SKIP_DT: tl.constexpr,
    D_WIDE: tl.constexpr,
    TURN: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a scan that is one chunk and has no states."""
    i_h = tl.program_id(0) % H
    i_s = tl.program_id(0) // H
    first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
    o_p = tl.arange(0, BP)
    m_p = o_p < P
    p_sums += tl.cast(i_s, tl.int64) * (3 * H) + i_h
    p_dD += (tl.cast(i_s, tl.int64) * H + i_h) * P + o_p
    if written == 0:
        tl.store(p_sums, 0.0)
        tl.store(p_sums + H, 0.0)
        if D_WIDE:
            tl.store(p_dD, tl.zeros([BP], tl.float32), mask=m_p)
        else:
            tl.store(p_sums + 2 * H, 0.0)
        return
    i_g = i_h // SHARES
    p_x += sequence_start(first, i_s, x_batch, ROW_X, ALIGN, ENDS) + i_h * HEAD_X
    p_B += sequence_start(first, i_s, B_batch, ROW_B, ALIGN, ENDS) + i_g * GROUP_B
    p_C += sequence_start(first, i_s, C_batch, ROW_C, ALIGN, ENDS) + i_g * GROUP_C
    p_dt = dt_start(p_dt, first, i_s, i_h, dt_batch, dt_row, dt_head, ENDS)
    if p_factor is not None:
        p_factor = dt_start(p_factor, first, i_s, i_h, factor_batch, factor_row, factor_head, ENDS)
    row = row_start(first, i_s, length, ENDS)
    p_grad += row * (H * P) + i_h * P
    p_dx += row * ROW_DX + i_h * P
    p_dB += (i_h % SHARES).to(tl.int64) * share + row * ROW_DB + i_g * N
    p_dC += (i_h % SHARES).to(tl.int64) * share + row * ROW_DC + i_g * N
    p_ddt += row * ROW_DDT + i_h
    if p_factor is not None:
        p_dfactor += row * H + i_h
    A = tl.load(p_A + i_h).to(tl.float32)

    _, b_dA, b_dbias, b_dD = chunk_gradients(
        p_x,
        p_dt,
        p_factor,
        p_B,
        p_C,
        p_D,
        p_bias,
        p_grad,
        0.0,
        p_grad,
        p_dx,
        p_ddt,
        p_dfactor,
        p_dB,
        p_dC,
        i_h,
        count,
        written,
        A,
        low,
        high,
        dt_row,
        factor_row,
        H,
        P,
        N,
        ROW_X,
        ROW_B,
        ROW_C,
        ROW_DX,
        ROW_DDT,
        ROW_DB,
        ROW_DC,
        SOFTPLUS,
        LIMIT,
        SKIP_DT,
        D_WIDE,
        False,
        TURN,
        BL,
        BP,
        BN,
        KIND,
        PRECISION,
    )
    store_sum(p_sums, b_dA)
    store_sum(p_sums + H, b_dbias)
    if D_WIDE:
        tl.store(p_dD, b_dD, mask=m_p)
    else:
        store_sum(p_sums + 2 * H, b_dD)


def _sizes(
    x: torch.Tensor, B: torch.Tensor, ends: torch.Tensor | None, packed: bool, longest: int
) -> tuple[int, int, int, int, int]:
    """Sequences, places of a chunk, chunks, and P and N rounded up."""
    sequences = ends.numel() - 1 if packed and ends is not None else x.shape[0]
    width, state = x.shape[3], B.shape[3]
    return (
        sequences,
        chunk_places(longest, width, state, x.dtype),
        chunks(longest, width, state, x.dtype),
        tile(width),
        tile(state),
    )


def _segments(scans: int, count: int) -> tuple[int, int]:
    """Chunks of a segment, and segments of a sequence."""
    size = -(-count // max(1, min(count, PROGRAMS // scans)))
    return size, -(-count // size)


def _warps(table: dict[int, int], BL: int, BP: int, BN: int, stateful: bool) -> int:
    if BP * BN > ONE_TILE * ONE_TILE:
        return 8
    return SEGMENT_WARPS if stateful else table[BL]


def _turns(x: torch.Tensor, BL: int, BP: int, BN: int) -> bool:
    """Whether tiles are laid out for a transposed store: float32 operands of warp-group products, square tiles."""
    square = BL == BP == BN == ONE_TILE
    return square and x.dtype == torch.float32 and not interpreting() and warp_group_products(x)


def _arrivals(
    writer: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    softplus_on: bool,
    limit: tuple[float, float] | None,
    factor: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    back: bool,
) -> torch.Tensor:
    """What arrives at each segment [S, H, SC, P, N]: the state or, with `back`, its gradient; `last` gets the end."""
    length, heads, width = writer.shape[1:]
    groups, state = B.shape[2:]
    sequences, BL, count, BP, BN = _sizes(writer, B, ends, packed, longest)
    chunks_of, segments = _segments(sequences * heads, count)
    states = torch.empty(sequences, heads, segments, width, state, dtype=torch.float32, device=writer.device)
    through = torch.empty(sequences, heads, segments, dtype=torch.float32, device=writer.device)
    unit = align(*(t.stride(i) for t in (writer, B) for i in (0, 1, 2)))
    mode = 0 if ends is None else 2 if packed else 1
    segment_writes[(heads * segments * sequences,)](
        writer,
        dt,
        factor,
        A,
        B,
        bias,
        ends,
        states,
        through,
        length,
        chunks_of,
        segments,
        *((0.0, 0.0) if limit is None else limit),
        writer.stride(0) // unit,
        B.stride(0) // unit,
        *dt.stride(),
        *_factor_strides(factor),
        H=heads,
        P=width,
        N=state,
        SHARES=heads // groups,
        ROW_X=writer.stride(1),
        HEAD_X=writer.stride(2),
        ROW_B=B.stride(1),
        GROUP_B=B.stride(2),
        ALIGN=unit,
        ENDS=mode,
        SOFTPLUS=softplus_on,
        LIMIT=limit is not None,
        SINCE=back,
        BL=BL,
        BP=BP,
        BN=BN,
        KIND=kind(writer.dtype),
        PRECISION=precision(),
        num_warps=4,
        num_stages=1,
    )
    walk[(heads * sequences, triton.cdiv(width * state, WALK))](
        states,
        through,
        first,
        last,
        ends,
        length,
        chunks_of,
        segments,
        H=heads,
        SIZE=width * state,
        ENDS=mode,
        BACK=back,
        BL=BL,
        BI=WALK,
        num_warps=2,
    )
    return states


def _factor_strides(factor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if factor is None else factor.stride()


def _strides(
    x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, factor: torch.Tensor | None
) -> tuple[tuple[int, ...], dict[str, int]]:
    unit = align(*(t.stride(i) for t in (x, B, C) for i in (0, 1, 2)))
    batch = (x.stride(0) // unit, B.stride(0) // unit, C.stride(0) // unit, *dt.stride(), *_factor_strides(factor))
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
    factor: torch.Tensor | None = None,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Y [B, L, H, P], the states at the chunks' starts [B, H, K, P, N], the last states; empty where not needed.

    `factor` [B, L, H] multiplies dt before the bias. Backward needs the states: without `keep` they are not written.
    """
    batch, length, heads, width = x.shape
    groups, state = B.shape[2:]
    sequences, BL, count, BP, BN = _sizes(x, B, ends, packed, longest)
    y = torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device)
    stateful = count > 1 or initial is not None or want_final
    shape = (sequences, heads, count, width, state) if stateful and keep else (0,)
    states = torch.empty(shape, dtype=torch.float32, device=x.device)
    final = torch.empty((sequences, heads, width, state) if want_final else (0,), dtype=torch.float32, device=x.device)
    if sequences == 0:
        return y, states, final
    strides, layout = _strides(x, dt, B, C, factor)
    how = {
        "H": heads,
        "P": width,
        "N": state,
        "SHARES": heads // groups,
        **layout,
        "ENDS": 0 if ends is None else 2 if packed else 1,
        "SOFTPLUS": softplus_on,
        "LIMIT": limit is not None,
        "SKIP_DT": skip_dt,
        "D_WIDE": D is not None and D.dim() == 2,
        "TURN": not stateful and _turns(x, BL, BP, BN),
        "BL": BL,
        "BP": BP,
        "BN": BN,
        "KIND": kind(x.dtype),
        "PRECISION": precision(),
        "num_warps": _warps(FORWARD_WARPS, BL, BP, BN, stateful),
        "num_stages": 1,
    }
    bounds = (0.0, 0.0) if limit is None else limit
    tensors = (x, dt, factor, A, B, C, D, bias, ends)
    if not stateful:
        scan_forward[(heads * sequences,)](*tensors, y, length, *bounds, *strides, **how)
        return y, states, final
    first = None if initial is None else initial.contiguous()
    last = final if want_final else None
    size, segments = _segments(sequences * heads, count)
    if segments > 1:
        where = (ends, packed, longest, softplus_on, limit, factor)
        first = _arrivals(x, dt, A, B, bias, *where, first, last, False)
        last = None
    segment_forward[(heads * sequences * segments,)](
        *tensors,
        first,
        y,
        states if keep else None,
        last,
        length,
        count,
        size,
        segments,
        *bounds,
        *strides,
        **how,
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
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    factor: torch.Tensor | None = None,
    d_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, B, C, the initial states, of A, bias, D [3, H] and of D [H, P]; empty where there is none.

    `into` receives the gradients of x, B, C and dt: [B, L, E], [B, L, GN], [B, L, GN] and [B, L, H], their columns
    contiguous and their places a fixed stride apart. `factor` [B, L, H] multiplied dt; `d_factor` receives its
    gradient, contiguous.
    """
    batch, length, heads, width = x.shape
    groups, state = B.shape[2:]
    shares = heads // groups
    sequences, BL, count, BP, BN = _sizes(x, B, ends, packed, longest)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    wide = D is not None and D.dim() == 2
    stateful = states.numel() > 0
    three_pass = x.dtype == torch.float32 and precision() == "tf32x3"
    if into is None:
        d_x = new(batch, length, heads * width, dtype=x.dtype)
        d_B, d_C = (new(batch, length, groups * state, dtype=x.dtype) for _ in range(2))
        d_dt = new(batch, length, heads, dtype=dt.dtype)
    else:
        d_x, d_B, d_C, d_dt = into
    if shares > 1:
        B_target, C_target = (new(shares, batch, length, groups * state) for _ in range(2))
    else:
        B_target, C_target = d_B, d_C
    d_initial = new(0) if initial is None else new(*initial.shape)
    size, segments = _segments(sequences * heads, count) if sequences else (1, 1)
    sums = new(sequences * segments, 3, heads) if sequences else torch.zeros(1, 3, heads, device=x.device)
    d_D = new(sequences * segments if wide else 0, heads, width)
    if sequences:
        grad = grad.reshape(x.shape).contiguous()
        strides, layout = _strides(x, dt, B, C, factor)
        how = {
            "H": heads,
            "P": width,
            "N": state,
            "SHARES": shares,
            **layout,
            "ROW_DX": d_x.stride(1),
            "ROW_DDT": d_dt.stride(1),
            "ROW_DB": B_target.stride(-2),
            "ROW_DC": C_target.stride(-2),
            "ENDS": 0 if ends is None else 2 if packed else 1,
            "SOFTPLUS": softplus_on,
            "LIMIT": limit is not None,
            "SKIP_DT": skip_dt,
            "D_WIDE": wide,
            "TURN": stateful and _turns(x, BL, BP, BN),
            "BL": BL,
            "BP": BP,
            "BN": BN,
            "KIND": kind(x.dtype),
            "PRECISION": precision(),
            "num_warps": max(_warps(BACKWARD_WARPS, BL, BP, BN, stateful), 2 if three_pass and BL == 32 else 1),
            "num_stages": 1,
        }
        bounds = (0.0, 0.0) if limit is None else limit
        rest = (*bounds, *strides, batch * length * groups * state)
        tensors = (x, dt, factor, A, B, C, D, bias, ends)
        gradients = (grad, d_x, d_dt, d_factor, B_target, C_target)
        if stateful:
            first = None if grad_final is None else grad_final.contiguous()
            last = None if initial is None else d_initial
            if segments > 1:
                where = (ends, packed, longest, softplus_on, limit, factor)
                first = _arrivals(grad, dt, A, C, bias, *where, first, last, True)
                last = None
            segment_backward[(heads * sequences * segments,)](
                *tensors,
                states,
                first,
                *gradients,
                last,
                sums,
                d_D,
                length,
                count,
                size,
                segments,
                *rest,
                **how,
            )
        else:
            scan_backward[(heads * sequences,)](*tensors, *gradients, sums, d_D, length, *rest, **how)
    if shares > 1:
        d_B.copy_(B_target.sum(0))
        d_C.copy_(C_target.sum(0))
    totals = sum_rows(sums.view(-1, 3 * heads)).view(3, heads)
    return d_x, d_dt, d_B, d_C, d_initial, totals, d_D.sum(0) if wide else new(0)
