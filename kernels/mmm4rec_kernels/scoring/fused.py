# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Cross-entropy, sums by row and counts: the framework's products, and one Triton pass over each block of scores.

Letters: B queries, V rows, D width, N places. Products of queries and rows are left to the framework: written to a
large block, they cost as little as one that never leaves the chip (built and measured: 12.3 ms for both at a million
rows), and a block large enough leaves the host time to keep up. No atomics: results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.launch import align
from mmm4rec_kernels.scoring.ops import stride
from mmm4rec_kernels.tiles import LOG2E

BLOCK = 1 << 26
"""Scores of one block where they are not kept: 256 MiB, as much as is kept of smaller ones."""
COLUMNS = 4096
"""Scores of one row that a program takes at a time."""
TILE = 32
"""Places that a program sums at a time."""
HEADS = 16
"""Partial sums that are added at a time."""
LEAST = tl.constexpr(-1e38)
"""Below every score, and finite, so that its difference from itself is zero."""


@triton.jit
def row_softmax(
    p_score, p_target, p_loss, p_total, p_slope, columns, in_row, first, ALIGN: tl.constexpr, BC: tl.constexpr
):
    """One row: loss, logarithm of the sum, and softmax minus one at the target; zero in the columns that fill it up."""
    i_row = tl.program_id(0).to(tl.int64)
    p_score += i_row * in_row * ALIGN
    p_slope += i_row * in_row * ALIGN
    target = tl.load(p_target + i_row) - first
    o_c = tl.arange(0, BC)
    b_top = tl.full([BC], LEAST, tl.float32)
    b_sum = tl.zeros([BC], tl.float32)
    b_own = tl.zeros([BC], tl.float32)
    for begin in range(0, columns, BC):
        b_score = tl.load(p_score + begin + o_c, mask=begin + o_c < columns, other=-float("inf"))
        b_new = tl.maximum(b_top, b_score)
        b_sum = b_sum * tl.exp2((b_top - b_new) * LOG2E) + tl.exp2((b_score - b_new) * LOG2E)
        b_top = b_new
        b_own = tl.where(begin + o_c == target, b_score, b_own)
    top = tl.max(b_top, 0)
    total = tl.sum(b_sum * tl.exp2((b_top - top) * LOG2E), 0)
    own = tl.where((target >= 0) & (target < columns), tl.sum(b_own, 0), float("nan"))
    tl.store(p_loss + i_row, (top - own) + tl.log(total))
    tl.store(p_total + i_row, top + tl.log(total))
    scale = 1.0 / total
    for begin in range(0, in_row * ALIGN, BC):
        b_score = tl.load(p_score + begin + o_c, mask=begin + o_c < columns, other=-float("inf"))
        b_slope = tl.exp2((b_score - top) * LOG2E) * scale
        b_slope -= tl.where(begin + o_c == target, 1.0, 0.0)
        tl.store(p_slope + begin + o_c, b_slope.to(p_slope.dtype.element_ty), mask=begin + o_c < in_row * ALIGN)


@triton.jit(do_not_specialize=["first", "i_slice", "queries"])
def part_totals(
    p_score, p_target, p_totals, p_own, columns, in_row, first, i_slice, queries, ALIGN: tl.constexpr, BC: tl.constexpr
):
    """Logarithm of the sum of one row's slice, and the target's score if it lies there; `first` is column 0's row."""
    i_row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BC
    o_c = begin + tl.arange(0, BC)
    b_score = tl.load(p_score + i_row * in_row * ALIGN + o_c, mask=o_c < columns, other=-float("inf"))
    top = tl.max(b_score, 0)
    total = tl.sum(tl.exp2((b_score - top) * LOG2E), 0)
    p_totals += (i_slice + tl.program_id(1)).to(tl.int64) * queries
    tl.store(p_totals + i_row, top + tl.log(total))
    target = tl.load(p_target + i_row) - first
    own = tl.sum(tl.where(o_c == target, b_score, 0.0), 0)
    tl.store(p_own + i_row, own, mask=(target >= begin) & (target < tl.minimum(begin + BC, columns)))


@triton.jit(do_not_specialize=["first"])
def part_slopes(p_score, p_target, p_total, p_slope, columns, in_row, first, ALIGN: tl.constexpr, BC: tl.constexpr):
    """Softmax minus one at the target, of one row's slice."""
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < columns
    at = i_row * in_row * ALIGN + o_c
    b_slope = tl.exp2((tl.load(p_score + at, mask=m_c, other=LEAST) - tl.load(p_total + i_row)) * LOG2E)
    b_slope -= tl.where(o_c == tl.load(p_target + i_row) - first, 1.0, 0.0)
    tl.store(p_slope + at, b_slope.to(p_slope.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["places"])
def tile_sums(
    p_grad,
    p_ordered,
    p_places,
    p_out,
    p_head,
    p_tail,
    places,
    in_row,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Sums by row among BP neighbours in sorted order; what crosses a border is left in head and tail."""
    i_tile = tl.program_id(0)
    o_p = i_tile * BP + tl.arange(0, BP)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_p, m_d = o_p < places, o_d < D
    b_row = tl.load(p_ordered + o_p, mask=m_p, other=-1).to(tl.int32)
    b_before = tl.load(p_ordered + o_p - 1, mask=m_p & (o_p > 0), other=-1).to(tl.int32)
    last = tl.minimum(i_tile * BP + BP, places) - 1
    row_last = tl.load(p_ordered + last).to(tl.int32)
    row_next = tl.load(p_ordered + last + 1, mask=last + 1 < places, other=-1).to(tl.int32)
    b_place = tl.load(p_places + o_p, mask=m_p, other=0)
    o_grad = b_place[:, None] * in_row * ALIGN + o_d[None, :]
    b_grad = tl.load(p_grad + o_grad, mask=m_p[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_same = (b_row[:, None] == b_row[None, :]).to(tl.float32)
    b_sum = tl.dot(b_same, b_grad, input_precision="ieee", out_dtype=tl.float32)
    m_opens = m_p & ((o_p == i_tile * BP) | (b_row != b_before))
    m_head = m_opens & (o_p > 0) & (b_row == b_before)
    m_tail = m_opens & (b_row == row_last) & (row_next == row_last) & ~m_head
    m_out = m_opens & ~m_head & ~m_tail
    at = i_tile.to(tl.int64) * D + o_d[None, :] + tl.zeros([BP, 1], tl.int64)
    tl.store(p_head + at, b_sum, mask=m_head[:, None] & m_d[None, :])
    tl.store(p_tail + at, b_sum, mask=m_tail[:, None] & m_d[None, :])
    o_out = b_row.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out + o_out, b_sum.to(p_out.dtype.element_ty), mask=m_out[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["places"])
def join_sums(
    p_ordered, p_out, p_head, p_tail, places, D: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr
):
    """Sums of the rows that begin in one tile and end in a later one: the tail, then the heads in order."""
    i_tile = tl.program_id(0)
    begin = i_tile * BP
    end = begin + BP
    if end < places:
        row = tl.load(p_ordered + end - 1).to(tl.int32)
        opens = (begin == 0) | (tl.load(p_ordered + begin - 1, mask=begin > 0, other=-1).to(tl.int32) != row)
        if opens & (tl.load(p_ordered + end).to(tl.int32) == row):
            o_d = tl.program_id(1) * BD + tl.arange(0, BD)
            m_d = o_d < D
            b_sum = tl.load(p_tail + i_tile.to(tl.int64) * D + o_d, mask=m_d, other=0.0)
            first = i_tile + 1
            more = True
            while more:
                o_t = first + tl.arange(0, BH)
                b_row = tl.load(p_ordered + o_t * BP, mask=o_t * BP < places, other=-1).to(tl.int32)
                m_t = b_row == row
                o_head = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
                b_sum += tl.sum(tl.load(p_head + o_head, mask=m_t[:, None] & m_d[None, :], other=0.0), 0)
                more = tl.sum(m_t.to(tl.int32), 0) == BH
                first += BH
            tl.store(p_out + row.to(tl.int64) * D + o_d, b_sum.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["queries"])
def part_counts(p_score, p_own, p_counts, columns, in_row, queries, ALIGN: tl.constexpr, BC: tl.constexpr):
    """Scores of one row's slice above its own, and equal."""
    i_row = tl.program_id(0).to(tl.int64)
    i_slice = tl.program_id(1)
    o_c = i_slice * BC + tl.arange(0, BC)
    own = tl.load(p_own + i_row)
    b_score = tl.load(p_score + i_row * in_row * ALIGN + o_c, mask=o_c < columns, other=-float("inf"))
    m_c = o_c < columns
    above = tl.sum((m_c & (b_score > own)).to(tl.int32), 0)
    equal = tl.sum((m_c & (b_score == own)).to(tl.int32), 0)
    p_counts += i_slice.to(tl.int64) * 2 * queries + i_row
    tl.store(p_counts, above)
    tl.store(p_counts + queries, equal)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Product of both into float32, whatever they are: a narrow type would round the scores."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _block_columns(queries: int, rows: int) -> int:
    return min(stride(rows), max(COLUMNS, BLOCK // queries // COLUMNS * COLUMNS))


def _slopes_buffer(score: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Where slopes go: over the scores, or beside them if the operands of products are narrower."""
    return score if query.dtype == score.dtype else torch.empty_like(score, dtype=query.dtype)


def _filled(table: torch.Tensor) -> torch.Tensor:
    """The table with rows of zeros up to a whole stride: products of other sizes take several times as long."""
    rows = len(table)
    if rows == stride(rows):
        return table
    filled = table.new_empty(stride(rows), table.shape[1])
    filled[:rows] = table
    filled[rows:] = 0
    return filled


def cross_entropy(
    query: torch.Tensor, table: torch.Tensor, target: torch.Tensor, first: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [B] and logarithm of the sum [B] in float32, and with `keep` the loss's slopes by the scores [B, stride]."""
    queries, rows = len(query), len(table) - first
    loss, total = (torch.empty(queries, dtype=torch.float32, device=query.device) for _ in range(2))
    if not queries:
        return loss, total, query.new_empty((0, stride(rows)) if keep else (0, 0))
    columns = stride(rows) if keep else _block_columns(queries, rows)
    score = torch.empty(queries, columns, dtype=torch.float32, device=query.device)
    if keep:
        slope = _slopes_buffer(score, query)
        _product(query, _filled(table[first:]).T, score)
        unit = align(columns)
        taken = min(COLUMNS, triton.next_power_of_2(rows))
        row_softmax[(queries,)](
            score, target, loss, total, slope, rows, columns // unit, first, ALIGN=unit, BC=taken, num_warps=8
        )
        return loss, total, slope
    count = triton.cdiv(rows, COLUMNS)
    totals = torch.empty(count, queries, dtype=torch.float32, device=query.device)
    own = torch.full_like(loss, torch.nan)
    unit = align(columns)
    for begin in range(first, first + rows, columns):
        part = table[begin : begin + columns]
        _product(query, part.T, score[:, : len(part)])
        part_totals[(queries, triton.cdiv(len(part), COLUMNS))](
            score,
            target,
            totals,
            own,
            len(part),
            columns // unit,
            begin,
            (begin - first) // COLUMNS,
            queries,
            ALIGN=unit,
            BC=COLUMNS,
            num_warps=8,
        )
    total = totals.logsumexp(0)
    return total - own, total, query.new_empty(0, 0)


def cross_entropy_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    total: torch.Tensor,
    kept: torch.Tensor,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the queries and of the table, in their dtypes."""
    queries, rows = len(query), len(table) - first
    room = torch.empty(first + stride(rows), table.shape[1], dtype=table.dtype, device=table.device)
    d_table = room[: len(table)]
    d_table[:first] = 0
    if not queries:
        return torch.empty_like(query), d_table.zero_()
    grad = grad.float()[:, None]
    weighted = (query * grad).to(query.dtype)
    d_query = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    if kept.numel():
        torch.mm(kept.T, weighted, out=room[first:])
        _product(kept, _filled(table[first:]), d_query)
        return (d_query * grad).to(query.dtype), d_table
    columns = _block_columns(queries, rows)
    score = torch.empty(queries, columns, dtype=torch.float32, device=query.device)
    slopes = _slopes_buffer(score, query)
    summand = torch.empty_like(d_query)
    unit = align(columns)
    for begin in range(first, first + rows, columns):
        part = table[begin : begin + columns]
        slope = slopes[:, : len(part)]
        _product(query, part.T, score[:, : len(part)])
        part_slopes[(queries, triton.cdiv(len(part), COLUMNS))](
            score, target, total, slope, len(part), columns // unit, begin, ALIGN=unit, BC=COLUMNS, num_warps=8
        )
        torch.mm(slope.T, weighted, out=d_table[begin : begin + len(part)])
        if begin == first:
            _product(slope, part, d_query)
        elif query.dtype == torch.float32:
            d_query.addmm_(slope, part)
        else:
            _product(slope, part, summand)
            d_query += summand
    return (d_query * grad).to(query.dtype), d_table


def sum_by_row(grad: torch.Tensor, ordered: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    """Row r of the result [V, D] is the sum of grad [N, D] over the places where `ordered` is r."""
    count, width = grad.shape
    out = torch.zeros(rows, width, dtype=grad.dtype, device=grad.device)
    if not out.numel() or not count:
        return out
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    unit = align(grad.stride(0))
    tiles = triton.cdiv(count, TILE)
    head = torch.empty(tiles, width, dtype=torch.float32, device=grad.device)
    tail = torch.empty_like(head)
    columns = max(16, min(128, triton.next_power_of_2(width)))
    grid = (tiles, triton.cdiv(width, columns))
    tile_sums[grid](
        grad,
        ordered,
        places,
        out,
        head,
        tail,
        count,
        grad.stride(0) // unit,
        D=width,
        ALIGN=unit,
        BP=TILE,
        BD=columns,
        num_warps=4,
    )
    join_sums[grid](ordered, out, head, tail, count, D=width, BP=TILE, BH=HEADS, BD=columns, num_warps=4)
    return out


def compare_counts(score: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Scores of each row greater than its own [0, B], and equal to it [1, B], int64."""
    queries, columns = score.shape
    slices = triton.cdiv(columns, COLUMNS)
    counts = torch.empty(slices, 2, queries, dtype=torch.int32, device=score.device)
    if queries and columns:
        unit = align(score.stride(0))
        part_counts[(queries, slices)](
            score,
            own,
            counts,
            columns,
            score.stride(0) // unit,
            queries,
            ALIGN=unit,
            BC=min(COLUMNS, triton.next_power_of_2(columns)),
            num_warps=8,
        )
    return counts.sum(0)
