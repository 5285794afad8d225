# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Sums of what the programs of a kernel leave: always in the same order, so that results repeat bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SIDE_BY_SIDE = 32
"""Rows, and columns, that a program adds at a time; also the most parts into which many rows are cut first."""
WARPS = 8
"""Warps of a program that adds what the programs of a kernel leave, each with 32 rows at a time."""


@triton.jit(do_not_specialize=["count"])
def ordered_sums(p_from, p_to, count, columns, row, BR: tl.constexpr, BC: tl.constexpr):
    """Sums of every S-th block of rows of [n, count, columns], which are `row` apart: [n, S, columns]."""
    p_from += tl.program_id(2).to(tl.int64) * count * row
    p_to += tl.program_id(2) * tl.num_programs(1) * columns
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_r = tl.arange(0, BR)
    b_sum = tl.zeros([BR, BC], tl.float32)
    for r in range(tl.program_id(1) * BR, count, tl.num_programs(1) * BR):
        mask = (o_r < count - r)[:, None] & (o_c < columns)[None, :]
        b_sum += tl.load(p_from + (r + o_r)[:, None] * row + o_c[None, :], mask=mask, other=0.0)
    tl.store(p_to + tl.program_id(1) * columns + o_c, tl.sum(b_sum, 0), mask=o_c < columns)


def summed(sums: torch.Tensor) -> torch.Tensor:
    """Sum of contiguous float32 [n, count, ...] over count, in one launch, for as many rows as programs leave.

    Several times faster than torch where few columns are many rows.
    """
    groups, count = sums.shape[:2]
    out = torch.empty(groups, *sums.shape[2:], dtype=sums.dtype, device=sums.device)
    columns = out[0].numel()
    ordered_sums[(triton.cdiv(columns, 16), 1, groups)](
        sums, out, count, columns, columns, BR=32 * WARPS, BC=16, num_warps=WARPS
    )
    return out


def sum_rows(rows: torch.Tensor, to: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of float32 [R, columns] over R, into a run of `to` if given."""
    count, columns = rows.shape
    if to is None:
        to = torch.empty(columns, dtype=rows.dtype, device=rows.device)
    parts = min(SIDE_BY_SIDE, -(-count // (2 * SIDE_BY_SIDE)))
    if parts > 2:
        _launch(rows, partial := rows.new_empty(parts, columns), parts)
        rows = partial
    _launch(rows, to, 1)
    return to


def _launch(rows: torch.Tensor, to: torch.Tensor, parts: int) -> None:
    count, columns = rows.shape
    ordered_sums[(-(-columns // SIDE_BY_SIDE), parts)](
        rows, to, count, columns, rows.stride(0), BR=SIDE_BY_SIDE, BC=SIDE_BY_SIDE, num_warps=4
    )
