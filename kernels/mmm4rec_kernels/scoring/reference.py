"""Scores of queries against the rows of a table, as they are defined. Letters: B queries, V rows, D width, N places."""

from __future__ import annotations

import torch


def cross_entropy(query_BD: torch.Tensor, table_VD: torch.Tensor, target_B: torch.Tensor, first: int) -> torch.Tensor:
    """log(sum over v >= first of exp(q . row_v)) - q . row_target, [B]."""
    score_BV = query_BD @ table_VD[first:].T
    own_B = score_BV.gather(1, (target_B - first)[:, None]).squeeze(1)
    return score_BV.logsumexp(1) - own_B


def lookup(table_VD: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """Row index[n] of the table at place n, [N, D], as a product with unit vectors."""
    unit_NV = torch.nn.functional.one_hot(index_N, len(table_VD)).to(table_VD)
    return unit_NV @ table_VD


def compare_counts(score_BV: torch.Tensor, own_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many scores of each row are greater than, and how many equal to its own, int64 [B] each."""
    own_B1 = own_B[:, None]
    return (score_BV > own_B1).sum(1), (score_BV == own_B1).sum(1)
