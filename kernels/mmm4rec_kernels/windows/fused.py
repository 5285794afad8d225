# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Windows and places as Triton kernels. Letters: N elements of all sequences, B windows, T places, S rows.

A program takes BW windows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WINDOWS = 8
"""Windows of a program of `gather`."""
PLACED = 32
"""Windows of a program of `place`."""


@triton.jit(do_not_specialize=["windows"])
def gather(
    p_value,
    p_time,
    p_first,
    p_target,
    p_values,
    p_lengths,
    p_times,
    p_targets,
    windows,
    T: tl.constexpr,
    NEXT: tl.constexpr,
    BW: tl.constexpr,
    BT: tl.constexpr,
):
    o_w = tl.program_id(0) * BW + tl.arange(0, BW)
    o_t = tl.arange(0, BT)
    m_w = o_w < windows
    b_target = tl.load(p_target + o_w, mask=m_w, other=0)
    b_first = tl.load(p_first + b_target, mask=m_w, other=0)
    b_start = tl.maximum(b_first, b_target - T)
    b_length = b_target - b_start
    tl.store(p_lengths + o_w, b_length, mask=m_w)
    tl.store(p_targets + o_w, tl.load(p_value + b_target, mask=m_w, other=0).to(tl.int64), mask=m_w)
    b_stamped = b_length
    if NEXT:
        b_stamped += tl.where((b_start == b_first) & (b_length < T), 1, 0)
    o_from = b_start[:, None] + o_t[None, :]
    mask = m_w[:, None] & (o_t < T)[None, :]
    b_value = tl.load(p_value + o_from, mask=mask & (o_t[None, :] < b_length[:, None]), other=0)
    b_time = tl.load(p_time + o_from, mask=mask & (o_t[None, :] < b_stamped[:, None]), other=0)
    o_to = o_w.to(tl.int64)[:, None] * T + o_t[None, :]
    tl.store(p_values + o_to, b_value.to(tl.int64), mask=mask)
    tl.store(p_times + o_to, b_time, mask=mask)


@triton.jit(do_not_specialize=["windows", "rows", "fillings"])
def place(
    p_lengths,
    p_last,
    p_slots,
    p_offsets,
    windows,
    rows,
    fillings,
    T: tl.constexpr,
    BW: tl.constexpr,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    o_b = tl.arange(0, BLOCK)
    b_total = tl.zeros([BLOCK], tl.int64)
    b_before = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, windows, BLOCK):
        b_length = tl.load(p_lengths + begin + o_b, mask=begin + o_b < windows, other=0)
        b_total += b_length
        b_before += tl.where(begin + o_b < i * BW, b_length, 0)
    total = tl.sum(b_total, 0)
    o_w = i * BW + tl.arange(0, BW)
    o_t = tl.arange(0, BT)
    m_w = o_w < windows
    b_length = tl.load(p_lengths + o_w, mask=m_w, other=0)
    b_end = tl.sum(b_before, 0) + tl.cumsum(b_length, 0)
    b_start = b_end - b_length
    tl.store(p_last + o_w, b_end - 1, mask=m_w)
    tl.store(p_offsets + o_w, b_start.to(tl.int32), mask=m_w)
    mask = m_w[:, None] & (o_t[None, :] < b_length[:, None])
    b_slot = o_w.to(tl.int64)[:, None] * T + o_t[None, :]
    tl.store(p_slots + b_start[:, None] + o_t[None, :], b_slot, mask=mask)
    for begin in range(i * BLOCK, rows, tl.num_programs(0) * BLOCK):
        tl.store(p_slots + begin + o_b, o_b.to(tl.int64) * 0, mask=(begin + o_b >= total) & (begin + o_b < rows))
    for begin in range(i * BLOCK, fillings + 1, tl.num_programs(0) * BLOCK):
        b_offset = tl.minimum(total + (begin + o_b).to(tl.int64) * T, rows)
        tl.store(p_offsets + windows + begin + o_b, b_offset.to(tl.int32), mask=begin + o_b <= fillings)


def before(
    value: torch.Tensor, time: torch.Tensor, first: torch.Tensor, target: torch.Tensor, length: int, with_next: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [B, T], lengths [B], times [B, T] and the targets' values [B], int64."""
    windows = len(target)
    values, times = (torch.empty(windows, length, dtype=torch.int64, device=target.device) for _ in range(2))
    lengths, targets = (torch.empty(windows, dtype=torch.int64, device=target.device) for _ in range(2))
    if windows:
        gather[(triton.cdiv(windows, WINDOWS),)](
            value,
            time,
            first,
            target,
            values,
            lengths,
            times,
            targets,
            windows,
            T=length,
            NEXT=with_next,
            BW=WINDOWS,
            BT=triton.next_power_of_2(length),
            num_warps=4,
        )
    return values, lengths, times, targets


def packed(lengths: torch.Tensor, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last rows [B] and slots [S], int64, and offsets int32."""
    windows = len(lengths)
    fillings = (rows - windows) // length + 1
    last = torch.empty_like(lengths)
    slots = torch.empty(rows, dtype=torch.int64, device=lengths.device)
    offsets = torch.empty(windows + 1 + fillings, dtype=torch.int32, device=lengths.device)
    place[(triton.cdiv(windows, PLACED),)](
        lengths,
        last,
        slots,
        offsets,
        windows,
        rows,
        fillings,
        T=length,
        BW=PLACED,
        BT=triton.next_power_of_2(length),
        BLOCK=1024,
        num_warps=4,
    )
    return last, slots, offsets
