"""Scores of queries against the rows of a table: loss, rows by index, places in the order.

Letters: B queries, V rows, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmm4rec_kernels import arguments
from mmm4rec_kernels.backend import choose
from mmm4rec_kernels.scoring import eager, ops, reference

__all__ = ["Order", "compare_counts", "lookup", "order_of", "softmax_cross_entropy", "sum_by_row"]


def softmax_cross_entropy(
    query_BD: torch.Tensor,
    table_VD: torch.Tensor,
    target_B: torch.Tensor,
    *,
    first_row: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of each query's target under the softmax of its products with all rows of the table.

    log(sum over v >= first_row of exp(query . row_v)) - query . row_target. Forward and backward go in blocks: the
    matrix of all scores exists as a whole only while it is small (`ops.KEPT`), then once, as what backward needs.
    Under autocast the products are taken in its dtype; sums and the loss are float32 (float64 for float64).

    Args:
        query_BD: [B, D].
        table_VD: [V, D], dtype of the queries.
        target_B: [B] int64, rows of the table, from first_row to V - 1. Elsewhere: an error on the CPU, NaN on a GPU.
        first_row: rows before it are no candidates and get no gradient.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        [B], float32, or float64 for float64.

    Raises:
        ValueError: a shape, dtype, device or value is not as above; the message names the argument.
        BackendUnavailable: an explicit backend cannot run here or cannot take the call.
    """
    arguments.dimensions("query_BD", query_BD, "[B, D]", 2)
    arguments.floating("query_BD", query_BD)
    arguments.dimensions("table_VD", table_VD, "[V, D]", 2)
    if table_VD.shape[1] != query_BD.shape[1]:
        raise ValueError(f"table_VD: expected shape [V, D] = [V, {query_BD.shape[1]}], got {list(table_VD.shape)}")
    kind = query_BD.device.type
    if torch.is_autocast_enabled(kind) and query_BD.dtype != torch.float64:
        narrow = torch.get_autocast_dtype(kind)
        query_BD, table_VD = query_BD.to(narrow), table_VD.to(narrow)
    arguments.like("table_VD", table_VD, "query_BD", query_BD, dtype=True)
    arguments.shape("target_B", target_B, query_BD.shape[:1], "[B]")
    if target_B.dtype != torch.int64 or target_B.device != query_BD.device:
        raise ValueError(f"target_B: expected int64 on {query_BD.device}, got {target_B.dtype} on {target_B.device}")
    if not 0 <= first_row < len(table_VD):
        raise ValueError(f"first_row: expected 0 to {len(table_VD) - 1}, got {first_row}")
    chosen = choose("softmax_cross_entropy", backend, query_BD)
    if chosen == "triton":
        loss: torch.Tensor
        keep = torch.is_grad_enabled() and (query_BD.requires_grad or table_VD.requires_grad)
        loss, _, _ = ops.cross_entropy_forward(
            query_BD.contiguous(), table_VD.contiguous(), target_B.contiguous(), first_row, keep
        )
        return loss
    compute = torch.promote_types(query_BD.dtype, torch.float32)
    function = reference.cross_entropy if chosen == "reference" else eager.cross_entropy
    with torch.autocast(kind, enabled=False):
        return function(query_BD.to(compute), table_VD.to(compute), target_B, first_row)


class Order(NamedTuple):
    """An index sorted, to share among lookups by the same index."""

    ordered_N: torch.Tensor
    """The index, flat, in ascending order."""
    places_N: torch.Tensor
    """Where each stood, int64; equal ones in their own order."""


def order_of(index: torch.Tensor, rows: int) -> Order:
    """Sort an index of any shape, int64, values from 0 to rows - 1, for `lookup`."""
    return Order(*ops.order_of(index.reshape(-1), rows))


def lookup(
    table_VD: torch.Tensor, index: torch.Tensor, *, order: Order | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Rows of a table by index; the gradient is dense and summed in a fixed order.

    Args:
        table_VD: [V, D].
        index: [...] int64, from 0 to V - 1, repeats allowed.
        order: `order_of(index, V)`; without it the kernels sort the index in every backward.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        [..., D] in the dtype of the table.

    Raises:
        ValueError: a shape, dtype or device is not as above; the message names the argument.
        BackendUnavailable: an explicit backend cannot run here or cannot take the call.
    """
    arguments.dimensions("table_VD", table_VD, "[V, D]", 2)
    arguments.floating("table_VD", table_VD)
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64 or index.device != table_VD.device:
        raise ValueError(f"index: expected an int64 tensor on {table_VD.device}")
    if order is not None:
        for name, tensor in zip(("order.ordered_N", "order.places_N"), order, strict=True):
            arguments.shape(name, tensor, (index.numel(),), "[N]")
    chosen = choose("lookup", backend, table_VD)
    flat = index.reshape(-1)
    rows: torch.Tensor
    if chosen == "triton":
        rows = ops.lookup(table_VD, flat, *(order or (None, None)))
    else:
        rows = (reference.lookup if chosen == "reference" else eager.lookup)(table_VD, flat)
    return rows.view(*index.shape, table_VD.shape[1])


def sum_by_row(part_ND: torch.Tensor, index_N: torch.Tensor, rows: int, *, backend: str = "auto") -> torch.Tensor:
    """Sums of the parts that belong to one row, in a fixed order: the gradient of `lookup`, without gradients.

    Args:
        part_ND: [N, D].
        index_N: [N] int64, the row of each part, from 0 to rows - 1.
        rows: R.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        [R, D], zero where no part belongs.

    Raises:
        ValueError: a shape or dtype is not as above; the message names the argument.
        BackendUnavailable: an explicit backend cannot run here or cannot take the call.
    """
    arguments.dimensions("part_ND", part_ND, "[N, D]", 2)
    arguments.floating("part_ND", part_ND)
    arguments.shape("index_N", index_N, part_ND.shape[:1], "[N]")
    if choose("lookup", backend, part_ND) == "triton":
        summed: torch.Tensor = ops.lookup_backward(part_ND.contiguous(), *ops.order_of(index_N, rows), rows)
        return summed
    return part_ND.new_zeros(rows, part_ND.shape[1]).index_add_(0, index_N, part_ND)


def compare_counts(
    score_BV: torch.Tensor, own_B: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many scores of each query are greater than its own, and how many are equal to it.

    Args:
        score_BV: [B, V], columns contiguous.
        own_B: [B], dtype of the scores.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        Two counts [B], int64. A score that is NaN is neither.

    Raises:
        ValueError: a shape, dtype or device is not as above; the message names the argument.
        BackendUnavailable: an explicit backend cannot run here or cannot take the call.
    """
    arguments.dimensions("score_BV", score_BV, "[B, V]", 2)
    arguments.floating("score_BV", score_BV)
    arguments.shape("own_B", own_B, score_BV.shape[:1], "[B]")
    arguments.like("own_B", own_B, "score_BV", score_BV, dtype=True)
    unfit = "" if score_BV.stride(1) == 1 else "columns are not contiguous"
    chosen = choose("compare_counts", backend, score_BV, fits=not unfit, unfit=unfit)
    if chosen == "triton":
        above_B, equal_B = ops.compare_counts(score_BV, own_B.contiguous())
        return above_B, equal_B
    return (reference.compare_counts if chosen == "reference" else eager.compare_counts)(score_BV, own_B)
