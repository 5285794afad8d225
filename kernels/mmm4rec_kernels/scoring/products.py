# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Products of queries and rows whose scores never leave the chip: sums of a softmax, and its slopes.

Letters: B queries, V rows, D width. For operands that the tensor cores take (bfloat16, or float32 as TF32). A program
holds BM queries against BN rows; neighbours in the grid share their rows, and all queries stay in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.tiles import LOG2E

BM, BN, BK = 128, 128, 32
WARPS, STAGES = 8, 3


@triton.jit
def _scores(
    p_query,
    p_table,
    queries,
    rows,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores [BM, BN] of this program's queries and rows."""
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    o_k = tl.arange(0, BK)
    b_score = tl.zeros([BM, BN], tl.float32)
    for begin in range(0, D, BK):
        m_k = begin + o_k < D
        b_query = tl.load(
            p_query + o_m[:, None] * D + begin + o_k[None, :], mask=(o_m < queries)[:, None] & m_k[None, :], other=0.0
        )
        b_row = tl.load(
            p_table + o_n[:, None] * D + begin + o_k[None, :], mask=(o_n < rows)[:, None] & m_k[None, :], other=0.0
        )
        b_score = tl.dot(b_query, tl.trans(b_row), b_score, input_precision=PRECISION)
    return b_score, o_m, o_n


@triton.jit
def tile_totals(
    p_query,
    p_table,
    p_target,
    p_totals,
    p_own,
    queries,
    rows,
    first,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logarithm of the sum over BN rows for each query, and the target's score where it is among them."""
    b_score, o_m, o_n = _scores(p_query, p_table, queries, rows, D, BM, BN, BK, PRECISION)
    m_m = o_m < queries
    target = tl.load(p_target + o_m, mask=m_m, other=-1) - first
    b_score = tl.where((o_n < rows)[None, :], b_score, -float("inf"))
    top = tl.max(b_score, 1)
    total = tl.sum(tl.exp2((b_score - top[:, None]) * LOG2E), 1)
    tl.store(p_totals + tl.program_id(1).to(tl.int64) * queries + o_m, top + tl.log(total), mask=m_m)
    own = tl.sum(tl.where(o_n[None, :] == target[:, None], b_score, 0.0), 1)
    begin = tl.program_id(1) * BN
    tl.store(p_own + o_m, own, mask=m_m & (target >= begin) & (target < tl.minimum(begin + BN, rows)))


@triton.jit
def tile_slopes(
    p_query,
    p_table,
    p_target,
    p_total,
    p_slope,
    queries,
    rows,
    first,
    in_row,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax minus one at the target."""
    b_score, o_m, o_n = _scores(p_query, p_table, queries, rows, D, BM, BN, BK, PRECISION)
    m_m = o_m < queries
    target = tl.load(p_target + o_m, mask=m_m, other=-1) - first
    b_slope = tl.exp2((b_score - tl.load(p_total + o_m, mask=m_m, other=0.0)[:, None]) * LOG2E)
    b_slope -= tl.where(o_n[None, :] == target[:, None], 1.0, 0.0)
    at = p_slope + o_m[:, None] * in_row + o_n[None, :]
    tl.store(at, b_slope.to(p_slope.dtype.element_ty), mask=m_m[:, None] & (o_n < rows)[None, :])


def _grid(queries: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(queries, BM), triton.cdiv(rows, BN)


def totals(
    query: torch.Tensor, table: torch.Tensor, target: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithm of the sum of each query's softmax over the rows from `first` on [B], and the target's score [B]."""
    queries, rows = len(query), len(table) - first
    grid = _grid(queries, rows)
    parts = torch.empty(grid[1], queries, dtype=torch.float32, device=query.device)
    own = torch.full((queries,), torch.nan, dtype=torch.float32, device=query.device)
    tile_totals[grid](
        query,
        table[first:],
        target,
        parts,
        own,
        queries,
        rows,
        first,
        D=query.shape[1],
        BM=BM,
        BN=BN,
        BK=BK,
        PRECISION="tf32",
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return parts.logsumexp(0), own


def slopes(
    query: torch.Tensor,
    part: torch.Tensor,
    target: torch.Tensor,
    total: torch.Tensor,
    begin: int,
    out: torch.Tensor,
) -> None:
    """Slopes [B, R] of the loss by the scores of a part of the table, which begins at row `begin`."""
    queries, rows = len(query), len(part)
    tile_slopes[_grid(queries, rows)](
        query,
        part,
        target,
        total,
        out,
        queries,
        rows,
        begin,
        out.stride(0),
        D=query.shape[1],
        BM=BM,
        BN=BN,
        BK=BK,
        PRECISION="tf32",
        num_warps=WARPS,
        num_stages=STAGES,
    )
