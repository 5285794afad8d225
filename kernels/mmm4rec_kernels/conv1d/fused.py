# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The convolution as one Triton kernel each way, running along the places with the last few of them in registers.

Letters: B sequences, L places, C channels, K taps. A program takes BC channels of a run of places; the places before
it are read again at its start. Backward, a program takes every S-th run of its channels and keeps the gradients of
taps and bias in registers until the end; one ordered sum over the programs follows, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.launch import align, processors
from mmm4rec_kernels.sums import sum_rows
from mmm4rec_kernels.tiles import PACKED, sequence_bounds, sequence_start, sigmoid

RUN = 64
"""Places of one run in sequences that are longer than this."""
COLUMNS = 512
WARPS = {2: 4, 4: 2}
"""Warps of a program, by the bytes of an element: measured on an H200."""
PROGRAMS = 4
"""Programs of the backward kernel for each multiprocessor."""


@triton.jit
def row(p, t, o_c, m_c, first, end, ROW: tl.constexpr):
    """Columns of place t, zero outside [first, end)."""
    return tl.load(p + t * ROW + o_c, mask=m_c & (t >= first) & (t < end), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "in_batch"])
def conv_forward(
    p_in,
    p_weight,
    p_bias,
    p_ends,
    p_out,
    length,
    in_batch,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ROW: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SILU: tl.constexpr,
    RUN: tl.constexpr,
    BC: tl.constexpr,
):
    i_s = tl.program_id(0)
    start = tl.program_id(2) * RUN
    first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
    p_in += sequence_start(first, i_s, in_batch, ROW, ALIGN, ENDS)
    if ENDS == PACKED:
        p_out += first * C
    else:
        p_out += tl.cast(i_s, tl.int64) * length * C
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_bias = tl.zeros([BC], tl.float32)
    if p_bias is not None:
        b_bias += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    w_0 = tl.load(p_weight + o_c * TAPS + TAPS - 1, mask=m_c, other=0.0).to(tl.float32)
    w_1 = tl.load(p_weight + o_c * TAPS + TAPS - 2, mask=m_c, other=0.0).to(tl.float32)
    w_2 = tl.load(p_weight + o_c * TAPS + TAPS - 3, mask=m_c & (TAPS > 2), other=0.0).to(tl.float32)
    w_3 = tl.load(p_weight + o_c * TAPS + TAPS - 4, mask=m_c & (TAPS > 3), other=0.0).to(tl.float32)
    b_1 = row(p_in, start - 1, o_c, m_c, 0, count, ROW)
    b_2 = row(p_in, start - 2, o_c, m_c, 0, count, ROW)
    b_3 = row(p_in, start - 3, o_c, m_c, 0, count, ROW)
    for t in tl.range(start, tl.minimum(start + RUN, count), loop_unroll_factor=4):
        b_0 = row(p_in, t, o_c, m_c, 0, count, ROW)
        b_y = b_bias + w_0 * b_0 + w_1 * b_1 + w_2 * b_2 + w_3 * b_3
        if SILU:
            b_y *= sigmoid(b_y)
        tl.store(p_out + t * C + o_c, b_y.to(p_out.dtype.element_ty), mask=m_c)
        b_3 = b_2
        b_2 = b_1
        b_1 = b_0
    for t in range(tl.maximum(start, count), tl.minimum(start + RUN, written)):
        tl.store(p_out + t * C + o_c, tl.zeros([BC], p_out.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["length", "sequences", "in_batch"])
def conv_backward(
    p_in,
    p_weight,
    p_bias,
    p_ends,
    p_grad,
    p_d,
    p_sums,
    length,
    sequences,
    runs,
    in_batch,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ROW: tl.constexpr,
    ROW_G: tl.constexpr,
    ROW_D: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    SILU: tl.constexpr,
    RUN: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    i_split = tl.program_id(1)
    m_c = o_c < C
    b_bias = tl.zeros([BC], tl.float32)
    if p_bias is not None:
        b_bias += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    w_0 = tl.load(p_weight + o_c * TAPS + TAPS - 1, mask=m_c, other=0.0).to(tl.float32)
    w_1 = tl.load(p_weight + o_c * TAPS + TAPS - 2, mask=m_c, other=0.0).to(tl.float32)
    w_2 = tl.load(p_weight + o_c * TAPS + TAPS - 3, mask=m_c & (TAPS > 2), other=0.0).to(tl.float32)
    w_3 = tl.load(p_weight + o_c * TAPS + TAPS - 4, mask=m_c & (TAPS > 3), other=0.0).to(tl.float32)
    sum_0 = tl.zeros([BC], tl.float32)
    sum_1 = tl.zeros([BC], tl.float32)
    sum_2 = tl.zeros([BC], tl.float32)
    sum_3 = tl.zeros([BC], tl.float32)
    sum_bias = tl.zeros([BC], tl.float32)
    for item in range(i_split, sequences * runs, tl.num_programs(1)):
        i_s = item // runs
        start = (item % runs) * RUN
        first, count, written = sequence_bounds(p_ends, i_s, length, ENDS)
        p_x = p_in + sequence_start(first, i_s, in_batch, ROW, ALIGN, ENDS)
        if ENDS == PACKED:
            row_at = first
        else:
            row_at = tl.cast(i_s, tl.int64) * length
        p_g = p_grad + row_at * ROW_G
        p_dx = p_d + row_at * ROW_D
        end = tl.minimum(start + RUN, count)
        b_1 = row(p_x, start - 1, o_c, m_c, 0, count, ROW)
        b_2 = row(p_x, start - 2, o_c, m_c, 0, count, ROW)
        b_3 = row(p_x, start - 3, o_c, m_c, 0, count, ROW)
        g_1 = tl.zeros([BC], tl.float32)
        g_2 = tl.zeros([BC], tl.float32)
        g_3 = tl.zeros([BC], tl.float32)
        for t in tl.range(start, end + TAPS - 1, loop_unroll_factor=4):
            b_0 = row(p_x, t, o_c, m_c, 0, count, ROW)
            g_0 = row(p_g, t, o_c, m_c, 0, count, ROW_G)
            if SILU:
                b_y = b_bias + w_0 * b_0 + w_1 * b_1 + w_2 * b_2 + w_3 * b_3
                b_gate = sigmoid(b_y)
                g_0 *= b_gate * (1.0 + b_y * (1.0 - b_gate))
            own = tl.where(t < end, g_0, 0.0)
            sum_bias += own
            sum_0 += own * b_0
            sum_1 += own * b_1
            sum_2 += own * b_2
            sum_3 += own * b_3
            if TAPS == 4:
                b_d = w_0 * g_3 + w_1 * g_2 + w_2 * g_1 + w_3 * g_0
            elif TAPS == 3:
                b_d = w_0 * g_2 + w_1 * g_1 + w_2 * g_0
            else:
                b_d = w_0 * g_1 + w_1 * g_0
            t_d = t - (TAPS - 1)
            tl.store(p_dx + t_d * ROW_D + o_c, b_d.to(p_d.dtype.element_ty), mask=m_c & (t_d >= start))
            b_3 = b_2
            b_2 = b_1
            b_1 = b_0
            g_3 = g_2
            g_2 = g_1
            g_1 = g_0
        for t in range(tl.maximum(start, count), tl.minimum(start + RUN, written)):
            tl.store(p_dx + t * ROW_D + o_c, tl.zeros([BC], p_d.dtype.element_ty), mask=m_c)
    p_sums += i_split.to(tl.int64) * (C * (TAPS + 1))
    tl.store(p_sums + o_c * TAPS + TAPS - 1, sum_0, mask=m_c)
    tl.store(p_sums + o_c * TAPS + TAPS - 2, sum_1, mask=m_c)
    if TAPS > 2:
        tl.store(p_sums + o_c * TAPS + TAPS - 3, sum_2, mask=m_c)
    if TAPS > 3:
        tl.store(p_sums + o_c * TAPS + TAPS - 4, sum_3, mask=m_c)
    tl.store(p_sums + C * TAPS + o_c, sum_bias, mask=m_c)


def _shape(x: torch.Tensor, ends: torch.Tensor | None, packed: bool, longest: int) -> tuple[int, int, int, int]:
    """Sequences, places of a run, runs of a sequence, columns of a program."""
    sequences = ends.numel() - 1 if packed and ends is not None else x.shape[0]
    run = longest if longest <= RUN else RUN
    return sequences, run, triton.cdiv(longest, run), min(COLUMNS, triton.next_power_of_2(x.shape[2]))


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    silu: bool,
) -> torch.Tensor:
    """[B, L, C], contiguous; `ends` are lengths, or offsets if `packed`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sequences, run, runs, columns = _shape(x, ends, packed, longest)
    if sequences == 0:
        return out
    unit = align(x.stride(0), x.stride(1))
    conv_forward[(sequences, triton.cdiv(x.shape[2], columns), runs)](
        x,
        weight,
        bias,
        ends,
        out,
        x.shape[1],
        x.stride(0) // unit,
        C=x.shape[2],
        TAPS=weight.shape[1],
        ROW=x.stride(1),
        ALIGN=unit,
        ENDS=0 if ends is None else 2 if packed else 1,
        SILU=silu,
        RUN=run,
        BC=columns,
        num_warps=WARPS[x.element_size()],
    )
    return out


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    silu: bool,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of x, and of taps [C, K] and bias [C] one behind the other in float32."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into
    return d_x, sum_rows(backward_sums(grad, x, weight, bias, ends, packed, longest, silu, d_x))


def backward_sums(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    silu: bool,
    d_x: torch.Tensor,
) -> torch.Tensor:
    """Shares of the gradients of taps and bias, [programs, CK + C], still to be added.

    `d_x` receives the gradient of x: [B, L, C], its columns contiguous and its places a fixed stride apart. It may be
    `grad` itself if no sequence is longer than one run: a place is read before it is written.
    """
    if grad.stride(2) != 1 or (grad.shape[0] > 1 and grad.stride(0) != grad.shape[1] * grad.stride(1)):
        grad = grad.contiguous()
    channels, taps = weight.shape
    sequences, run, runs, columns = _shape(x, ends, packed, longest)
    blocks = triton.cdiv(channels, columns)
    splits = max(1, min(sequences * runs, processors(x) * PROGRAMS // blocks))
    make = torch.empty if sequences else torch.zeros
    sums = make(splits, channels * (taps + 1), dtype=torch.float32, device=x.device)
    unit = align(x.stride(0), x.stride(1))
    if sequences:
        conv_backward[(blocks, splits)](
            x,
            weight,
            bias,
            ends,
            grad,
            d_x,
            sums,
            x.shape[1],
            sequences,
            runs,
            x.stride(0) // unit,
            C=channels,
            TAPS=taps,
            ROW=x.stride(1),
            ROW_G=grad.stride(1),
            ROW_D=d_x.stride(1),
            ALIGN=unit,
            ENDS=0 if ends is None else 2 if packed else 1,
            SILU=silu,
            RUN=run,
            BC=columns,
            num_warps=WARPS[x.element_size()],
        )
    return sums
