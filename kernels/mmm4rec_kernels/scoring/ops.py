"""The operators of torch behind the scoring functions, with shapes for tracing and gradients.

The kernels are imported when one runs.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.operators import dispatched

KEPT = 1 << 26
"""Most scores [queries x rows] that are kept from forward for backward; beyond, they are computed again in blocks."""


def keeps(queries: int, rows: int) -> bool:
    """Whether forward leaves the scores' softmax to backward."""
    return queries * rows <= KEPT


def stride(rows: int) -> int:
    """Columns of a buffer of scores: whole 64 bytes, as fast matrix products want them."""
    return -(-rows // 16) * 16


@dispatched("mmm4rec_kernels::softmax_cross_entropy")
def cross_entropy_forward(
    query: torch.Tensor, table: torch.Tensor, target: torch.Tensor, first: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [B], logarithm of the softmax's sum [B], and what is kept for backward, wide or empty."""
    from mmm4rec_kernels.scoring import fused

    with torch.autocast(query.device.type, enabled=False):
        return fused.cross_entropy(query, table, target, first, keep and keeps(len(query), len(table) - first))


@cross_entropy_forward.register_fake
def _cross_entropy_shapes(
    query: torch.Tensor, table: torch.Tensor, target: torch.Tensor, first: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries, rows = query.shape[0], table.shape[0] - first
    loss = query.new_empty(queries, dtype=torch.float32)
    shape = (queries, stride(rows)) if keep and keeps(queries, rows) else (0, 0)
    return loss, torch.empty_like(loss), query.new_empty(shape)


@dispatched("mmm4rec_kernels::softmax_cross_entropy_backward")
def cross_entropy_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    total: torch.Tensor,
    kept: torch.Tensor,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the queries and of the whole table."""
    from mmm4rec_kernels.scoring import fused

    with torch.autocast(query.device.type, enabled=False):
        return fused.cross_entropy_backward(grad, query, table, target, total, kept, first)


@cross_entropy_backward.register_fake
def _cross_entropy_backward_shapes(
    grad: torch.Tensor, query: torch.Tensor, table: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), table.new_empty(table.shape)


def _save_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, table, target, ctx.first, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, table, target, *output[1:])


def _cross_entropy_gradients(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return (*cross_entropy_backward(grad, *ctx.saved_tensors, ctx.first), None, None, None)


cross_entropy_forward.register_autograd(_cross_entropy_gradients, setup_context=_save_cross_entropy)


@dispatched("mmm4rec_kernels::lookup")
def lookup(
    table: torch.Tensor, index: torch.Tensor, ordered: torch.Tensor | None, places: torch.Tensor | None
) -> torch.Tensor:
    """Rows [N, D]; `ordered` and `places` are the index sorted and where each stood, or None."""
    return table.index_select(0, index)


@lookup.register_fake
def _lookup_shape(table: torch.Tensor, index: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return table.new_empty(index.shape[0], table.shape[1])


@dispatched("mmm4rec_kernels::lookup_backward")
def lookup_backward(grad: torch.Tensor, ordered: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    """Gradient of the table [V, D]: each row the sum over its places."""
    from mmm4rec_kernels.scoring import fused

    return fused.sum_by_row(grad, ordered, places, rows)


@lookup_backward.register_fake
def _lookup_backward_shape(grad: torch.Tensor, ordered: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    return grad.new_empty(rows, grad.shape[1])


def order_of(index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The index sorted, in the narrowest type that holds it (a radix sort passes over its bits), and the places."""
    narrow = torch.int16 if rows <= 1 << 15 else torch.int32 if rows <= 1 << 31 else torch.int64
    ordered, places = index.to(narrow).sort(stable=True)
    return ordered, places


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    table, index, ordered, places = inputs
    ctx.rows = len(table)
    ctx.save_for_backward(index, ordered, places)


def _lookup_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    index, ordered, places = ctx.saved_tensors
    if ordered is None:
        ordered, places = order_of(index, ctx.rows)
    return lookup_backward(grad, ordered, places, ctx.rows), None, None, None


lookup.register_autograd(_lookup_gradients, setup_context=_save_lookup)


@dispatched("mmm4rec_kernels::compare_counts")
def compare_counts(score: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Scores of each row greater than its own [0, B], and equal to it [1, B], int64."""
    from mmm4rec_kernels.scoring import fused

    return fused.compare_counts(score, own)


@compare_counts.register_fake
def _compare_counts_shape(score: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return own.new_empty((2, own.shape[0]), dtype=torch.int64)
