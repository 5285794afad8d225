"""Scores of queries against the rows of a table, in torch, in blocks of bounded memory.

Letters: B queries, V rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.scoring import reference
from mmm4rec_kernels.scoring.ops import keeps

BLOCK = 1 << 23
"""Scores of one block where they are not kept."""
CACHED = 1 << 20
"""Scores worked on at once: they should stay in the processor's cache."""
EXACT = 1 << 24
"""Up to here float32 counts without loss."""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, table: torch.Tensor, target: torch.Tensor, first: int, keep: bool
    ) -> torch.Tensor:
        ctx.first = first
        rows, own = table[first:], (target - first)[:, None]
        if keep and keeps(len(query), len(rows)):
            slope, loss = _whole(query, rows, own)
            ctx.save_for_backward(query, table, slope)
            return loss
        total = query.new_full((len(query),), -torch.inf)
        score_own = torch.zeros_like(total)
        for begin, part in _blocks(rows, len(query)):
            score = query @ part.T
            total = torch.logaddexp(total, score.logsumexp(1))
            within = own - begin
            inside = (within >= 0) & (within < len(part))
            score_own += torch.where(inside, score.gather(1, within.clamp(0, len(part) - 1)), 0).squeeze(1)
        ctx.save_for_backward(query, table, own, total)
        return total - score_own

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, table, *saved = ctx.saved_tensors
        rows = table[ctx.first :]
        d_table = torch.empty_like(table)
        d_table[: ctx.first] = 0
        weighted = query * grad[:, None]
        if len(saved) == 1:
            slope = saved[0]
            d_query = slope @ rows
            torch.mm(slope.T, weighted, out=d_table[ctx.first :])
        else:
            own, total = saved
            d_query = torch.zeros_like(query)
            for begin, part in _blocks(rows, len(query)):
                slope = (query @ part.T).sub_(total[:, None]).exp_()
                within = own - begin
                inside = ((within >= 0) & (within < len(part))).to(slope)
                slope.scatter_add_(1, within.clamp(0, len(part) - 1), -inside)
                d_query.addmm_(slope, part)
                at = ctx.first + begin
                torch.mm(slope.T, weighted, out=d_table[at : at + len(part)])
        return d_query.mul_(grad[:, None]), d_table, None, None, None


def _whole(query: torch.Tensor, rows: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the loss by the scores [B, V] and the loss [B]."""
    slope = query @ rows.T
    loss = query.new_empty(len(query))
    step = max(1, CACHED // max(1, len(rows)))
    for begin in range(0, len(query), step):
        score = slope[begin : begin + step]
        here = own[begin : begin + step]
        score_own, top = score.gather(1, here).squeeze(1), score.amax(1)
        torch.softmax(score, 1, out=score)
        # The largest probability is one over the softmax's sum behind the largest score.
        loss[begin : begin + step] = top - score.amax(1).log() - score_own
        score.scatter_add_(1, here, score.new_full(here.shape, -1))
    return slope, loss


def _blocks(rows: torch.Tensor, queries: int) -> list[tuple[int, torch.Tensor]]:
    step = max(1, BLOCK // max(1, queries))
    return [(begin, rows[begin : begin + step]) for begin in range(0, len(rows), step)]


def cross_entropy(query_BD: torch.Tensor, table_VD: torch.Tensor, target_B: torch.Tensor, first: int) -> torch.Tensor:
    """As `reference.cross_entropy`."""
    keep = torch.is_grad_enabled() and (query_BD.requires_grad or table_VD.requires_grad)
    loss: torch.Tensor = _CrossEntropy.apply(query_BD, table_VD, target_B, first, keep)  # type: ignore[no-untyped-call]
    return loss


def lookup(table_VD: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """As `reference.lookup`."""
    return torch.nn.functional.embedding(index_N, table_VD)


def compare_counts(score_BV: torch.Tensor, own_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.compare_counts`."""
    if score_BV.shape[1] > EXACT:
        return reference.compare_counts(score_BV, own_B)
    # Comparisons written as float32 and summed go through vector registers; booleans are counted one by one.
    flag_BV = torch.empty(score_BV.shape, dtype=torch.float32, device=score_BV.device)
    above_B, equal_B = (
        compare(score_BV, own_B[:, None], out=flag_BV).sum(1).long() for compare in (torch.gt, torch.eq)
    )
    return above_B, equal_B
